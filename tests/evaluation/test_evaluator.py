"""The evaluator: what is counted, what is left out, and the temperatures that it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from mope_bb.config import Config
from mope_bb.errors import TrainingError
from mope_bb.evaluation.evaluator import TEMPERATURES, Evaluator, renamed
from mope_bb.evaluation.methods import EvalTask, Given, Method, SampledMethod, merge_request
from mope_bb.evaluation.results import MethodInfo
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.mixture import MergeRule
from mope_bb.rewards.base import References, win_probability
from mope_bb.types import SamplingOptions
from tests.evaluation.conftest import BAD_PROMPT, evaluator_of, prepared, tasks_of, wanting

Give = Callable[[int, float], Given | None]
"""From the number of a task and a temperature to an answer."""


class Stub(Method):
    """Answers by task and temperature."""

    def __init__(self, give: Give, name: str = "stub") -> None:
        """Its own temperature is none of the grid."""
        self.info = MethodInfo(name, "base", "", temperature=0.9)
        self._give = give

    def answer(self, tasks: Sequence[EvalTask], options: SamplingOptions, *, seed: int) -> list[Given | None]:
        return [self._give(number, self.info.temperature) for number in range(len(tasks))]


def numeric(dimension: str, answer: str) -> float:
    """An answer's score is its own number, 5 for silence; "concise" halves it."""
    return float(answer or 5) / (2 if dimension == "concise" else 1)


@pytest.fixture
def tasks() -> list[EvalTask]:
    """Two prompts, two preferences."""
    return tasks_of()


@pytest.fixture
def evaluator(bench: ExpertBench, tasks: list[EvalTask]) -> Evaluator:
    """Scores by `numeric`; every reference is "0"."""
    return prepared(evaluator_of(bench, numeric), tasks)


def test_failed_answers_are_counted_and_left_out(evaluator: Evaluator, tasks: list[EvalTask]) -> None:
    """An answer that could not be sampled, or not be scored, costs itself only; the rest keep their tasks."""
    given = [None, Given("1", 1, 0.0), Given("not a number", 1, 0.0), Given("2", 1, 0.0)]
    method = Stub(lambda number, temperature: given[number])
    found = evaluator.run(method, tasks, num_samples=3)
    assert evaluator.failures == {"stub": 6}
    assert [(one.prompt, one.preference, one.sample, one.text) for one in found] == [
        (task.prompt, task.style.label, sample, text)
        for sample in range(3)
        for task, text in ((tasks[1], "1"), (tasks[3], "2"))
    ]
    evaluator.run(Stub(lambda number, temperature: Given("1", 1, 0.0), "other"), tasks)
    assert evaluator.failures == {"stub": 6}


def test_rates_follow_the_weights_and_failures_are_below_all(evaluator: Evaluator, tasks: list[EvalTask]) -> None:
    """The reward is the weighted mean of the win probabilities against the reference."""
    task = replace(tasks[0], style=wanting({"concise": 0.25, "friendly": 0.75}))
    expected = 0.25 * win_probability(1.0, 0.0) + 0.75 * win_probability(2.0, 0.0)
    assert evaluator.rate([task] * 3, ["2", "-1000", "?"]) == pytest.approx([expected, 0.0, -1.0])
    (answer,) = evaluator.run(Stub(lambda number, temperature: Given("2", 7, 0.5)), [task])
    assert answer.reward == pytest.approx(expected)
    assert answer.scores == {"concise": 1.0, "friendly": 2.0}
    assert (answer.num_tokens, answer.entropy, answer.measures) == (7, 0.5, {})


def test_measures_see_the_answer_and_its_reference(bench: ExpertBench, tasks: list[EvalTask]) -> None:
    """Whatever else is measured is told the task, the answer and the reference response to the same prompt."""

    def measure(task: EvalTask, text: str, reference: str) -> dict[str, float]:
        return {"both": float(text + reference), "prompt": task.prompt}

    evaluator = evaluator_of(bench, numeric, measure=measure)
    evaluator.references.put(tasks[0].messages, "5")
    evaluator.references.put(tasks[2].messages, "7")
    found = evaluator.run(Stub(lambda number, temperature: Given(str(number), 1, 0.0)), tasks)
    assert [one.measures for one in found] == [
        {"both": float(both), "prompt": prompt} for both, prompt in (("05", 0), ("15", 0), ("27", 1), ("37", 1))
    ]


def test_means_of_rewards_and_of_entropies(evaluator: Evaluator, tasks: list[EvalTask]) -> None:
    """Rewards by answer, entropies by token; failures count nowhere, and without answers both are 0."""
    given = [Given("0", 1, 4.0), None, Given("1000", 3, 1.0), None]
    method = Stub(lambda number, temperature: given[number])
    assert evaluator.mean_reward(method, tasks) == pytest.approx(0.75)
    assert evaluator.mean_entropy(method, tasks) == pytest.approx(1.75)
    nothing = Stub(lambda number, temperature: None)
    assert (evaluator.mean_reward(nothing, tasks), evaluator.mean_entropy(nothing, tasks)) == (0.0, 0.0)


