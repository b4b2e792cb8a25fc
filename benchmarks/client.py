"""The HTTP client beside bare aiohttp, on a loopback server in a process of its own that answers after 100 ms.

Four sides take turns in every round, each with the same question of 300 ids and the same reply of the 20 best tokens:

- `bare`: aiohttp's session, orjson both ways; no deadline, retry, limit or error mapping.
- `client`: `HttpClient.post_json`, with all of these; from a dictionary to a dictionary, as `bare`.
- `parsed`: the same, and the reply made into a checked `TokenDistribution`, which `bare` leaves to its caller.
- `expert`: `LlamaCppExpert.ask`, from ids to that distribution: what is asked for each token of an answer.

CPU seconds are those of this process alone, without torch: its many objects would make Python's garbage collection
dearer, for all sides. Times over the server's 100 ms include what the server itself is late by.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from benchmarks.canned_server import END_ID, NUM_IDS, build_reply
from benchmarks.claims import Claim, at_least, at_most, median_interval, rounded
from mope_bb.config import parse_config
from mope_bb.providers.llamacpp import LlamaCppExpert, open_expert
from mope_bb.providers.llamacpp_wire import build_request, parse_response
from mope_bb.transport import HttpClient
from mope_bb.types import TokenDistribution
from tests.proxy import child

DELAY_S: Final = 0.1
TOP_K: Final = 20
IDS: Final = tuple(range(1000, 1000 + NUM_IDS))
NUM_ROUNDS: Final = 7
BUSY: Final = 256
"""Calls in flight where CPU time is measured,"""
CALM: Final = 64
"""and where latency is: once in step, so that 64 replies come at the same moment, and once spread evenly."""
NUM_QUEUED: Final = 4096
NUM_SOAKED: Final = 100_000
NUM_WARM_UP: Final = 10_000
"""Calls before memory is looked at: pools fill and caches settle."""
Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side did in one round."""

    seconds: float
    cpu_seconds: float
    latencies_s: list[float]

    def per_cpu_second(self) -> float:
        """Calls for each second of this process's CPU."""
        return len(self.latencies_s) / self.cpu_seconds

    def overhead_ms(self, quantile: int) -> float:
        """Time over the server's own delay at this percentile."""
        return 1000 * (statistics.quantiles(self.latencies_s, n=100)[quantile - 1] - DELAY_S)


def main() -> None:
    """Measure and write the JSON beside this file."""
    with child("benchmarks.canned_server", {"delay_s": DELAY_S}) as port:
        busy, calm, queued = asyncio.run(measure_speed(f"http://127.0.0.1:{port}"))
    with child("benchmarks.canned_server", {"delay_s": 0.0}) as port:
        memory = asyncio.run(measure_memory(f"http://127.0.0.1:{port}"))
    from tests.evidence import machine_facts  # noqa: PLC0415  # it imports torch

    results = {
        "command": "python -m benchmarks.client",
        "machine": machine_facts() | {"aiohttp": aiohttp.__version__},
        "delay_s": DELAY_S,
        "num_ids": NUM_IDS,
        "reply_bytes": len(build_reply()),
        "rounds": NUM_ROUNDS,
        f"in_flight_{BUSY}": busy,
        f"in_flight_{CALM}": calm,
        f"queued_{NUM_QUEUED}": queued,
        "memory": memory,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


async def measure_speed(url: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """CPU time with many calls in flight, latency with fewer, and what becomes of many at once."""
    async with sides(url) as calls:
        busy: dict[str, list[Turn]] = {name: [] for name in calls}
        in_step: dict[str, list[Turn]] = {name: [] for name in calls}
        spread: dict[str, list[Turn]] = {name: [] for name in calls}
        names = list(calls)
        for number in range(NUM_ROUNDS):
            # Another one begins each round.
            names = [*names[1:], names[0]]
            for name in names:
                # Connections that nobody used for some seconds were closed.
                await drive(calls[name], in_flight=BUSY, num_calls=BUSY)
                busy[name].append(await drive(calls[name], in_flight=BUSY, num_calls=8 * BUSY))
                in_step[name].append(await drive(calls[name], in_flight=CALM, num_calls=12 * CALM))
                spread[name].append(await drive(calls[name], in_flight=CALM, num_calls=12 * CALM, spread_s=DELAY_S))
            tell(f"round {number}: " + ", ".join(f"{name} {busy[name][-1].per_cpu_second():.0f}/s" for name in calls))
    queued = [await queue_up(url) for _ in range(NUM_ROUNDS)]
    tell(f"{NUM_QUEUED} at once: {queued[-1]}")
    calm = {"in_step": latency_facts(in_step), "spread": latency_facts(spread)}
    return cpu_facts(busy), calm, {key: [one[key] for one in queued] for key in queued[0]}


@asynccontextmanager
async def sides(url: str) -> AsyncIterator[dict[str, Call]]:
    """What is compared, by name: one call of each."""
    expert = open_canned(url)
    body = build_request([IDS], top_k=TOP_K, forced_id=13)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=BUSY)) as session,
        HttpClient(url, provider="llamacpp", expert="client") as client,
    ):

        async def bare() -> object:
            headers = {"content-type": "application/json"}
            async with session.post(f"{url}/completion", data=orjson.dumps(body), headers=headers) as response:
                return orjson.loads(await response.read())

        async def parsed() -> TokenDistribution:
            return parse_response(
                await client.post_json("/completion", body),
                num_ids=NUM_IDS,
                top_k=TOP_K,
                end_ids={END_ID},
                vocab_size=32000,
                expert="client",
            )

        try:
            yield {
                "bare": bare,
                "client": lambda: client.post_json("/completion", body),
                "parsed": parsed,
                "expert": lambda: expert.ask(IDS, TOP_K),
            }
        finally:
            await expert.aclose()


