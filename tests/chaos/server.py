"""A server with bad days: an ASGI application that speaks the dialects of `tests.endpoints`, and llama.cpp's, over the
real distributions of a tiny model, with faults that replay from a seed.

An expert's address is `/DIALECT/LIFE` and the dialect's own path: `LIFE` is any word, by which a run tells its experts
apart. What shall go wrong is written to `/chaos/plan`, what was seen is read from `/chaos/seen`; see `Plan` and `Seen`.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast
from urllib.request import Request, urlopen

import orjson
import uvicorn
from aiohttp import web
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.chaos import llamacpp
from tests.chaos.damage import find_lists, ids_of
from tests.chaos.engine import QuickEngine
from tests.chaos.faults import FAULTS, Exchange
from tests.chaos.line import JSON, Line, Receive, Send
from tests.endpoints import stand_ins
from tests.endpoints.engine import StandIn
from tests.endpoints.stand_ins import MODEL
from tests.proxy import child

Scope = MutableMapping[str, Any]
ROUTES: Final = {**stand_ins.ROUTES, "llamacpp": llamacpp.ROUTES}
BASE_PATHS: Final = {"llamacpp": "", **stand_ins.BASE_PATHS}


@dataclass(frozen=True)
class Plan:
    """What goes wrong."""

    seed: int = 0
    rate: float = 0.0
    """Share of the requests that get a fault."""
    faults: tuple[str, ...] = tuple(FAULTS)
    num_tries: int | None = None
    """How many arrivals of one request may get a fault; None: all of them."""
    most_in_flight: int | None = None
    """A hidden limit: what comes on top is a 429 without a word about when to come again."""
    service_s: float = 0.0
    """How long an answer takes."""
    fault_of_life: Mapping[str, str] = field(default_factory=dict)
    """Life -> the fault of all its requests, whatever `rate` says, and of no other's; their `Seen.times` are kept."""

    def choose(self, life: str, key: str, arrival: int, exchange: Exchange) -> str | None:
        """The fault of the `arrival`-th arrival of a request, always the same one."""
        if self.num_tries is not None and arrival > self.num_tries:
            return None
        if self.fault_of_life:
            name = self.fault_of_life.get(life)
            return name if name is not None and FAULTS[name].needs <= exchange.features else None
        source = random.Random(f"{self.seed} {key} {arrival}")
        if source.random() >= self.rate:
            return None
        features = exchange.features
        names = [name for name in self.faults if FAULTS[name].needs <= features]
        weights = [FAULTS[name].weight for name in names]
        if not any(weights):
            weights = [1.0] * len(names)
        return source.choices(names, weights)[0] if names else None


@dataclass
class Seen:
    """What came, and what became of it, since the last plan."""

    num_requests: int = 0
    num_elsewhere: int = 0
    """Requests for an address that only a redirect names."""
    served: Counter[str] = field(default_factory=Counter)
    """Faults by name."""
    asked_again: Counter[str] = field(default_factory=Counter)
    """Questions for lists that came again after this fault."""
    waited_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """How long they took to come again, in all."""
    num_accepted: int = 0
    """Under a hidden limit: requests that were answered,"""
    num_rejected: int = 0
    """and those that were not."""
    busy_s: float = 0.0
    """Sum over the answered requests of the time that they took."""
    most_arrivals: int = 0
    """How often the question for lists came that came most often."""
    arrivals: Counter[str] = field(default_factory=Counter)
    """Life -> number of its requests, of those that `Plan.fault_of_life` names,"""
    failures: Counter[str] = field(default_factory=Counter)
    """how many of them had the fault,"""
    times: defaultdict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """and (arrival, end of the reply) of each, in seconds of a clock that only rises."""


@dataclass(frozen=True)
class _Good:
    """A reply without a fault."""

    status: int
    content: bytes
    has_lists: bool
    ids: frozenset[int]
    """See `ids_of`."""


@dataclass
class _Asked:
    """What is known of one request of one life."""

    num_arrivals: int = 0
    fault: str | None = None
    ended: float = 0.0


