"""The zoo as an evaluation: its questions and its oracle. Training never sees the oracle."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from mope_bb.rewards.base import win_probability
from mope_bb.types import Message
from mope_bb.zoo.language import Task, ideal_answer, tasks
from mope_bb.zoo.oracle import score
from mope_bb.zoo.wording import QUESTIONS

Prompt = tuple[Message, ...]


def zoo_prompts(*, held_out: bool) -> tuple[Prompt, ...]:
    """Every (verb, object) pair of the training, or of those kept out of it, each in one form of the question."""
    return tuple((Message("user", task.question(i)),) for i, task in enumerate(tasks(held_out=held_out)))


class ZooJudge:
    """Knows what a question of the zoo is about."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {
            task.question(form): task
            for held_out in (False, True)
            for task in tasks(held_out=held_out)
            for form in range(len(QUESTIONS))
        }

    def measures(self, messages: Prompt, weights: Mapping[str, float], answer: str, reference: str) -> dict[str, float]:
        """The oracle's win probability against the reference (weighted like the reward), fluency and facts."""
        task = self._tasks[messages[-1].content]
        found, other = score(answer, task), score(reference, task)
        total = sum(weights.values())
        oracle = sum(weight * win_probability(found.of(pole), other.of(pole)) for pole, weight in weights.items())
        return {"oracle": oracle / total, "fluency": found.fluency, "facts": found.facts}

    def ideal(self, messages: Prompt, poles: Sequence[str], seed: int) -> str:
        """What the grammar itself would answer."""
        return ideal_answer(self._tasks[messages[-1].content], sorted(poles), seed=seed)


def spread_prompts(count: int, *, held_out: bool, seed: int = 0) -> tuple[Prompt, ...]:
    """`count` prompts (or all), drawn without repetition."""
    every = list(zoo_prompts(held_out=held_out))
    random.Random(seed).shuffle(every)
    return tuple(every[:count])