def open_canned(url: str) -> LlamaCppExpert:
    """The adapter, which sends each question on its own."""
    table = {"name": "expert", "provider": "llamacpp", "base_url": url, "max_prompts": 1}
    return open_expert(parse_config({"experts": [table]}).experts[0], None)


async def drive(call: Call, *, in_flight: int, num_calls: int, spread_s: float = 0.0) -> Turn:
    """`num_calls` calls, so many at a time, whose callers begin evenly over `spread_s`."""
    latencies_s: list[float] = []
    numbers = iter(range(num_calls))

    async def work(place: int) -> None:
        if spread_s:
            await asyncio.sleep(spread_s * place / in_flight)
        for _ in numbers:
            began = time.perf_counter()
            await call()
            latencies_s.append(time.perf_counter() - began)

    began, cpu_began = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(work, range(in_flight)))
    return Turn(time.perf_counter() - began, time.process_time() - cpu_began, latencies_s)


async def queue_up(url: str) -> dict[str, Any]:
    """All calls at once on a client with the default settings that has no connection yet."""
    async with HttpClient(url, provider="llamacpp", expert="client") as client:
        body = build_request([IDS], top_k=TOP_K, forced_id=13)
        began = time.perf_counter()
        found = await asyncio.gather(
            *(client.post_json("/completion", body) for _ in range(NUM_QUEUED)), return_exceptions=True
        )
        return {
            "failures": sum(isinstance(one, BaseException) for one in found),
            "retries": client.num_requests - NUM_QUEUED,
            "seconds": time.perf_counter() - began,
        }


def cpu_facts(turns: Mapping[str, list[Turn]]) -> dict[str, Any]:
    """Calls per second and per CPU second of each side, and their ratios to `bare`, round by round."""
    per_cpu = {name: [turn.per_cpu_second() for turn in found] for name, found in turns.items()}
    return {
        "per_cpu_second": {name: median_interval(values) for name, values in per_cpu.items()},
        "per_second": {
            name: statistics.median(len(turn.latencies_s) / turn.seconds for turn in found)
            for name, found in turns.items()
        },
        "ratio_to_bare": {
            name: median_interval([value / bare for value, bare in zip(values, per_cpu["bare"], strict=True)])
            for name, values in per_cpu.items()
            if name != "bare"
        },
    }


def latency_facts(turns: Mapping[str, list[Turn]]) -> dict[str, Any]:
    """Milliseconds over the server's delay."""
    return {
        f"p{quantile}_overhead_ms": {
            name: median_interval([turn.overhead_ms(quantile) for turn in found]) for name, found in turns.items()
        }
        for quantile in (50, 99)
    }


async def measure_memory(url: str) -> dict[str, Any]:
    """Resident memory while the adapter answers question after question."""
    expert = open_canned(url)
    try:
        await drive(lambda: expert.ask(IDS, TOP_K), in_flight=CALM, num_calls=NUM_WARM_UP)
        seen = [(0, resident_mib())]
        step = NUM_SOAKED // 20
        for number in range(20):
            await drive(lambda: expert.ask(IDS, TOP_K), in_flight=CALM, num_calls=step)
            gc.collect()
            seen.append(((number + 1) * step, resident_mib()))
    finally:
        await expert.aclose()
    slope = statistics.linear_regression(*zip(*seen, strict=True)).slope
    tell(f"memory: {seen[0][1]:.1f} MiB, {seen[-1][1]:.1f} MiB after {NUM_SOAKED} calls")
    return {
        "calls": NUM_SOAKED,
        "mib_at_first": seen[0][1],
        "mib_at_last": seen[-1][1],
        "mib_per_100000_calls": 100_000 * slope,
    }


def tell(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def resident_mib() -> float:
    """Memory of this process that is in use now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    calm, queued = results[f"in_flight_{CALM}"], results[f"queued_{NUM_QUEUED}"]
    found = [
        at_least(0.6).claim(
            f"calls per CPU second beside bare aiohttp, {BUSY} in flight", results[f"in_flight_{BUSY}"]["ratio_to_bare"]
        )
    ]
    for way, words in (("spread", "spread evenly"), ("in_step", "in step")):
        overheads = calm[way]["p99_overhead_ms"]
        found.append(
            at_most(15).claim(
                f"ms over the server's {1000 * DELAY_S:.0f} at the 99th percentile, {CALM} in flight {words}",
                {name: one for name, one in overheads.items() if name != "bare"},
            )
        )
    failed, mib = float(max(queued["failures"])), results["memory"]["mib_per_100000_calls"]
    return [
        *found,
        at_most(0).claim(f"of {NUM_QUEUED} calls queued at once that failed", {"": {"value": failed}}),
        at_most(1).claim("MiB more after 100,000 calls", {"": {"value": mib}}),
    ]


if __name__ == "__main__":
    main()
