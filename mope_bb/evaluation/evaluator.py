"""Asks methods, scores their answers against the reference responses, and tunes what a fair comparison needs tuned."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from mope_bb.errors import RewardError, TrainingError
from mope_bb.evaluation.methods import EvalTask, Given, Method
from mope_bb.evaluation.results import ScoredAnswer
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.rollouts import FailedRollout, RolloutRequest
from mope_bb.rewards.base import References, RewardPanel, Scored, scalarise
from mope_bb.types import SamplingOptions

TEMPERATURES: Final = (0.3, 0.5, 0.7, 1.0)
"""What a temperature is tuned over."""
Measure = Callable[[EvalTask, str, str], Mapping[str, float]]
"""From a task, an answer and the reference response to further measures."""


@dataclass(eq=False)
class Evaluator:
    """Everything that answers are judged by."""

    bench: ExpertBench
    panel: RewardPanel
    references: References
    reference_expert: str
    options: SamplingOptions
    seed: int = 0
    measure: Measure | None = None
    failures: dict[str, int] = field(default_factory=dict)
    """Method -> answers that could not be sampled or scored."""

    def prepare(self, tasks: Sequence[EvalTask]) -> None:
        """Sample the reference responses that are not there yet. Raises TrainingError for one that fails."""
        rng = random.Random(f"references {self.seed}")
        plan = Plan(
            MergeRule("linear"), experts=(self.reference_expert,), lambdas=(1.0,), base=None, preference_text=""
        )
        prompts = dict.fromkeys(task.messages for task in tasks)
        missing = [messages for messages in prompts if self.references.get(messages) is None]
        requests = [RolloutRequest(messages, plan, rng.getrandbits(32)) for messages in missing]
        for found in self.bench.sampler().sample(requests, self.options) if requests else ():
            if isinstance(found, FailedRollout):
                raise TrainingError(
                    f"{self.reference_expert!r} gave no reference response to {found.request.messages[-1].content!r}:"
                    f" {found.error}",
                    hint="Shorten the prompt, or look at the expert's server.",
                )
            self.references.put(found.request.messages, found.text)

    def rate(self, tasks: Sequence[EvalTask], texts: Sequence[str]) -> list[float]:
        """The reward of each answer; -1, below every reward, where it could not be scored."""
        return [
            -1.0 if isinstance(found, RewardError) else scalarise(found.wins, task.style.weights)
            for task, found in zip(tasks, self._judge(tasks, texts), strict=True)
        ]

    def run(self, method: Method, tasks: Sequence[EvalTask], *, num_samples: int = 1) -> list[ScoredAnswer]:
        """Answers of `method` with their scores; those that failed are counted and left out."""
        return [scored for scored, _ in self.run_with_answers(method, tasks, num_samples=num_samples)]

    def run_with_answers(
        self, method: Method, tasks: Sequence[EvalTask], *, num_samples: int = 1
    ) -> list[tuple[ScoredAnswer, Given]]:
        """The same, each with what the method gave."""
        found = []
        for sample in range(num_samples):
            given = method.answer(tasks, self.options, seed=self.seed * 1009 + sample)
            judged = self._judge(tasks, ["" if one is None else one.text for one in given])
            for task, one, scored in zip(tasks, given, judged, strict=True):
                if one is None or isinstance(scored, RewardError):
                    self.failures[method.info.name] = self.failures.get(method.info.name, 0) + 1
                else:
                    found.append((self._scored(method, task, sample, one, scored), one))
        return found

    def mean_reward(self, method: Method, tasks: Sequence[EvalTask]) -> float:
        """Mean reward of one answer per task; 0 where there is none."""
        rewards = [answer.reward for answer in self.run(method, tasks)]
        return sum(rewards) / max(1, len(rewards))

    def mean_entropy(self, method: Method, tasks: Sequence[EvalTask]) -> float:
        """Mean nats per token of one answer per task; 0 where there is none."""
        answers = self.run(method, tasks)
        num_tokens = sum(answer.num_tokens for answer in answers)
        return sum(answer.entropy * answer.num_tokens for answer in answers) / max(1, num_tokens)

    def tune_temperature(self, method: Method, tasks: Sequence[EvalTask]) -> float:
        """The temperature of the grid with the highest reward."""
        return max(
            TEMPERATURES, key=lambda value: self.mean_reward(method.at(value, f"{method.info.name} tuning"), tasks)
        )

    def match_temperature(self, method: Method, tasks: Sequence[EvalTask], entropy: float) -> float:
        """The temperature at which `method` is as random as `entropy` nats per token, between the grid's ends."""
        points = [
            (self.mean_entropy(method.at(value, f"{method.info.name} matching"), tasks), value)
            for value in TEMPERATURES
        ]
        for (low, cold), (high, warm) in pairwise(points):
            if low <= entropy <= high:
                return cold + (warm - cold) * (entropy - low) / max(high - low, 1e-9)
        return min(points, key=lambda point: abs(point[0] - entropy))[1]

    def _judge(self, tasks: Sequence[EvalTask], texts: Sequence[str]) -> list[Scored | RewardError]:
        return self.panel.wins(
            [task.messages for task in tasks],
            texts,
            [self.references.get(task.messages) or "" for task in tasks],
            [tuple(task.style.weights) for task in tasks],
        )

    def _scored(self, method: Method, task: EvalTask, sample: int, given: Given, scored: Scored) -> ScoredAnswer:
        reference = self.references.get(task.messages) or ""
        return ScoredAnswer(
            method=method.info.name,
            prompt=task.prompt,
            preference=task.style.label,
            sample=sample,
            text=given.text,
            num_tokens=given.num_tokens,
            entropy=given.entropy,
            scores=dict(scored.scores),
            wins=dict(scored.wins),
            reward=scalarise(scored.wins, task.style.weights),
            measures={} if self.measure is None else dict(self.measure(task, given.text, reference)),
        )


def renamed(answers: Sequence[ScoredAnswer], name: str) -> list[ScoredAnswer]:
    """The same answers under another method's name."""
    return [replace(answer, method=name) for answer in answers]
