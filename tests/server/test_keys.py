"""The keys by which experts are asked stand in no answer of the server, however the experts fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest

from mope_bb.config import parse_config
from mope_bb.zoo.build import Zoo
from tests.security.echo import KEY, PASSWORD, TRACES, EchoServer, Mode, serve_echo
from tests.server.serving import Served, chat_body, served

PROVIDERS: dict[str, dict[str, Any]] = {
    "llamacpp": {},
    "vllm": {"model": "m"},
    "chat": {"model": "m"},
}


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoServer]:
    """An endpoint that repeats everything."""
    with serve_echo() as server:
        yield server


@pytest.fixture(scope="module", params=PROVIDERS)
def leaky(request: pytest.FixtureRequest, echo: EchoServer, nano: Zoo) -> Iterator[Served]:
    """A server whose experts repeat their keys: one from the environment, one in the address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY", KEY)
        shared = {"provider": request.param, "max_retries": 0, **PROVIDERS[request.param]}
        if request.param == "vllm":
            shared["tokenizer"] = str(nano.folder("base"))
        experts = [
            {"name": "keyed", "base_url": f"http://127.0.0.1:{echo.port}/v1", "api_key_env": "CANARY"},
            {"name": "secret", "base_url": f"http://me:{PASSWORD}@127.0.0.1:{echo.port}/v1"},
        ]
        tables = [{"dimension": expert["name"], **shared, **expert} for expert in experts]
        with served(parse_config({"experts": tables, "cache": {"enabled": False}})) as server:
            yield server


def assert_clean(response: httpx.Response) -> None:
    """No key, and no half of one."""
    told = f"{response.text} {response.headers}"
    for trace in TRACES:
        assert trace not in told


@pytest.mark.parametrize("mode", get_args(Mode))
def test_keys(leaky: Served, echo: EchoServer, mode: Mode) -> None:
    """Whole and streamed, chat and text, and what the server tells of itself."""
    echo.mode, echo.num_with_key = mode, 0
    for expert in ("keyed", "secret"):
        for is_streaming in (False, True):
            response = leaky.post("/v1/chat/completions", chat_body(model=f"mope:{expert}", stream=is_streaming))
            assert response.status_code >= 400
            assert_clean(response)
        assert_clean(leaky.post("/v1/completions", {"model": f"mope:{expert}", "prompt": "x", "max_tokens": 2}))
    assert echo.num_with_key > 0
    for path in ("/metrics", "/mope/info", "/v1/models", "/openapi.json"):
        assert_clean(leaky.get(path))