class ChaosServer:
    """The ASGI application."""

    def __init__(self, folder: Path) -> None:
        engine = QuickEngine(folder)
        self._stand_ins = {
            dialect: StandIn({MODEL: engine}, routes, faults=stand_ins.FAULTS.get(dialect, frozenset()))
            for dialect, routes in ROUTES.items()
        }
        self._good: dict[tuple[str, str, bytes], _Good] = {}
        self._asked: defaultdict[bytes, _Asked] = defaultdict(_Asked)
        self._shown: defaultdict[str, set[int]] = defaultdict(set)
        self._num_in_flight = 0
        self.plan = Plan()
        self.seen = Seen()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, well or badly."""
        content = b""
        while True:
            event = await receive()
            content += event.get("body", b"")
            if event["type"] == "http.disconnect" or not event.get("more_body"):
                break
        line = Line(scope["extensions"]["transport"], receive, send)
        if scope["path"].startswith("/chaos/"):
            await line.answer(200, JSON, self._control(scope["path"], content))
        else:
            await self._serve(line, scope, content)

    def _control(self, path: str, content: bytes) -> bytes:
        if path == "/chaos/plan":
            settings = orjson.loads(content)
            self.plan = Plan(**{**settings, "faults": tuple(settings.get("faults", FAULTS))})
            self.seen = Seen()
            self._asked.clear()
        return orjson.dumps(self.seen)

    async def _serve(self, line: Line, scope: Scope, content: bytes) -> None:
        began = time.monotonic()
        self.seen.num_requests += 1
        path: str = scope["path"]
        if path.startswith("/elsewhere/"):
            self.seen.num_elsewhere += 1
            path = path.removeprefix("/elsewhere")
        _, dialect, life, route = path.split("/", 3)
        good = self._answer(dialect, f"{scope['method']} /{route}", content)
        plan = self.plan
        if plan.most_in_flight is not None:
            await self._serve_within_limit(line, good)
            return
        if life in plan.fault_of_life:
            self.seen.arrivals[life] += 1
        key = hashlib.blake2b(f"{path} ".encode() + content, digest_size=12).digest()
        asked = self._asked[key]
        asked.num_arrivals += 1
        if good.has_lists:
            self.seen.most_arrivals = max(self.seen.most_arrivals, asked.num_arrivals)
        if asked.fault is not None and good.has_lists:
            self.seen.asked_again[asked.fault] += 1
            self.seen.waited_s[asked.fault] += began - asked.ended
        shown = self._shown[life]
        exchange = self._exchange(dialect, scope, route, content, good.ids & shown) if good.status == 200 else None
        name = None if exchange is None else plan.choose(life, key.hex(), asked.num_arrivals, exchange)
        asked.fault = name
        # Until the reply has ended; a client may come again before that, where it has waited long enough.
        asked.ended = began
        if name is None or exchange is None:
            await asyncio.sleep(plan.service_s)
            await line.answer(good.status, JSON, good.content)
            shown |= good.ids
        else:
            self.seen.served[name] += 1
            if life in plan.fault_of_life:
                self.seen.failures[life] += 1
            source = random.Random(f"{plan.seed} {key.hex()} {asked.num_arrivals} {name}")
            await FAULTS[name].act(line, exchange, source)
        asked.ended = time.monotonic()
        if life in plan.fault_of_life:
            self.seen.times[life].append((began, asked.ended))

    async def _serve_within_limit(self, line: Line, good: _Good) -> None:
        limit = self.plan.most_in_flight
        assert limit is not None
        if self._num_in_flight >= limit:
            self.seen.num_rejected += 1
            await line.answer(429, JSON, b'{"error": {"message": "too many requests"}}')
            return
        began = time.monotonic()
        self._num_in_flight += 1
        try:
            await asyncio.sleep(self.plan.service_s)
            await line.answer(good.status, JSON, good.content)
        finally:
            self._num_in_flight -= 1
            self.seen.num_accepted += 1
            self.seen.busy_s += time.monotonic() - began

    def _exchange(self, dialect: str, scope: Scope, route: str, content: bytes, shown: frozenset[int]) -> Exchange:
        def answer(body: Any) -> bytes:
            return self._answer(dialect, f"{scope['method']} /{route}", orjson.dumps(body) if content else b"").content

        query = scope["query_string"].decode()
        target = scope["path"] + (f"?{query}" if query else "")
        return Exchange(target, orjson.loads(content) if content else None, answer, bool(shown))

    def _answer(self, dialect: str, route: str, content: bytes) -> _Good:
        """The good reply; equal requests are answered once and for all."""
        known = (dialect, route, content)
        if known not in self._good:
            method, path = route.split()
            handler = ROUTES[dialect].get((method, path))
            if handler is None:
                return _Good(404, b'{"detail": "Not Found"}', has_lists=False, ids=frozenset())
            # No route that is used here looks at the request itself.
            request = cast("web.Request", None)
            status, reply = handler(self._stand_ins[dialect], orjson.loads(content) if content else {}, request)
            self._good[known] = _Good(status, orjson.dumps(reply), bool(find_lists(reply)), ids_of(reply))
        return self._good[known]


class _OpenProtocol(H11Protocol):
    """Hands its connection on to the application, so that faults can reach the socket."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        inner = self.app

        async def with_transport(scope: Any, receive: Any, send: Any) -> None:
            await inner({**scope, "extensions": {"transport": transport}}, receive, send)

        self.app = with_transport


@contextmanager
def running(app: ChaosServer) -> Iterator[str]:
    """Run `app` on a thread of its own, on a free port of loopback; gives its address."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        loop="asyncio",
        http=_OpenProtocol,
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=0,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the chaos server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def in_process(folder: Path) -> Iterator[str]:
    """Run it in a process of its own; gives its address."""
    with child("tests.chaos.server", {"folder": str(folder)}) as url:
        yield str(url)


def make_plan(url: str, plan: Plan) -> None:
    """From now on it goes by `plan`, and counts anew."""
    with urlopen(Request(f"{url}/chaos/plan", data=orjson.dumps(plan)), timeout=20):
        pass


def what_was_seen(url: str) -> Seen:
    """What it has seen since the last plan."""
    with urlopen(f"{url}/chaos/seen", timeout=20) as reply:
        found = orjson.loads(reply.read())
    counters = {name: Counter(found[name]) for name in ("served", "asked_again", "arrivals", "failures")}
    tables = {"waited_s": defaultdict(float, found["waited_s"]), "times": defaultdict(list, found["times"])}
    return Seen(**{**found, **counters, **tables})


def main() -> None:
    """Serve until standard input ends."""
    import torch

    torch.set_num_threads(1)
    order = orjson.loads(sys.stdin.readline())
    with running(ChaosServer(Path(order["folder"]))) as url:
        print(orjson.dumps(url).decode(), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
