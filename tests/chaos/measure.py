"""Very many calls through the real adapters on a bad day: what came back, and what it cost."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from mope_bb.errors import MopeError
from mope_bb.providers.base import Expert
from mope_bb.providers.endpoint import WireExpert
from mope_bb.providers.registry import open_expert
from mope_bb.types import Piece, TokenDistribution
from tests.chaos.faults import FAULTS
from tests.chaos.server import Plan, make_plan, what_was_seen
from tests.chaos.truth import DIALECTS, Question, Truth

SETTINGS: Final = {"timeout_s": 6.0, "attempt_timeout_s": 1.5, "max_retries": 4}
SLACK_S: Final = 1.0
"""A call that takes longer than its deadline by more than this hangs, the time left out in which this process stood
still, as on a busy machine."""
LONGEST_S: Final = 30.0
"""So long it is looked at, beside its deadline."""
TICK_S: Final = 0.05
MOST_TOGETHER: Final = 5
NUM_TOLD: Final = 10
"""Of what went wrong so many are told in full."""
NUM_SET_UPS: Final = 5
NUM_REQUESTS: Final = {"prepare": 2, "next": 1, "score": 1, "draft": 2}
"""How many requests of a call may come one after the other, each with its deadline."""


@dataclass
class Outcomes:
    """What became of the calls."""

    num_calls: int = 0
    right: int = 0
    short: int = 0
    """Right as far as they go, with fewer pieces than were asked for."""
    errors: Counter[str] = field(default_factory=Counter)
    """Typed errors by class."""
    num_wrong: int = 0
    num_untyped: int = 0
    """Exceptions that are none of ours."""
    num_hangs: int = 0
    told: list[str] = field(default_factory=list)
    """The first of what must not happen."""
    longest_s: dict[str, float] = field(default_factory=dict)
    """By kind of call, without the time in which this process stood still."""
    call_s: float = 0.0
    """Sum over the calls of how long they took."""

    def tell(self, text: str) -> None:
        """Remember one case of what must not happen."""
        if len(self.told) < NUM_TOLD:
            self.told.append(text)


class Stalls:
    """How long the event loop stood still, since `ticking` began."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def tick(self) -> None:
        """Look, until it is cancelled."""
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.seconds += time.monotonic() - due

    @asynccontextmanager
    async def ticking(self) -> AsyncIterator[None]:
        """Look, while the block runs."""
        task = asyncio.ensure_future(self.tick())
        try:
            yield
        finally:
            task.cancel()


class Driver:
    """Asks an expert, and judges what it says."""

    def __init__(
        self, truth: Truth, dialect: str, expert: Expert, timeout_s: float, stalls: Stalls | None = None
    ) -> None:
        self._truth = truth
        self._dialect = dialect
        self._expert = expert
        self._timeout_s = timeout_s
        self._stalls = stalls or Stalls()

    async def ask(self, question: Question, outcomes: Outcomes) -> str:
        """ "right", "short", "wrong", "untyped", or the name of the error's class; it is added to `outcomes`."""
        outcomes.num_calls += 1
        try:
            await self._timed("prepare", self._expert.prepare(question.context), outcomes)
            found, path = await self._timed(question.kind, self._answer(question), outcomes)
        except MopeError as error:
            outcomes.errors[type(error).__name__] += 1
            return type(error).__name__
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what is looked for
            outcomes.num_untyped += 1
            outcomes.tell(f"{self._expert.name}, {question}: {error!r}")
            return "untyped"
        verdict = self._truth.verdict(found, question, self._dialect, path)
        if verdict == "right":
            outcomes.right += 1
        elif verdict == "short":
            outcomes.short += 1
        else:
            outcomes.num_wrong += 1
            outcomes.tell(f"{self._expert.name}, {question.kind} after {question.context}: {verdict}")
            return "wrong"
        return verdict

    async def set_up(self) -> None:
        """Let the expert learn what it needs to know of its endpoint."""
        for _ in range(NUM_SET_UPS):
            with suppress(MopeError):
                if isinstance(self._expert, WireExpert):
                    await self._expert.vocab_size()
                return

    async def _answer(self, question: Question) -> tuple[Sequence[TokenDistribution], Sequence[Piece]]:
        expert, context, top_k = self._expert, question.context, question.top_k
        if question.kind == "next":
            return [await expert.next_tokens(context, top_k=top_k)], ()
        if question.kind == "score":
            return await expert.score(context, question.draft, top_k=top_k), question.draft
        temperature = expert.draft_temperature(1.0)
        steps = await expert.draft(context, top_k=top_k, num_tokens=5, temperature=temperature, seed=7)
        return [step.distribution for step in steps], [step.piece for step in steps[:-1]]

    async def _timed(self, kind: str, call: Awaitable[Any], outcomes: Outcomes) -> Any:
        began, stalled_s = time.monotonic(), self._stalls.seconds
        most_s = NUM_REQUESTS[kind] * self._timeout_s + SLACK_S
        try:
            async with asyncio.timeout(most_s + LONGEST_S):
                return await call
        finally:
            seconds = time.monotonic() - began
            outcomes.call_s += seconds
            seconds -= self._stalls.seconds - stalled_s
            outcomes.longest_s[kind] = max(seconds, outcomes.longest_s.get(kind, 0.0))
            if seconds > most_s:
                outcomes.num_hangs += 1
                outcomes.tell(f"{self._expert.name}: {kind} took {seconds:.1f} s")


