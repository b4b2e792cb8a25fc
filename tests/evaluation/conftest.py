"""The nano zoo as an evaluation sees it, its tasks, and judges whose verdicts are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from mope_bb.config import Config
from mope_bb.evaluation.evaluator import Evaluator, Measure
from mope_bb.evaluation.methods import EvalTask
from mope_bb.pcm.bench import ExpertBench
from mope_bb.preferences import Preference
from mope_bb.rewards.base import References, RewardPanel
from mope_bb.rewards.function import FunctionReward
from mope_bb.training.tasks import WantedStyle
from mope_bb.types import Message, SamplingOptions
from mope_bb.zoo import DIMENSIONS
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.judging import spread_prompts
from mope_bb.zoo.local import local_config

Score = Callable[[str, str], float]
"""From a dimension and an answer to a raw score."""
MAX_TOKENS = 6
COMBINATIONS = (("concise", "friendly"), ("grumpy", "informative", "technical"))


def any_score(dimension: str, answer: str) -> float:
    """Any reward that tells answers apart."""
    return random.Random(f"{dimension} {answer}").gauss(0.0, 1.0)


def wanting(weights: Mapping[str, float]) -> WantedStyle:
    """A preference by weights."""
    preference = Preference.of(weights)
    return WantedStyle(preference, preference.weights)


def tasks_of(
    num_prompts: int = 2, combinations: Sequence[Sequence[str]] = COMBINATIONS, *, first: int = 0
) -> list[EvalTask]:
    """Questions of the zoo, each with every combination, alike in weight; `first` leaves out others."""
    prompts = spread_prompts(first + num_prompts, held_out=True)[first:]
    return [
        EvalTask(number, messages, wanting(dict.fromkeys(names, 1.0)))
        for number, messages in enumerate(prompts)
        for names in combinations
    ]


def evaluator_of(
    bench: ExpertBench,
    score: Score = any_score,
    *,
    references: References | None = None,
    measure: Measure | None = None,
    seed: int = 0,
) -> Evaluator:
    """An evaluator whose reward models are `score`."""

    def judge(dimension: str) -> FunctionReward:
        def judged(messages: list[dict[str, Any]], answer: str) -> float:
            return score(dimension, answer)

        return FunctionReward(dimension, judged)

    return Evaluator(
        bench,
        RewardPanel({name: judge(name) for name in DIMENSIONS}),
        references or References(),
        "base",
        SamplingOptions(max_tokens=MAX_TOKENS),
        seed=seed,
        measure=measure,
    )


def prepared(evaluator: Evaluator, tasks: Sequence[EvalTask], reference: str = "0") -> Evaluator:
    """The same, with `reference` as the reference response to every task: nothing is sampled."""
    for task in tasks:
        evaluator.references.put(task.messages, reference)
    return evaluator


BAD_PROMPT = (Message("user", "What is <|end|>?"),)
"""No model reads it: it spells out a control token."""


@pytest.fixture(scope="session")
def config(nano: Zoo) -> Config:
    """The nano zoo in this process."""
    return local_config(nano)


@pytest.fixture(scope="session")
def bench(config: Config) -> Iterator[ExpertBench]:
    """Its models, opened once."""
    with ExpertBench(config, [expert.name for expert in config.experts]) as opened:
        yield opened
