"""A proxy in front of real expert servers: it counts, delays and damages what passes. A stand-in for bad days only."""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import orjson
from aiohttp import web

FAULTS: Final = ("500", "reset", "garbage", "hang")
Delay = Callable[[random.Random, Any], float]
"""From a generator and the request's body to seconds."""


def no_delay(rng: random.Random, body: Any) -> float:
    """At once."""
    return 0.0


@dataclass(eq=False)
class Proxy:
    """What the proxy does, and what it has seen. Its settings may be changed while it runs."""

    targets: Mapping[str, str]
    """Name -> address of the real server."""
    seed: int = 0
    fault_rate: float = 0.0
    """Share of the next-token requests that fail, each in one of the ways of `faults`."""
    faults: tuple[str, ...] = FAULTS
    delay: Delay = no_delay
    port: int = 0
    num_requests: int = 0
    """Next-token requests."""
    num_faults: Counter[str] = field(default_factory=Counter)
    questions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(Name, prompt ids as text) -> how often it was answered."""

    def url(self, name: str) -> str:
        """The address by which `name` is reached through the proxy."""
        return f"http://127.0.0.1:{self.port}/{name}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass one request on, or not."""
        name, path = request.match_info["name"], request.match_info["path"]
        body = await request.read()
        if path == "completion":
            self.num_requests += 1
            rng = random.Random(f"{self.seed} {self.num_requests}")
            fault = rng.choice(self.faults) if rng.random() < self.fault_rate else None
            content = orjson.loads(body)
            if fault is not None:
                self.num_faults[fault] += 1
                return await self._fail(request, fault)
            await asyncio.sleep(self.delay(rng, content))
        try:
            status, data = await self._forward(request, f"{self.targets[name]}/{path}", body)
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=str(error))
        if path == "completion" and status == 200:
            prompts = content["prompt"] if isinstance(content["prompt"][0], list) else [content["prompt"]]
            self.questions.update((name, str(prompt)) for prompt in prompts)
        return web.Response(status=status, body=data, content_type="application/json")

    async def _forward(self, request: web.Request, url: str, body: bytes) -> tuple[int, bytes]:
        async with request.app[SESSION].request(
            request.method, url, data=body, headers={"content-type": "application/json"}
        ) as reply:
            return reply.status, await reply.read()

    async def _fail(self, request: web.Request, fault: str) -> web.StreamResponse:
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset" and request.transport is not None:
            request.transport.abort()
        if fault == "garbage":
            return web.Response(
                body=b'{"completion_probabilities": [{"top_logprobs": [{"id"', content_type="application/json"
            )
        return web.Response(status=500, text="out of order")


SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("session")


def heavy_tail(median_s: float, sigma: float, *, slow_share: float = 0.0, slow_factor: float = 20.0) -> Delay:
    """Lognormal delays, of a request; `slow_factor` times as long for a share of the prompts, always the same ones."""

    def delay(rng: random.Random, body: Any) -> float:
        seconds = median_s * math.exp(sigma * rng.gauss(0.0, 1.0))
        prompt = body["prompt"][0] if isinstance(body["prompt"][0], list) else body["prompt"]
        # The first ids hold the template and the question, never the answer.
        is_slow = random.Random(str(prompt[:20])).random() < slow_share
        return seconds * slow_factor if is_slow else seconds

    return delay


@contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """Run `proxy` on a thread of its own, on a free port of loopback."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app[SESSION] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        app.router.add_route("*", "/{name}/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", proxy.port)
        await site.start()
        proxy.port = runner.addresses[0][1]
        return runner

    async def serve() -> None:
        runner = await start()
        stopped = asyncio.Event()
        stops.append(lambda: loop.call_soon_threadsafe(stopped.set))
        ready.set()
        await stopped.wait()
        await runner.app[SESSION].close()
        await runner.cleanup()
        # Those that hang on purpose.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    stops: list[Callable[[], Any]] = []
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield proxy
    finally:
        stops[0]()
        thread.join(20)
        loop.close()


@contextmanager
def in_process(targets: Mapping[str, str], **latency: float) -> Iterator[Callable[[str], str]]:
    """A proxy with `heavy_tail` delays in a process of its own; gives name -> address."""
    order = json.dumps({"targets": dict(targets), "latency": latency})
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.proxy"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(order + "\n")
        child.stdin.flush()
        port = int(child.stdout.readline())
        yield lambda name: f"http://127.0.0.1:{port}/{name}"
    finally:
        child.stdin.close()
        child.wait(20)


def main() -> None:
    """Serve until standard input ends."""
    order = json.loads(sys.stdin.readline())
    with running(Proxy(order["targets"], delay=heavy_tail(**order["latency"]))) as proxy:
        print(proxy.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