async def measure_mixed_faults(
    truth: Truth,
    url: str,
    *,
    num_calls: int,
    rate: float = 0.1,
    faults: Sequence[str] = tuple(FAULTS),
    seed: int = 0,
    num_workers: int = 48,
) -> dict[str, Any]:
    """`num_calls` calls, of which requests fail at `rate` in the ways of `faults`, through every dialect of `DIALECTS`.

    Each worker has an expert of its own, and asks it some hundred different questions, up to MOST_TOGETHER at a time;
    then it opens another one, as it does where no reply came in time: an endpoint may have asked to be left alone.
    """
    make_plan(url, Plan(seed, rate, tuple(faults)))
    outcomes, stalls = Outcomes(), Stalls()
    began = time.monotonic()

    async def work(worker: int) -> None:
        dialect = DIALECTS[worker % len(DIALECTS)]
        for life in itertools.count():
            rng = random.Random(f"{seed} {worker} {life}")
            questions = truth.questions(dialect, rng)
            config = truth.config(dialect, url, f"{worker}-{life}", **SETTINGS)
            expert = open_expert(config, None)
            driver = Driver(truth, dialect, expert, config.timeout_s, stalls)
            found: list[str] = []
            try:
                # What an expert learns of its endpoint, once, are requests of their own.
                await driver.set_up()
                # A long pause holds for whatever an expert is asked next.
                while questions and "ProviderTimeoutError" not in found and outcomes.num_calls < num_calls:
                    size = rng.choice((1, 1, 1, MOST_TOGETHER))
                    together, questions = questions[:size], questions[size:]
                    found = await asyncio.gather(*(driver.ask(question, outcomes) for question in together))
            finally:
                await expert.aclose()
            if outcomes.num_calls >= num_calls:
                return

    async with stalls.ticking():
        await asyncio.gather(*map(work, range(num_workers)))
    seconds = time.monotonic() - began
    seen = what_was_seen(url)
    return {
        "seed": seed,
        "rate": rate,
        "dialects": list(DIALECTS),
        "seconds": round(seconds, 1),
        "num_calls": outcomes.num_calls,
        "right": outcomes.right,
        "short": outcomes.short,
        "errors": dict(outcomes.errors.most_common()),
        "num_wrong": outcomes.num_wrong,
        "num_untyped": outcomes.num_untyped,
        "num_hangs": outcomes.num_hangs,
        "told": outcomes.told,
        "longest_s": {kind: round(value, 2) for kind, value in outcomes.longest_s.items()},
        "stalled_s": round(stalls.seconds, 1),
        "call_s": round(outcomes.call_s, 1),
        "num_requests": seen.num_requests,
        "num_elsewhere": seen.num_elsewhere,
        "most_arrivals": seen.most_arrivals,
        "num_faults": seen.served.total(),
        "num_retries": seen.asked_again.total(),
        "waited_s": round(sum(seen.waited_s.values()), 1),
        "faults": {
            name: {
                "served": count,
                "asked_again": seen.asked_again[name],
                "waited_s": round(seen.waited_s[name], 2),
            }
            for name, count in sorted(seen.served.items())
        },
    }
