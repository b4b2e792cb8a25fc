"""Ways of decoding side by side: the tiny zoo behind the real llama.cpp server, temperature 1, trained PCMs.

In three places: servers on this machine ("here"), the same 20 ms away each way ("far"), and 1 ms away with the pace of
a GPU ("gpu", `tests.proxy.GpuPace`), where an expert's own plain stream is measured beside. In every round each mode
answers the same questions, in random order; a ratio is that of one round, and its interval a bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import aiohttp
import torch

from benchmarks.claims import Claim, at_least, at_most, median_interval, ratio_interval, rounded, show
from mope_bb.config import parse_config
from mope_bb.session import Session, open_session
from mope_bb.types import Effort
from mope_bb.zoo.demo import build_with_bar
from mope_bb.zoo.judging import zoo_prompts
from mope_bb.zoo.serving import ZooServer, serve_zoo
from tests.evidence import machine_facts, tell
from tests.proxy import paced_as_gpu
from tests.relay import delayed

RULES: Final = ("product", "linear")
MODES: Final = ("lockstep", "lookahead", "draft", "auto")
PREFERENCES: Final = ("concise,technical,grumpy", "simple,friendly")
NUM_ROUNDS: Final = 5
MAX_TOKENS: Final = 96
AT_ONCE: Final = 16
NUM_ALONE: Final = 4
"""Answers of a turn, one after the other."""
NUM_TOGETHER: Final = 24
"""Answers of a turn of `AT_ONCE`: more than may be under way, so that the last alone do not say how long it took."""
NUM_WARM_UP: Final = 4
"""Answers of each mode that are not counted, one after the other; then, of `AT_ONCE`, a whole turn."""
FAR_S: Final = 0.020
NEAR_S: Final = 0.001
TRAIN_MINUTES: Final = 2.0
Task = tuple[str, str]
"""A question and a preference."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one mode did in one round."""

    seconds: float
    num_tokens: int
    effort: Effort

    @property
    def seconds_per_token(self) -> float:
        """Of all answers together."""
        return self.seconds / self.num_tokens


def main() -> None:
    """Measure and write the JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for rule in RULES:
        parser.add_argument(f"--{rule}", type=Path, help=f"a PCM trained for the {rule} rule; default: one is trained")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    zoo = build_with_bar()
    with tempfile.TemporaryDirectory() as folder:
        pcms = {rule: str(getattr(chosen, rule) or train_pcm(rule, Path(folder))) for rule in RULES}
        began = time.monotonic()
        with serve_zoo(zoo) as server, places(server) as found:
            rules = {rule: asyncio.run(measure_rule(server, pcm, found)) for rule, pcm in pcms.items()}
    results = {
        "command": "python -m benchmarks.decoding",
        "machine": machine_facts(),
        "num_rounds": NUM_ROUNDS,
        "num_warm_up": NUM_WARM_UP,
        "max_tokens": MAX_TOKENS,
        "rules": rules,
        "seconds": time.monotonic() - began,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def train_pcm(rule: str, folder: Path) -> Path:
    """A briefly trained PCM: an untrained one gives the user's own weights, whose experts agree differently."""
    out = folder / rule
    options = ["--merge", rule, "--max-minutes", str(TRAIN_MINUTES), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "mope_bb", "train", *options], check=True, stdout=subprocess.DEVNULL)
    return out / "checkpoints" / "last"


@contextmanager
def places(server: ZooServer) -> Iterator[dict[str, dict[str, str]]]:
    """Place -> expert -> address. Here no proxy is on the way, whose work would count against whoever asks more."""
    here = dict(server.base_urls)
    with ExitStack() as stack:
        far = stack.enter_context(delayed(here, FAR_S))
        gpu = stack.enter_context(delayed(stack.enter_context(paced_as_gpu(here)), NEAR_S))
        yield {"here": here, "far": far, "gpu": gpu}


