"""Sessions of scripted experts, and a stand-in for llama.cpp that hangs and records who left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from mope_bb.config import Config, parse_config

Script = Sequence[Mapping[str, float]]


@pytest.fixture
def scripted() -> Callable[..., Config]:
    """Build the configuration of experts that say what their script says; each has its own name as dimension."""

    def build(base: str | None = None, **scripts: Script) -> Config:
        experts = [
            {
                "name": name,
                "provider": "scripted",
                "script": script,
                **({"base": True} if name == base else {"dimension": name}),
            }
            for name, script in scripts.items()
        ]
        return parse_config({"experts": experts, "cache": {"enabled": False}})

    return build


class StandIn:
    """A server with llama.cpp's routes whose tokens are bytes; every answer is "ok." until it is told to hang."""

    def __init__(self) -> None:
        self.config: Config
        self.conversations: list[Any] = []
        """What was rendered."""
        self.context = 1000
        """How many tokens a prompt may have."""
        self.hangs_after = 1000
        """How many pieces of an answer it gives before it hangs."""
        self.num_hanging = 0
        self.num_left = 0
        """How many requests were given up by the client while they hung."""
        self._changed = asyncio.Condition()

    async def wait_until(self, reached: Callable[[StandIn], bool]) -> None:
        """Return when `reached`; the test's own limit is a deadline against a defect."""
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: reached(self))

    async def reply(self, request: web.Request) -> web.Response:
        """Any route."""
        body = await request.json() if request.can_read_body else {}
        if request.path == "/tokenize":
            is_end = body["parse_special"] and body["content"] == "</s>"
            return web.json_response({"tokens": [256] if is_end else list(body["content"].encode())})
        if request.path == "/apply-template":
            self.conversations.append(body["messages"])
            lines = [f"{message['role']}: {message['content']}\n" for message in body["messages"]]
            return web.json_response({"prompt": "".join(lines)})
        if request.path != "/completion":
            return web.json_response({"eos_token": "</s>"})
        return await self._complete(body["prompt"])

    async def _complete(self, prompt: list[int]) -> web.Response:
        if len(prompt) > self.context:
            return web.json_response({"error": {"message": "exceeds the available context size"}}, status=400)
        position = prompt[::-1].index(ord("\n"))
        if position >= self.hangs_after:
            await self._hang()
        data = [b"ok."[position]] if position < 3 else []
        entry = {"id": data[0] if data else 256, "bytes": data, "logprob": -0.01}
        positions = [{**entry, "top_logprobs": [entry]}]
        return web.json_response({"tokens_evaluated": len(prompt), "completion_probabilities": positions})

    async def _hang(self) -> None:
        await self._count(hanging=1)
        try:
            await asyncio.Event().wait()
        finally:
            await self._count(hanging=-1, left=1)

    async def _count(self, *, hanging: int, left: int = 0) -> None:
        async with self._changed:
            self.num_hanging += hanging
            self.num_left += left
            self._changed.notify_all()


@asynccontextmanager
async def open_stand_in(*names: str) -> AsyncIterator[StandIn]:
    """Serve a stand-in for the experts `names` on loopback, in this event loop."""
    stand_in = StandIn()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", stand_in.reply)
    # A handler is cancelled when its client leaves: that is what the tests look at.
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        shared: dict[str, Any] = {"provider": "llamacpp", "base_url": f"http://127.0.0.1:{port}", "max_retries": 0}
        experts = [{"name": name, "dimension": name, **shared} for name in names]
        stand_in.config = parse_config({"experts": experts, "cache": {"enabled": False}})
        yield stand_in
    finally:
        await runner.cleanup()


@pytest.fixture
def stand_in_server() -> Callable[..., Any]:
    """`open_stand_in`, for tests that run a loop of their own."""
    return open_stand_in
