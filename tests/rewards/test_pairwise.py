"""Reward models that compare: what the panel asks them, and that nobody misses the raw scores they do not have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mope_bb.errors import RewardError
from mope_bb.evaluation.evaluator import Evaluator
from mope_bb.evaluation.methods import EvalTask
from mope_bb.evaluation.results import Evaluation, MethodInfo, ScoredAnswer
from mope_bb.evaluation.statistics import measure_cells, win_rates
from mope_bb.evaluation.studies import SLIDER, slider_study
from mope_bb.evaluation.suite import Suite
from mope_bb.preferences import Preference
from mope_bb.rewards.base import (
    Comparison,
    PairwiseRewardModel,
    References,
    RewardPanel,
    Scored,
    checked_chance,
    win_probability,
)
from mope_bb.rewards.function import FunctionReward
from mope_bb.training.tasks import WantedStyle
from mope_bb.types import Message, SamplingOptions

QUESTION = (Message("user", "Why?"),)
OTHER = (Message("user", "How?"),)


@dataclass(eq=False)
class Longer(PairwiseRewardModel):
    """Prefers the longer answer, and records what it is asked; an answer "?" cannot be compared."""

    dimension: str = "long"
    batches: list[list[tuple[str, str, str]]] = field(default_factory=list)
    """Prompt, answer and reference of each comparison."""
    is_closed: bool = False

    def compare(self, comparisons: Sequence[Comparison]) -> list[float | RewardError]:
        assert all(one[:-1] == other[:-1] for one, other in comparisons)
        texts = [(one[-2].content, one[-1].content, other[-1].content) for one, other in comparisons]
        self.batches.append(texts)
        return [
            RewardError("no idea") if answer == "?" else float(len(answer) > len(reference))
            for _, answer, reference in texts
        ]

    def close(self) -> None:
        self.is_closed = True


def test_a_comparison_gives_a_chance_and_no_score() -> None:
    """Beside a model that scores, each in its own dimensions."""
    panel = RewardPanel(
        {"long": Longer(), "numeric": FunctionReward("numeric", lambda messages, answer: float(answer))}
    )
    both, pairwise, scoring = panel.wins(
        [QUESTION] * 3, ["12", "1", "2"], ["3"] * 3, [("numeric", "long"), ["long"], ["numeric"]]
    )
    assert both == Scored({"numeric": 12.0}, {"long": 1.0, "numeric": win_probability(12, 3)})
    assert pairwise == Scored({}, {"long": 0.0})
    assert scoring == Scored({"numeric": 2.0}, {"numeric": win_probability(2, 3)})


def test_each_comparison_is_asked_once_per_call() -> None:
    """Without repetitions, in one batch, each with its own reference and prompt; nothing is kept for the next call."""
    model = Longer()
    panel = RewardPanel({"long": model})
    found = panel.wins(
        [QUESTION, QUESTION, QUESTION, OTHER],
        ["abc", "abc", "abc", "abc"],
        ["ab", "ab", "abcd", "ab"],
        [["long"]] * 4,
    )
    assert [one.wins["long"] for one in found if isinstance(one, Scored)] == [1.0, 1.0, 0.0, 1.0]
    assert model.batches == [[("Why?", "abc", "ab"), ("Why?", "abc", "abcd"), ("How?", "abc", "ab")]]
    panel.wins([QUESTION], ["abc"], ["ab"], [["long"]])
    assert model.batches[1:] == [[("Why?", "abc", "ab")]]


def test_an_answer_is_not_compared_with_itself() -> None:
    """It wins by a half, as it would by any score; a model with nothing else to compare is not called."""
    model = Longer()
    panel = RewardPanel({"long": model})
    assert panel.wins([QUESTION], ["ab"], ["ab"], [["long"]]) == [Scored({}, {"long": 0.5})]
    assert model.batches == []
    found = panel.wins([QUESTION] * 2, ["ab", "abc"], ["ab", "ab"], [["long"]] * 2)
    assert found == [Scored({}, {"long": 0.5}), Scored({}, {"long": 1.0})]
    assert model.batches == [[("Why?", "abc", "ab")]]


def test_an_error_costs_its_answer() -> None:
    """And only in the dimension that was asked for."""
    panel = RewardPanel({"long": Longer(), "same": FunctionReward("same", lambda messages, answer: 1.0)})
    bad, good, unasked = panel.wins([QUESTION] * 3, ["?", "abc", "?"], ["ab"] * 3, [["long"], ["long"], ["same"]])
    assert isinstance(bad, RewardError)
    assert "no idea" in str(bad)
    assert good == Scored({}, {"long": 1.0})
    assert isinstance(unasked, Scored)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf, None, "1"])
def test_what_is_no_chance_is_an_error(value: Any) -> None:
    """The panel does not believe a model that is wrong about its own range."""

    class Wrong(Longer):
        def compare(self, comparisons: Sequence[Comparison]) -> list[float | RewardError]:
            return [value for _ in comparisons]

    [found] = RewardPanel({"long": Wrong()}).wins([QUESTION], ["a"], ["b"], [["long"]])
    assert isinstance(found, RewardError)
    assert "'long'" in str(found)
    assert [checked_chance(one, "long") for one in (0, 0.25, 1)] == [0.0, 0.25, 1.0]


def test_references_have_no_scores_to_keep() -> None:
    """What is handed on to other panels is empty for this dimension, and what they hand over changes nothing."""
    panel = RewardPanel({"long": Longer()})
    panel.wins([QUESTION], ["abc"], ["ab"], [["long"]])
    assert panel.reference_scores(QUESTION, "ab") == {}
    panel.keep_reference_scores(QUESTION, "ab", {})
    assert panel.wins([QUESTION], ["abc"], ["ab"], [["long"]]) == [Scored({}, {"long": 1.0})]


def test_panel_closes_its_models() -> None:
    """As it does the others."""
    model = Longer()
    RewardPanel({"long": model}).close()
    assert model.is_closed


# Without raw scores


class Fixed:
    """A method that always gives these answers."""

    def __init__(self, name: str, *texts: str) -> None:
        self.info = MethodInfo(name, "base", "")
        self.texts = texts

    def answer(self, tasks: Sequence[EvalTask], options: SamplingOptions, *, seed: int) -> list[Any]:
        """One per task."""
        return [SimpleNamespace(text=self.texts[task.prompt], num_tokens=1, entropy=0.0) for task in tasks]


def wanting(*dimensions: str) -> WantedStyle:
    """A preference for all of these alike."""
    weights = dict.fromkeys(dimensions, 1 / len(dimensions))
    return WantedStyle(Preference.of(weights), weights)


def evaluated(*methods: Fixed) -> tuple[list[ScoredAnswer], Evaluation]:
    """The answers of methods to two questions, judged in "long" by comparison and in "numeric" by score."""
    numeric = FunctionReward("numeric", lambda messages, answer: float(answer))
    panel = RewardPanel({"long": Longer(), "numeric": numeric})
    evaluator = Evaluator(cast("Any", None), panel, References(), "base", SamplingOptions())
    tasks = [EvalTask(n, one, wanting("long", "numeric")) for n, one in enumerate((QUESTION, OTHER))]
    for task in tasks:
        evaluator.references.put(task.messages, "10")
    answers = [one for method in methods for one in evaluator.run(cast("Any", method), tasks)]
    return answers, Evaluation(methods=[method.info for method in methods], answers=answers)


def test_an_evaluation_leaves_out_what_it_has_no_scores_for() -> None:
    """Rewards and chances are there in both dimensions, win rates by score only where there are scores."""
    answers, evaluation = evaluated(Fixed("good", "111", "112"), Fixed("bad", "1", "2"))
    assert [one.scores for one in answers] == [{"numeric": float(score)} for score in (111, 112, 1, 2)]
    assert [one.wins["long"] for one in answers] == [1.0, 1.0, 0.0, 0.0]
    rates = win_rates(evaluation, "good", "bad")
    assert list(rates.dimensions) == ["numeric"]
    assert rates.reward.value == rates.average.value == 1.0
    assert measure_cells(evaluation, "win:long").mean("good").value == 1.0


@pytest.mark.parametrize("first", ["long", "numeric"])
def test_a_slider_without_scores_has_empty_cells(first: str) -> None:
    """The lengths are there all the same, and the score where there is one."""
    answers, _ = evaluated(Fixed("good", "111", "112"))
    methods = iter("abc")
    suite = SimpleNamespace(
        uniform=lambda: SimpleNamespace(info=MethodInfo(next(methods), "base", "")),
        static_product=lambda: SimpleNamespace(info=MethodInfo(next(methods), "base", "")),
        method=lambda *_: SimpleNamespace(info=MethodInfo(next(methods), "base", "")),
        pcms={},
    )
    evaluator = SimpleNamespace(run=lambda method, tasks: answers)
    prompts = [EvalTask(0, QUESTION, wanting("long"))]
    study = slider_study(cast("Suite", suite), cast("Evaluator", evaluator), prompts, first, "other")
    assert len(study.rows) == len(SLIDER)
    for row in study.rows:
        assert row[1:] == ([1.0, None] * 2 if first == "long" else [1.0, 111.5] * 2)
