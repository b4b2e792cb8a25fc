"""A stand-in for llama.cpp whose later answers wait at a gate: what is computed when, and for whom, can be seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from mope_bb.config import Config, parse_config

ANSWER = b"ok, I will."


class Gated:
    """Tokens are bytes; it says `ANSWER`. Questions from `closes_after` on wait until the gate opens."""

    def __init__(self) -> None:
        self.config: Config
        self.closes_after = 1_000
        """How many pieces of an answer it gives at once."""
        self.fails_after = 1_000
        """How many it gives before it answers 500."""
        self.context = 1_000
        """How many tokens a prompt may have."""
        self.conversations: list[Any] = []
        """What was rendered."""
        self.num_asked = 0
        """Questions for a next token."""
        self.num_waiting = 0
        """Of these, at the gate."""
        self.num_left = 0
        """Of these, given up by who asked."""
        self._gate = asyncio.Event()
        self._changed = asyncio.Condition()

    def open_gate(self) -> None:
        """Let all through."""
        self._gate.set()

    async def wait_until(self, reached: Callable[[Gated], bool]) -> None:
        """Return when `reached`; the limit is a deadline against a defect."""
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
        await self._count(asked=1)
        if position >= self.fails_after:
            return web.json_response({"error": {"message": "out of order"}}, status=500)
        if position >= self.closes_after:
            await self._count(waiting=1)
            try:
                await self._gate.wait()
            except asyncio.CancelledError:
                await self._count(left=1)
                raise
            finally:
                await self._count(waiting=-1)
        data = [ANSWER[position]] if position < len(ANSWER) else []
        entry = {"id": data[0] if data else 256, "bytes": data, "logprob": -0.01}
        positions = [{**entry, "top_logprobs": [entry]}]
        return web.json_response({"tokens_evaluated": len(prompt), "completion_probabilities": positions})

    async def _count(self, *, asked: int = 0, waiting: int = 0, left: int = 0) -> None:
        async with self._changed:
            self.num_asked += asked
            self.num_waiting += waiting
            self.num_left += left
            self._changed.notify_all()


@asynccontextmanager
async def open_gated(*names: str, mode: str = "lockstep", **server: Any) -> AsyncIterator[Gated]:
    """Serve it for the experts `names` on loopback, in this event loop; `server` are settings of `[server]`."""
    gated = Gated()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", gated.reply)
    # A handler is cancelled when its client leaves: that is what the tests look at.
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        shared: dict[str, Any] = {
            "provider": "llamacpp",
            "base_url": f"http://127.0.0.1:{runner.addresses[0][1]}",
            "max_retries": 0,
        }
        gated.config = parse_config(
            {
                "experts": [{"name": name, "dimension": name, **shared} for name in names],
                "cache": {"enabled": False},
                "decoding": {"mode": mode},
                "server": server,
            }
        )
        yield gated
    finally:
        gated.open_gate()
        await runner.cleanup()
