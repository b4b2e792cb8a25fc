"""What stands in front of real expert servers: a proxy that counts, delays and damages what passes, for bad days only,
and one that gives them the pace of a GPU, for benchmarks. (`tests.relay` is a longer line to them.)
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

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
_NUM_PREDICTED: Final = re.compile(rb'"tokens_predicted":\s*(\d+)')
_STOPPED: Final = re.compile(rb'"stop":\s*true')


@dataclass(eq=False)
class GpuPace:
    """llama.cpp with the pace of a GPU's server: its own time counts, and what is missing is waited for.

    How many requests are under way makes no difference, as on a GPU that batches them.
    """

    targets: Mapping[str, str]
    """Name -> address of the real server."""
    token_s: float = 0.010
    """For each token that is generated."""
    pass_s: float = 0.012
    """For one pass over a draft or over several prompts, whatever their length."""
    port: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass one request on; the reply not before its time."""
        began = time.monotonic()
        name, path = request.match_info["name"], request.match_info["path"]
        body = await request.read()
        asked = orjson.loads(body) if path == "completion" else {}
        # llama.cpp hangs up after a stream, and on who was silent for a while, without saying so beforehand.
        headers = {"content-type": "application/json", "connection": "close"}
        async with request.app[SESSION].request(
            request.method, f"{self.targets[name]}/{path}", data=body, headers=headers
        ) as reply:
            if asked.get("stream") and reply.status == 200:
                return await self._stream(request, reply, began)
            data = await reply.read()
        if asked and reply.status == 200:
            await _sleep_until(began + self._seconds(asked, data))
        return web.Response(status=reply.status, body=data, content_type="application/json")

    def _seconds(self, asked: Any, reply: bytes) -> float:
        is_list = isinstance(asked["prompt"], list) and isinstance(asked["prompt"][0], list)
        if asked.get("grammar") or (is_list and asked["n_predict"] == 1):
            return self.pass_s
        # All prompts of a list run together: the longest answer says when the reply is whole.
        return self.token_s * max(int(number) for number in _NUM_PREDICTED.findall(reply))

    async def _stream(self, request: web.Request, reply: aiohttp.ClientResponse, began: float) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        num_tokens = 0
        async for line in reply.content:
            # The last event has no token of its own.
            if line.startswith(b"data: ") and not _STOPPED.search(line):
                num_tokens += 1
                await _sleep_until(began + num_tokens * self.token_s)
            await response.write(line)
        return response


async def _sleep_until(deadline: float) -> None:
    await asyncio.sleep(max(0.0, deadline - time.monotonic()))


class Front(Protocol):
    """What `running` runs."""

    port: int

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""


F = TypeVar("F", bound=Front)


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
def running(proxy: F, *, cancels: bool = False) -> Iterator[F]:
    """Run `proxy` on a thread of its own, on a free port of loopback.

    `cancels`: what the client gives up is given up on the real server as well.
    """
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app[SESSION] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        app.router.add_route("*", "/{name}/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=cancels)
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
    with child("tests.proxy", {"targets": dict(targets), "latency": latency}) as port:
        yield lambda name: f"http://127.0.0.1:{port}/{name}"


@contextmanager
def paced_as_gpu(targets: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A `GpuPace` in a process of its own; gives name -> address."""
    with child("tests.proxy", {"targets": dict(targets)}) as port:
        yield {name: f"http://127.0.0.1:{port}/{name}" for name in targets}


@contextmanager
def child(module: str, order: Mapping[str, Any]) -> Iterator[Any]:
    """`module` in a process of its own, until the block is left; gives its answer to `order`, both a line of JSON."""
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


def main() -> None:
    """Serve until standard input ends."""
    order = json.loads(sys.stdin.readline())
    if "latency" in order:
        _serve(Proxy(order["targets"], delay=heavy_tail(**order["latency"])))
    else:
        _serve(GpuPace(order["targets"]), cancels=True)


def _serve(proxy: Front, *, cancels: bool = False) -> None:
    with running(proxy, cancels=cancels):
        print(proxy.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
