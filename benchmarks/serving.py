"""`mope-bb serve` against the library: what a token costs more through HTTP, and how many streams it carries at once.

CPU: experts that answer at once, so that only our own work is left; the CPU time of the server's process against that
of `Session.stream` in this one, with the client's work in neither. Streams: the zoo behind llama.cpp on the same
machine, 1, 8 and 32 answers at a time through the server, and in process; engine, server and client share its cores.
Pauses: a full garbage collection with a session open, in which nothing else runs, before and after `gc.freeze`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.claims import Claim, at_least, at_most, median_interval, rounded
from mope_bb.config import load_config
from mope_bb.session import Session, open_session
from mope_bb.zoo.demo import build_with_bar
from mope_bb.zoo.serving import serve_zoo
from tests.evidence import machine_facts, tell

NUM_TOKENS: Final = 1_500
NUM_ROUNDS: Final = 7
COUNTS: Final = (1, 8, 32)
STREAM_TOKENS: Final = 48
NUM_ANSWERS: Final = 64
"""Of each count in a round."""
QUESTION: Final = "How do I fix a bike?"
PREFERENCE: Final = "concise,friendly"


def main() -> None:
    """Measure and write the JSON beside this file."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        instant = Path(folder) / "instant.toml"
        instant.write_text(_instant_experts(), encoding="utf-8")
        cpu = asyncio.run(measure_cpu(str(instant)))
        with serve_zoo(build_with_bar()) as zoo:
            zoo.write_config(Path(folder) / "zoo.toml")
            streams = asyncio.run(measure_streams(str(Path(folder) / "zoo.toml")))
            pauses = asyncio.run(measure_pauses(str(Path(folder) / "zoo.toml")))
    results = {
        "command": "python -m benchmarks.serving",
        "machine": machine_facts(),
        "rounds": NUM_ROUNDS,
        "cpu_tokens": NUM_TOKENS,
        "stream_tokens": STREAM_TOKENS,
        "answers": NUM_ANSWERS,
        "cpu": cpu,
        "streams": streams,
        "pauses": pauses,
        "seconds": time.monotonic() - began,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def _instant_experts() -> str:
    step = json.dumps({"a": 0.5, "b": 0.3, "c": 0.2}).replace(":", " =")
    script = ", ".join([step] * NUM_TOKENS)
    tables = [
        f'[[experts]]\nname = "{name}"\ndimension = "{name}"\nprovider = "scripted"\nscript = [{script}]\n'
        for name in ("concise", "friendly")
    ]
    return "".join([*tables, f"[cache]\nenabled = false\n[server]\nmax_tokens = {NUM_TOKENS}\n"])


async def measure_cpu(config: str) -> dict[str, Any]:
    """Milliseconds of CPU for a token in process and through the server, and what the server adds."""
    in_process: list[float] = []
    served: list[float] = []
    async with serving(config) as (url, pid), open_session(load_config(config)) as session, _client() as client:
        for number in range(NUM_ROUNDS + 1):
            began = time.process_time()
            drawn = await _draw(session, NUM_TOKENS, number)
            here = 1e3 * (time.process_time() - began) / drawn
            before = _cpu_s(pid)
            drawn = await _ask(client, url, NUM_TOKENS, number)
            there = 1e3 * (_cpu_s(pid) - before) / drawn
            if number:  # the first round warms up
                in_process.append(here)
                served.append(there)
    found = {
        "in_process_ms": median_interval(in_process),
        "served_ms": median_interval(served),
        "added_ms": median_interval([there - here for there, here in zip(served, in_process, strict=True)]),
    }
    tell(f"CPU a token: {rounded(found, 3)}")
    return found


async def measure_streams(config: str) -> dict[str, Any]:
    """Tokens a second at each count, through the server and in process."""
    speeds: dict[tuple[int, str], list[float]] = {
        (count, side): [] for count in COUNTS for side in ("served", "library")
    }
    async with serving(config) as (url, _), open_session(load_config(config)) as session, _client() as client:
        sides: dict[str, Callable[[int], Awaitable[int]]] = {
            "served": lambda seed: _ask(client, url, STREAM_TOKENS, seed),
            "library": lambda seed: _draw(session, STREAM_TOKENS, seed),
        }
        for number in range(NUM_ROUNDS + 1):
            for count in COUNTS:
                # Which comes first changes from round to round.
                for side in sorted(sides, reverse=bool(number % 2)):
                    speed = await _speed(sides[side], count, first_seed=1_000 * number)
                    if number:
                        speeds[count, side].append(speed)
    return {
        str(count): {
            "served_tokens_per_s": median_interval(speeds[count, "served"]),
            "library_tokens_per_s": median_interval(speeds[count, "library"]),
            "served_to_library": _ratios(speeds[count, "served"], speeds[count, "library"]),
            "to_one_stream": _ratios(speeds[count, "served"], speeds[COUNTS[0], "served"]),
        }
        for count in COUNTS
    }


async def measure_pauses(config: str) -> dict[str, Any]:
    """Milliseconds of a full garbage collection behind eight answers: as it is, and as `mope-bb serve` lets it be."""
    async with open_session(load_config(config)) as session:

        async def collect(seed: int) -> float:
            answers = await asyncio.gather(
                *(session.complete(QUESTION, preference=PREFERENCE, seed=seed + place) for place in range(COUNTS[1]))
            )
            began = time.perf_counter()
            gc.collect()
            assert answers  # what they hold is looked through
            return 1e3 * (time.perf_counter() - began)

        await collect(0)
        whole = [await collect(100 * number) for number in range(NUM_ROUNDS)]
        gc.freeze()
        frozen = [await collect(100 * number) for number in range(NUM_ROUNDS)]
        gc.unfreeze()
    found = {
        "whole_ms": median_interval(whole),
        "frozen_ms": median_interval(frozen),
        "whole_to_frozen": _ratios(whole, frozen),
    }
    tell(f"A full garbage collection: {rounded(found, 3)}")
    return found


def _ratios(upper: list[float], lower: list[float]) -> dict[str, float]:
    return median_interval([one / other for one, other in zip(upper, lower, strict=True)])


async def _speed(answer: Callable[[int], Awaitable[int]], count: int, *, first_seed: int) -> float:
    """Tokens a second while `count` answers are under way until all are given."""
    seeds = iter(range(first_seed, first_seed + (NUM_ANSWERS if count > 1 else NUM_ANSWERS // 8)))

    async def one_after_the_other() -> int:
        return sum([await answer(seed) for seed in seeds])

    began = time.perf_counter()
    drawn = sum(await asyncio.gather(*(one_after_the_other() for _ in range(count))))
    return drawn / (time.perf_counter() - began)


async def _draw(session: Session, max_tokens: int, seed: int) -> int:
    stream = session.stream(QUESTION, preference=PREFERENCE, max_tokens=max_tokens, seed=seed)
    return len([token async for token in stream])


async def _ask(client: aiohttp.ClientSession, url: str, max_tokens: int, seed: int) -> int:
    body = {
        "model": f"mope:{PREFERENCE}",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": max_tokens,
        "seed": seed,
        "stream": True,
    }
    events = 0
    last = b""
    async with client.post(f"{url}/v1/chat/completions", json=body) as response:
        async for line in response.content:
            if line != b"\n":
                events, last = events + 1, line
    assert last == b"data: [DONE]\n", last
    return events - 2  # the role, and the end


def _client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


@asynccontextmanager
async def serving(config: str) -> AsyncIterator[tuple[str, int]]:
    """The address and process id of `mope-bb serve`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mope_bb", "serve", "-c", config, "--port", "0", "--no-log"), stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        yield line.removeprefix("Page: ").strip().rstrip("/"), process.pid
    finally:
        process.terminate()
        await process.wait()


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    streams = results["streams"]
    many = {count: found for count, found in streams.items() if count != "1"}
    return [
        at_most(0.3).claim("ms of CPU that serving adds to a token", {"": results["cpu"]["added_ms"]}),
        at_least(1.0).claim(
            "times the tokens a second of one stream", {count: found["to_one_stream"] for count, found in many.items()}
        ),
        at_least(0.7).claim(
            "of the library's tokens a second", {count: found["served_to_library"] for count, found in streams.items()}
        ),
        at_least(5.0).claim(
            "times shorter is a full garbage collection in the server", {"": results["pauses"]["whole_to_frozen"]}
        ),
    ]


if __name__ == "__main__":
    main()