async def measure_rule(
    server: ZooServer, pcm: str, found: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Every regime with one PCM."""
    results = {}
    for place, urls in found.items():
        async with open_sessions(server, pcm, urls) as sessions:
            questions = unseen_questions()
            warm_up = take(questions, NUM_WARM_UP)
            for session in sessions.values():
                await answer(session, warm_up)
            tell(f"{Path(pcm)}, {place}")
            plain = PlainStream(urls) if place == "gpu" else None
            results[f"{place}, one at a time"] = await measure(sessions, questions, plain=plain)
            if place != "gpu":
                results[f"{place}, {AT_ONCE} at once"] = await measure(sessions, questions, at_once=AT_ONCE)
    return results


@asynccontextmanager
async def open_sessions(server: ZooServer, pcm: str, urls: Mapping[str, str]) -> AsyncIterator[dict[str, Session]]:
    """A session for each mode: each learns its own pace."""
    data = server.config_data()
    data["experts"] = [{**one, "base_url": urls[one["name"]]} for one in data["experts"]]
    data["pcm"]["path"] = pcm
    async with AsyncExitStack() as stack:
        yield {
            mode: await stack.enter_async_context(open_session(parse_config({**data, "decoding": {"mode": mode}})))
            for mode in MODES
        }


async def measure(
    sessions: Mapping[str, Session], questions: Iterator[str], *, at_once: int = 1, plain: PlainStream | None = None
) -> dict[str, Any]:
    """One regime: rounds of turns."""
    order, rng = [*MODES, *(("plain",) if plain else ())], random.Random(0)
    turns: dict[str, list[Turn]] = {name: [] for name in order}
    size = NUM_ALONE if at_once == 1 else NUM_TOGETHER
    if at_once > 1:
        warm_up = take(questions, size)
        for session in sessions.values():
            await answer(session, warm_up, at_once)
    for _ in range(NUM_ROUNDS):
        chosen = take(questions, size)
        rng.shuffle(order)
        for name in order:
            turn = plain.turn(chosen) if plain and name == "plain" else answer(sessions[name], chosen, at_once)
            turns[name].append(await turn)
    found = {name: describe(turns[name], turns["lockstep"]) for name in turns}
    if plain is not None:
        for name in MODES:
            found[name]["time_against_plain"] = ratios(turns[name], turns["plain"])
    for name, facts in found.items():
        shown = ("ms_per_token", "speedup", "round_trips_per_token", "generated_per_token")
        tell(f"  {name}: " + ", ".join(f"{figure} {show(facts[figure])}" for figure in shown))
    return found


def describe(turns: Sequence[Turn], lockstep: Sequence[Turn]) -> dict[str, Any]:
    """What a mode took, and how it compares with lockstep in the same rounds."""
    extra = [ours.seconds_per_token - theirs.seconds_per_token for ours, theirs in zip(turns, lockstep, strict=True)]

    def share(part: str, whole: str | None = None) -> dict[str, float]:
        wholes = [one.num_tokens if whole is None else getattr(one.effort, whole) for one in turns]
        return ratio_interval([getattr(one.effort, part) for one in turns], wholes)

    return {
        "num_tokens": sum(one.num_tokens for one in turns),
        "ms_per_token": median_interval([1000 * one.seconds_per_token for one in turns]),
        "speedup": ratios(lockstep, turns),
        "extra_ms_per_token": median_interval([1000 * seconds for seconds in extra]),
        "round_trips_per_token": share("num_round_trips"),
        "generated_per_token": share("num_generated"),
        "scored_per_token": share("num_scored"),
        "accepted": share("num_accepted", "num_drafted") if all(one.effort.num_drafted for one in turns) else None,
    }


def ratios(some: Sequence[Turn], others: Sequence[Turn]) -> dict[str, float]:
    """Seconds per token of `some` for one of `others`, round by round."""
    return median_interval(
        [one.seconds_per_token / other.seconds_per_token for one, other in zip(some, others, strict=True)]
    )


def unseen_questions() -> Iterator[str]:
    """Questions that no expert was trained on. No session is asked one twice in the same way, as users do not: that a
    prompt has to be rendered is part of the time."""
    return (messages[-1].content for messages in zoo_prompts(held_out=True))


def take(questions: Iterator[str], num_answers: int) -> list[Task]:
    """The next questions, each for every preference."""
    chosen = [next(questions) for _ in range(num_answers // len(PREFERENCES))]
    return [(question, preference) for question in chosen for preference in PREFERENCES]


async def answer(session: Session, chosen: Sequence[Task], at_once: int = 1) -> Turn:
    """Answer `chosen`, so many at a time."""
    room = asyncio.Semaphore(at_once)

    async def one(question: str, preference: str) -> tuple[int, Effort]:
        async with room:
            found = await session.complete(question, preference=preference, max_tokens=MAX_TOKENS)
        return len(found.steps), found.effort

    began = time.perf_counter()
    answers = await asyncio.gather(*(one(*task) for task in chosen))
    seconds = time.perf_counter() - began
    efforts = [asdict(effort) for _, effort in answers]
    return Turn(
        seconds,
        sum(num_tokens for num_tokens, _ in answers),
        Effort(**{name: sum(effort[name] for effort in efforts) for name in efforts[0]}),
    )


class PlainStream:
    """One expert alone as any client of llama.cpp has it, template and stream: the measure of merged tokens."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        self._urls = cycle(urls[name] for name in PREFERENCES[0].split(","))

    async def turn(self, chosen: Sequence[Task]) -> Turn:
        """The same questions to the experts of the first preference, one after the other."""
        seconds, num_tokens = 0.0, 0
        async with aiohttp.ClientSession() as client:
            for question, _ in chosen:
                url = next(self._urls)
                began = time.perf_counter()
                asked = {"messages": [{"role": "user", "content": question}]}
                async with client.post(f"{url}/apply-template", json=asked) as reply:
                    prompt = (await reply.json())["prompt"]
                num_tokens += await self._stream(client, url, prompt)
                seconds += time.perf_counter() - began
        return Turn(seconds, num_tokens, Effort())

    async def _stream(self, client: aiohttp.ClientSession, url: str, prompt: str) -> int:
        """The number of its tokens."""
        body = {"prompt": prompt, "n_predict": MAX_TOKENS, "temperature": 1.0, "stream": True}
        # llama.cpp hangs up after a stream: the connection is not to be used again.
        async with client.post(f"{url}/completion", json=body, headers={"connection": "close"}) as reply:
            events = [json.loads(line[6:]) async for line in reply.content if line.startswith(b"data: ")]
        found: int = events[-1]["tokens_predicted"]
        return found


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say, rule by rule."""
    rules = results["rules"]

    def of(regime: str, mode: str, figure: str) -> dict[str, dict[str, float]]:
        return {rule: regimes[regime][mode][figure] for rule, regimes in rules.items()}

    def best(regime: str) -> dict[str, dict[str, float]]:
        speedups = {
            rule: {mode: regimes[regime][mode]["speedup"] for mode in MODES[1:]} for rule, regimes in rules.items()
        }
        names = {rule: max(found, key=lambda mode: found[mode]["value"]) for rule, found in speedups.items()}
        return {f"{rule} {mode}": speedups[rule][mode] for rule, mode in names.items()}

    far = "far, one at a time"
    found = [
        at_most(0.25).claim("round trips per token, lookahead", of(far, "lookahead", "round_trips_per_token")),
        at_most(0.20).claim("round trips per token, draft", of(far, "draft", "round_trips_per_token")),
        at_most(1.5).claim("generated per kept token, draft", of(far, "draft", "generated_per_token")),
    ]
    for regime in regimes_of(results):
        if regime.startswith("here"):
            found.append(at_least(2).claim(f"times lockstep's speed, best mode, {regime}", best(regime)))
        if regime.startswith("far"):
            found.append(at_least(4).claim(f"times lockstep's speed, draft, {regime}", of(regime, "draft", "speedup")))
            speedups = of(regime, "lookahead", "speedup")
            found.append(at_least(3).claim(f"times lockstep's speed, lookahead, {regime}", speedups))
    for regime in regimes_of(results):
        extra = of(regime, "auto", "extra_ms_per_token")
        is_met = all(one["low"] < 0 for one in extra.values())
        shown = ", ".join(f"{rule} {show(one)}" for rule, one in extra.items())
        found.append(Claim(f"ms per token, auto minus lockstep, {regime}", shown, "interval below 0", is_met))
    for mode in ("draft", "auto"):
        times = of("gpu, one at a time", mode, "time_against_plain")
        found.append(at_most(1.5).claim(f"time of a token, {mode}, against one expert's own stream", times))
    return found


def regimes_of(results: Mapping[str, Any]) -> list[str]:
    """Place and number of answers at once."""
    return list(next(iter(results["rules"].values())))


if __name__ == "__main__":
    main()
