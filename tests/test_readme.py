"""The README's examples run as printed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mope_bb import zoo
from mope_bb.config import parse_config
from mope_bb.zoo.serving import ZooServer
from tests.server.serving import served as served_over_http

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    """The README's code blocks in `language`."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both tables, as when one writes the second into the first."""
    both = dict(one)
    for key, value in other.items():
        known = both.get(key)
        both[key] = joined(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return both


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, nano_experts: ZooServer) -> None:
    """`zoo.serve()` gives the nano zoo that is being served already, instead of training the default one."""
    monkeypatch.setattr(zoo, "serve", lambda: contextlib.nullcontext(nano_experts), raising=False)


CLIENT, LIBRARY = blocks("python")


def run_example() -> str:
    """What the library's example prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(LIBRARY, "README.md", "exec"), {})  # noqa: S102  # our own file
    return printed.getvalue()


def test_client_example_runs(nano_experts: ZooServer) -> None:
    """The openai SDK against our server, at the address that this test's has."""
    with served_over_http(nano_experts.config()) as server:
        code = CLIENT.replace("http://127.0.0.1:8000", server.url)
        assert code != CLIENT
        found: dict[str, Any] = {}
        exec(compile(f"{code}\nclient.close()", "README.md", "exec"), found)  # noqa: S102  # our own file


@pytest.mark.usefixtures("served")
def test_example_runs_as_printed() -> None:
    """Ten lines, two answers."""
    assert len(LIBRARY.strip().splitlines()) <= 10
    assert re.search(r" (stop|length) \d+\n$", run_example())


@pytest.mark.usefixtures("served")
def test_example_runs_inside_a_running_loop() -> None:
    """Agents have an event loop already; the synchronous face must not mind."""

    async def main() -> str:
        return run_example()

    assert re.search(r" (stop|length) \d+\n$", asyncio.run(main()))


def test_configuration_examples_are_valid() -> None:
    """The mope.toml of the README is accepted as it stands, and with what training needs besides."""
    servers, bad_days, training = map(tomllib.loads, blocks("toml"))
    assert [expert.name for expert in parse_config(servers).experts] == ["concise", "friendly"]
    config = parse_config(joined(joined(servers, bad_days), training))
    assert config.budget.max_calls == 100_000
    assert config.train.prompts is not None
    assert config.dimensions["concise"].text is not None
    assert config.dimensions["concise"].reward is not None