@pytest.mark.parametrize("best", TEMPERATURES)
def test_tuning_finds_the_best_of_the_grid(evaluator: Evaluator, tasks: list[EvalTask], best: float) -> None:
    """Every value of the grid can win, and nothing else."""
    method = Stub(lambda number, temperature: Given(str(-abs(temperature - best)), 1, 0.0))
    assert evaluator.tune_temperature(method, tasks) == best


def test_matching_interpolates(evaluator: Evaluator, tasks: list[EvalTask]) -> None:
    """Between two values of the grid it goes in a straight line; beyond the ends the nearer end is taken."""
    method = Stub(lambda number, temperature: Given("0", 1, temperature**2))
    for low, high in pairwise(TEMPERATURES):
        for share in (0.0, 0.25, 1.0):
            found = evaluator.match_temperature(method, tasks, low**2 + share * (high**2 - low**2))
            assert found == pytest.approx(low + share * (high - low))
    assert evaluator.match_temperature(method, tasks, 0.01) == TEMPERATURES[0]
    assert evaluator.match_temperature(method, tasks, 9.0) == TEMPERATURES[-1]


def test_matching_finds_the_entropy_asked_for(bench: ExpertBench, config: Config) -> None:
    """A real mixture at the temperature found is as random as was asked for."""
    tasks = tasks_of(8)
    evaluator = prepared(evaluator_of(bench), tasks)
    request = merge_request(config, MergeRule("linear"), reads_text=True)
    method = SampledMethod(MethodInfo("mixture", "training-free", ""), bench.sampler(), request)
    cold, mild, *_ = TEMPERATURES
    low, middle = (evaluator.mean_entropy(method.at(value, "at"), tasks) for value in (cold, mild))
    wanted = (low + middle) / 2
    found = evaluator.match_temperature(method, tasks, wanted)
    assert low < wanted < middle
    assert cold < found < mild
    assert evaluator.mean_entropy(method.at(found, "found"), tasks) == pytest.approx(wanted, rel=0.15)


def test_a_reference_that_fails_ends_it(bench: ExpertBench, tasks: list[EvalTask]) -> None:
    """Nothing can be judged against it: an error that names expert and prompt."""
    bad = replace(tasks[0], messages=BAD_PROMPT)
    with pytest.raises(TrainingError, match=r"'base' gave no reference response to 'What is <\|end\|>\?'"):
        evaluator_of(bench).prepare([tasks[0], bad])


def test_references_are_sampled_once(
    bench: ExpertBench, tasks: list[EvalTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One per prompt, by the reference expert; what is there stays, whatever the seed."""
    asked: list[Any] = []
    sample = LocalSampler.sample

    def watched(self: LocalSampler, requests: Any, *args: Any) -> Any:
        asked.extend(requests)
        return sample(self, requests, *args)

    monkeypatch.setattr(LocalSampler, "sample", watched)
    references = References()
    references.put(tasks[0].messages, "mine")
    evaluator_of(bench, references=references).prepare(tasks)
    assert [(one.messages, one.plan.experts) for one in asked] == [(tasks[2].messages, ("base",))]
    kept = references.get(tasks[2].messages)
    evaluator_of(bench, references=references, seed=9).prepare(tasks)
    assert len(asked) == 1
    assert (references.get(tasks[0].messages), references.get(tasks[2].messages)) == ("mine", kept)


def test_answers_depend_on_the_seed(bench: ExpertBench, config: Config, tasks: list[EvalTask]) -> None:
    """Equal seeds give equal answers; other seeds, and further samples, give others."""
    request = merge_request(config, MergeRule("linear"), reads_text=True)
    method = SampledMethod(MethodInfo("mixture", "training-free", ""), bench.sampler(), request)
    one, again, other = (
        [answer.text for answer in prepared(evaluator_of(bench, seed=seed), tasks).run(method, tasks, num_samples=2)]
        for seed in (1, 1, 2)
    )
    assert one == again
    assert len({str(texts) for texts in (one[:4], one[4:], other[:4], other[4:])}) == 4


def test_renamed_answers_are_the_same(evaluator: Evaluator, tasks: list[EvalTask]) -> None:
    """Only the method's name changes, in copies."""
    found = evaluator.run(Stub(lambda number, temperature: Given("1", 1, 0.0)), tasks)
    assert renamed(found, "new") == [replace(answer, method="new") for answer in found]
    assert {answer.method for answer in found} == {"stub"}
