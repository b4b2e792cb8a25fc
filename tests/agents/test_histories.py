"""What the experts get to read of past calls and their results: agents' histories, up to the rendered prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from aiohttp import web
from openai import OpenAI

from mope_bb.zoo.serving import ZooServer
from tests.agents.forms import PRICE_TOOL
from tests.agents.serving import serve_mope, write_config
from tests.endpoints.engine import Reply, StandIn, serving

PATHS: Final = ("/props", "/v1/models", "/tokenize", "/detokenize", "/apply-template", "/completion")
CALL: Final = {"id": "c1", "type": "function", "function": {"name": "price_of", "arguments": '{"part": "chain"}'}}
HISTORY: Final[Any] = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What does a chain cost?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "24.5 euros"},
    {"role": "user", "content": "And two?"},
)


@dataclass
class Recorder:
    """Stands before a real llama.cpp server, passes everything on, and keeps what its template rendered."""

    server: httpx.Client
    url: str = ""
    prompts: list[str] = field(default_factory=list)
    rendered: list[Any] = field(default_factory=list)
    """The messages that were rendered."""

    def __call__(self, stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
        reply = self.server.request(request.method, request.path, json=body or None)
        if request.path == "/apply-template":
            self.rendered.append(body["messages"])
            self.prompts.append(reply.json()["prompt"])
        return reply.status_code, reply.json()


@pytest.fixture
def recorder(nano_experts: ZooServer) -> Iterator[Recorder]:
    """One before the expert "concise"."""
    with httpx.Client(base_url=nano_experts.base_urls["concise"], timeout=60, trust_env=False) as server:
        found = Recorder(server)
        routes = {(method, path): found for method in ("GET", "POST") for path in PATHS}
        with serving(StandIn({}, routes)) as stand_in:
            found.url = stand_in.url
            yield found


@pytest.mark.parametrize("style", ["plain", "template"])
def test_histories_reach_the_experts(style: str, recorder: Recorder, tmp_path: Path) -> None:
    """Who called what, and what came of it, stands in the prompt of the expert, in words or by its own template."""
    expert = {"name": "concise", "dimension": "concise", "provider": "llamacpp", "base_url": recorder.url}
    path = write_config(tmp_path / "mope.toml", [expert], decoding={"tool_messages": style})
    with serve_mope(path) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        reply = client.chat.completions.create(
            model="mope", messages=list(HISTORY), tools=[PRICE_TOOL], tool_choice="required", max_tokens=100
        )
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens > 50
    prompt, messages = recorder.prompts[-1], recorder.rendered[-1]
    assert prompt.startswith("<|system|>Be kind.\n\nThese tools can be called:\n- price_of")
    assert '{"tool": "NAME", "arguments": {...}}' in messages[0]["content"]
    assert "<|user|>What does a chain cost?<|end|>" in prompt
    if style == "plain":
        assert '<|assistant|>{"tool": "price_of", "arguments": {"part": "chain"}}<|end|>' in prompt
        assert "<|user|>price_of returned: 24.5 euros" in prompt
        assert all(message.keys() == {"role", "content"} for message in messages)
    else:
        # The zoo's own template leaves calls out; what it gets has them.
        assert messages[2:4] == [{**HISTORY[2], "content": ""}, HISTORY[3]]
        assert "<|tool|>24.5 euros<|end|>" in prompt
    assert prompt.endswith("And two?<|end|><|assistant|>")
