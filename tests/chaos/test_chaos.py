"""Bad days: every fault, in every dialect, ends in the model's own distribution or in a typed error, and in time.

`make evidence` runs the same on 100,000 calls.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Final

import pytest

from mope_bb import errors
from mope_bb.errors import MopeError
from mope_bb.providers.base import Expert
from mope_bb.providers.registry import open_expert
from mope_bb.zoo.build import Zoo
from tests.chaos.faults import FAULTS, FLOODS, HOSTILE, SILENT
from tests.chaos.hostile import measure_hostile
from tests.chaos.measure import SETTINGS, Driver, Outcomes, Stalls, measure_mixed_faults
from tests.chaos.pacing import LEAST_WAITS_S, measure_moving_limit, measure_retry_after
from tests.chaos.server import ChaosServer, Plan, make_plan, running, what_was_seen
from tests.chaos.truth import DIALECTS, Question, Truth

pytestmark = pytest.mark.deadlines
SEED: Final = 7
NUM_CALLS: Final = 1000
MAX_RETRIES: Final = 1
SHORT: Final[dict[str, float]] = {"timeout_s": 4.5, "attempt_timeout_s": 1.6, "max_retries": MAX_RETRIES}
"""The deadlines of an endpoint that lets them pass."""
LONG: Final[dict[str, float]] = {"timeout_s": 25.0, "attempt_timeout_s": 10.0, "max_retries": MAX_RETRIES}
"""Of one that fails at once: that this machine stands still for a while is no reason to ask again."""
PEAK_MIB: Final = 200
TIMEOUT_S: Final = 1.0


@pytest.fixture(scope="module")
def truth(nano: Zoo) -> Truth:
    """The model, as it is."""
    return Truth(nano.folder("concise"))


@pytest.fixture(scope="module")
def url(nano: Zoo) -> Iterator[str]:
    """The same model behind the chaos server."""
    with running(ChaosServer(nano.folder("concise"))) as found:
        yield found


def test_on_a_good_day_all_is_right(truth: Truth, url: str) -> None:
    """No fault, no difference: what the adapters say is the whole truth, in every dialect, for every kind of call."""
    results = asyncio.run(measure_mixed_faults(truth, url, num_calls=300, rate=0.0, num_workers=6))
    assert (results["right"], results["told"]) == (results["num_calls"], [])
    assert results["longest_s"].keys() == {"prepare", "next", "score", "draft"}
    assert results["most_arrivals"] == 1


def test_mixed_faults(truth: Truth, url: str) -> None:
    """One request in ten fails, in all ways: nothing wrong is accepted, nothing hangs, nothing else is raised."""
    results = asyncio.run(measure_mixed_faults(truth, url, num_calls=NUM_CALLS, seed=SEED, num_workers=24))
    told = f"seed {SEED}: {results}"
    assert results["num_wrong"] == 0, told
    assert results["num_untyped"] == 0, told
    assert results["num_hangs"] == 0, told
    # Where a redirect points nobody was asked, and no second retry layer asks more often.
    assert results["num_elsewhere"] == 0, told
    assert results["most_arrivals"] <= SETTINGS["max_retries"] + 1, told
    assert results["num_faults"] > 0.05 * NUM_CALLS, told
    assert results["right"] + results["short"] > 0.9 * results["num_calls"], told
    assert results["right"] + results["short"] + sum(results["errors"].values()) == results["num_calls"], told


@pytest.mark.parametrize("dialects", [DIALECTS[:2], DIALECTS[2:4], DIALECTS[4:]])
def test_each_fault_ends_as_it_should(truth: Truth, url: str, dialects: tuple[str, ...]) -> None:
    """An endpoint that always fails in one way: asked once, or once more for each retry; right, short or refused."""
    names = [name for name in FAULTS if name not in (*FLOODS, "429 huge", "unasked reply")]
    lives = {f"{dialect}-{place}": name for dialect in dialects for place, name in enumerate(names)}
    # All at once would be too much for a busy machine, and look like faults.
    turns, stalls = asyncio.Semaphore(16), Stalls()

    async def ask(life: str, expert: Expert) -> list[str]:
        dialect, fault = life.rpartition("-")[0], FAULTS[lives[life]]
        driver = Driver(truth, dialect, expert, deadlines(lives[life])["timeout_s"], stalls)
        outcomes = Outcomes()
        questions = first_questions(truth, dialect)
        async with turns:
            if "batch" in fault.needs:
                # Together, so that they go in one request.
                found = await asyncio.gather(*(driver.ask(one, outcomes) for one in questions[:3]))
            else:
                found = [await driver.ask(one, outcomes) for one in questions[: 5 if "right" in fault.outcomes else 1]]
        return outcomes.told or found

    async def main() -> None:
        make_plan(url, Plan(SEED))
        experts = {
            life: open_expert(truth.config(life.rpartition("-")[0], url, life, **deadlines(name)), None)
            for life, name in lives.items()
        }
        try:
            for life, expert in experts.items():
                for question in first_questions(truth, life.rpartition("-")[0]):
                    await expert.prepare(question.context)
                await expert.next_tokens(question.context, top_k=20)
            make_plan(url, Plan(SEED, fault_of_life=lives))
            async with stalls.ticking():
                found = await asyncio.gather(*map(ask, experts, experts.values()))
        finally:
            for expert in experts.values():
                await expert.aclose()
        seen = what_was_seen(url)
        told = []
        for (life, name), ends in zip(lives.items(), found, strict=True):
            num_questions = 1 if "batch" in FAULTS[name].needs else len(ends)
            if seen.failures[life]:
                told += [f"{life}: {one}" for one in _complaints(name, set(ends), seen.arrivals[life] / num_questions)]
        assert not told, f"seed {SEED}: {told}"
        assert seen.num_elsewhere == 0

    asyncio.run(main())


def deadlines(name: str) -> dict[str, float]:
    """The settings of an expert whose endpoint has this fault."""
    return SHORT if name in SILENT else LONG


def first_questions(truth: Truth, dialect: str) -> list[Question]:
    """Some questions for a single list."""
    return [one for one in truth.questions(dialect, random.Random(SEED)) if one.kind == "next"][:5]


def _complaints(name: str, ends: set[str], num_arrivals: float) -> list[str]:
    """What is wrong with the ends that a fault had; each question came `num_arrivals` times on average."""
    fault = FAULTS[name]
    kinds = ends & {"right", "short"}
    for end in ends - kinds:
        kinds.add("retried" if getattr(errors, end, MopeError).retryable else "refused")
    least = MAX_RETRIES + 1 if fault.outcomes == {"retried"} else 1
    most = MAX_RETRIES + 1 if "retried" in fault.outcomes else 1
    complaints = []
    if not (kinds <= fault.outcomes and ends <= {"right", "short", *vars(errors)}):
        complaints.append(f"{name}: {ends}")
    if not least <= num_arrivals <= most:
        complaints.append(f"{name}: {ends}, and it came {num_arrivals:g} times, expected {least} to {most}")
    return complaints


@pytest.mark.parametrize("dialect", ["tgi", "openai"])
def test_a_reply_that_nobody_asked_for(truth: Truth, url: str, dialect: str) -> None:
    """It comes while the connection waits for its next question, and is not taken for the answer to that."""

    async def main() -> None:
        make_plan(url, Plan(SEED, fault_of_life={"unasked": "unasked reply"}))
        expert = open_expert(truth.config(dialect, url, "unasked", **SHORT), None)
        driver, outcomes = Driver(truth, dialect, expert, SHORT["timeout_s"]), Outcomes()
        try:
            for number, question in enumerate(first_questions(truth, dialect), start=1):
                found = await driver.ask(question, outcomes)
                assert found == "right", outcomes.told
                has_come = False
                while not has_come:
                    has_come = len(what_was_seen(url).times["unasked"]) == number
                    await asyncio.sleep(0.01)
        finally:
            await expert.aclose()

    asyncio.run(main())


def test_retry_after_is_obeyed(truth: Truth, url: str) -> None:
    """In every form: never asked again too early, and not at all where that is later than the deadline."""
    results = asyncio.run(measure_retry_after(truth, url, timeout_s=2.0))
    assert results.keys() == LEAST_WAITS_S.keys()
    assert [name for name, one in results.items() if one["too_early"]] == []
    assert {name: len(one["waited_s"]) for name, one in results.items() if name != "429 huge"} == dict.fromkeys(
        LEAST_WAITS_S.keys() - {"429 huge"}, 1
    )
    assert results["429 huge"]["waited_s"] == []
    assert {one["outcome"] for name, one in results.items() if name != "429 huge"} == {"right"}
    assert results["429 huge"]["outcome"] == "ProviderTimeoutError"


def test_a_hidden_limit_that_moves_is_found(truth: Truth, url: str) -> None:
    """In the end few are rejected, and none is lost."""
    limits = (20, 8, 14)
    results = asyncio.run(
        measure_moving_limit(truth, url, limits=limits, service_s=0.1, num_callers=40, recovery_s=1.2, steady_s=0.8)
    )
    assert [one["limit"] for one in results] == list(limits)
    assert {one["errors"] for one in results} == {0}
    num_rejected, num_answered = (sum(one[name] for one in results) for name in ("num_rejected", "num_answered"))
    assert num_rejected <= 0.05 * (num_rejected + num_answered), results


def test_hostile_replies(truth: Truth, url: str) -> None:
    """Each is a typed error within the deadline, and together they take less than 200 MB."""
    results = measure_hostile(truth, url, dialects=["vllm"], together=True, timeout_s=TIMEOUT_S)
    assert results.keys() == {f"vllm: {name}" for name in HOSTILE}
    for name, one in results.items():
        assert issubclass(getattr(errors, one["outcome"], Exception), MopeError), (name, one)
        assert one["seconds"] < TIMEOUT_S + 1.0, (name, one)
    assert max(one["peak_mib"] for one in results.values()) < PEAK_MIB, results


def test_another_tokenizer_in_mid_run(truth: Truth, url: str) -> None:
    """From one question on the same ids stand for other bytes: whoever reads the bytes off the wire must notice."""
    questions = [one for one in truth.questions("llamacpp", random.Random(SEED)) if one.kind == "next"]
    life = "restarted"

    async def main() -> Counter[str]:
        expert = open_expert(truth.config("llamacpp", url, life, timeout_s=2.0), None)
        driver, outcomes = Driver(truth, "llamacpp", expert, 2.0), Outcomes()
        try:
            make_plan(url, Plan(SEED))
            for question in questions[:10]:
                assert await driver.ask(question, outcomes) == "right"
            make_plan(url, Plan(SEED, fault_of_life={life: "tokenizer changes"}))
            found = Counter([await driver.ask(question, outcomes) for question in questions[10:60]])
        finally:
            await expert.aclose()
        assert not outcomes.told, f"seed {SEED}: {outcomes.told}"
        return found

    assert asyncio.run(main()).total() == 50


def test_faults_replay_from_their_seed(truth: Truth, url: str) -> None:
    """Equal seeds give equal faults to equal requests, another seed gives others."""
    context = truth.questions("sglang", random.Random(0))[0].context
    questions = [Question("next", context, top_k) for top_k in range(3, 15)]

    async def run(seed: int) -> tuple[Counter[str], list[str]]:
        make_plan(url, Plan())
        expert = open_expert(truth.config("sglang", url, "replayed", max_retries=0, attempt_timeout_s=0.7), None)
        try:
            await expert.prepare(context)
            names = tuple(name for name in FAULTS if name not in HOSTILE and not name.startswith("429"))
            make_plan(url, Plan(seed, rate=0.5, faults=names))
            driver, outcomes = Driver(truth, "sglang", expert, 60.0), Outcomes()
            found = [await driver.ask(question, outcomes) for question in questions]
        finally:
            await expert.aclose()
        return what_was_seen(url).served, found

    first, again, other = (asyncio.run(run(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
