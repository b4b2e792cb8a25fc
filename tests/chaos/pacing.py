"""How the client goes by what a busy endpoint says: a hidden limit of requests that moves, and every `Retry-After`."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Sequence
from typing import Any, Final

from mope_bb.errors import MopeError
from mope_bb.providers.base import Expert
from mope_bb.providers.registry import open_expert
from tests.chaos.measure import Driver, Outcomes
from tests.chaos.server import Plan, make_plan, what_was_seen
from tests.chaos.truth import Truth

LEAST_WAITS_S: Final = {
    "429 seconds": 1.0,
    "429 fraction": 0.15,
    "429 zero": 0.0,
    "429 negative": 0.0,
    # Whole seconds, so up to one less than the 1.2 that were added.
    "429 date": 0.2,
    "429 past date": 0.0,
    "429 milliseconds": 0.15,
    "429 milliseconds first": 0.15,
    "429 huge": math.inf,
    "429 garbage": 0.0,
    "429 bare": 0.0,
    "503": 0.15,
}
"""How long each of these asks to be left alone, at least."""
CLOCKS_S: Final = 0.002
"""Timers and clocks of two event loops differ by less than this."""


async def measure_retry_after(truth: Truth, url: str, *, timeout_s: float = 3.0, seed: int = 0) -> dict[str, Any]:
    """Each form of `Retry-After` on a first try: when the question comes again, as the server sees it."""
    question = truth.questions("sglang", random.Random(seed))[0]
    experts = {
        name: open_expert(truth.config("sglang", url, name.replace(" ", "-"), timeout_s=timeout_s), None)
        for name in LEAST_WAITS_S
    }
    make_plan(url, Plan(seed))
    for expert in experts.values():
        # Nothing is set up any more when it counts.
        await expert.next_tokens(question.context, top_k=question.top_k + 1)
    lives = {name.replace(" ", "-"): name for name in LEAST_WAITS_S}
    make_plan(url, Plan(seed, fault_of_life=lives, num_tries=1))

    async def ask(name: str) -> str:
        outcomes = Outcomes()
        try:
            return await Driver(truth, "sglang", experts[name], timeout_s).ask(question, outcomes)
        finally:
            await experts[name].aclose()

    found = dict(zip(LEAST_WAITS_S, await asyncio.gather(*map(ask, LEAST_WAITS_S)), strict=True))
    seen = what_was_seen(url)
    results: dict[str, Any] = {}
    for life, name in lives.items():
        times = seen.times[life]
        waits = [later[0] - earlier[1] for earlier, later in itertools.pairwise(times)]
        least_s = LEAST_WAITS_S[name]
        results[name] = {
            "asked_s": None if math.isinf(least_s) else least_s,
            "waited_s": [round(wait, 3) for wait in waits],
            "too_early": any(wait < least_s - CLOCKS_S for wait in waits),
            "outcome": found[name],
        }
    return results


async def measure_moving_limit(
    truth: Truth,
    url: str,
    *,
    limits: Sequence[int] = (40, 12, 30),
    service_s: float = 0.2,
    num_callers: int = 128,
    recovery_s: float = 12.0,
    steady_s: float = 12.0,
) -> list[dict[str, Any]]:
    """For each hidden limit in turn: what is got through of what it allows, and how much is rejected.

    After `recovery_s` it is measured for `steady_s`. Everyone of `num_callers` asks one question after another.
    """
    settings = {"timeout_s": 60.0, "attempt_timeout_s": 20.0, "max_retries": 20, "max_prompts": 1}
    expert = open_expert(truth.config("vllm", url, "storm", **settings), None)
    questions = [one for one in truth.questions("vllm", random.Random(0)) if one.kind == "next"]
    outcomes, errors, is_over = Outcomes(), [], asyncio.Event()
    make_plan(url, Plan())
    await _warm_up(expert, truth)
    driver = Driver(truth, "vllm", expert, 60.0)

    async def call(caller: int) -> None:
        for number in itertools.count(caller):
            if is_over.is_set():
                return
            found = await driver.ask(questions[number % len(questions)], outcomes)
            if found != "right":
                errors.append(found)

    results = []
    async with asyncio.TaskGroup() as group:
        for caller in range(num_callers):
            group.create_task(call(caller))
        for limit in limits:
            make_plan(url, Plan(most_in_flight=limit, service_s=service_s))
            await asyncio.sleep(recovery_s)
            earlier, began = what_was_seen(url), time.monotonic()
            await asyncio.sleep(steady_s)
            later, seconds = what_was_seen(url), time.monotonic() - began
            num_accepted = later.num_accepted - earlier.num_accepted
            num_rejected = later.num_rejected - earlier.num_rejected
            results.append(
                {
                    "limit": limit,
                    "allowed_per_s": round(limit / service_s, 1),
                    "answered_per_s": round(num_accepted / seconds, 1),
                    "share_of_limit": round(num_accepted / seconds * service_s / limit, 3),
                    "num_answered": num_accepted,
                    "num_rejected": num_rejected,
                    "rejected_share": round(num_rejected / max(1, num_accepted + num_rejected), 4),
                    "mean_in_flight": round((later.busy_s - earlier.busy_s) / seconds, 2),
                }
            )
        is_over.set()
        make_plan(url, Plan())
    await expert.aclose()
    for result in results:
        result["errors"] = len(errors)
    return results


async def _warm_up(expert: Expert, truth: Truth) -> None:
    for question in truth.questions("vllm", random.Random(0)):
        try:
            await expert.next_tokens(question.context, top_k=question.top_k)
        except MopeError as error:
            raise AssertionError("nothing is wrong yet") from error
