"""From sampled answers to pairs with rewards: reference answers, reward models, what failed and why."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mope_bb.chat_tokenizer import as_openai
from mope_bb.errors import MopeError, RewardError, TrainingError
from mope_bb.pcm.actors import Actor
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.rollouts import FailedRollout, Rollout, RolloutRequest
from mope_bb.rewards.base import RewardPanel, scalarise
from mope_bb.training.learner import Pair
from mope_bb.training.ledger import Ledger
from mope_bb.training.tasks import Task
from mope_bb.types import Message, SamplingOptions


@dataclass(frozen=True, eq=False, slots=True)
class Scored:
    """What became of some tasks."""

    results: Sequence[Pair | MopeError]
    """One for each task: the pair, or why there is none."""
    reference_scores: Mapping[str, Mapping[str, float]]
    """Prompt key -> dimension -> all that is known by now of its reference answer."""


class ReferenceDesk:
    """The reference answer of each prompt: sampled once, kept in the ledger with its scores."""

    def __init__(self, ledger: Ledger, actor: Actor, *, expert: str, seed: int) -> None:
        """`actor` samples without a PCM; `expert` is who answers."""
        self._ledger = ledger
        self._actor = actor
        self._plan = Plan(MergeRule("linear"), experts=(expert,), lambdas=(1.0,), base=None, preference_text="")
        self._seed = seed
        self._kept = ledger.references()
        self._wanted: dict[str, tuple[Message, ...]] = {}
        self._failures: dict[str, MopeError] = {}
        self._lock = asyncio.Lock()

    def reference(self, prompt: tuple[Message, ...]) -> tuple[str, Mapping[str, float]] | MopeError:
        """The reference answer with its scores from earlier processes, or why it could not be had."""
        key = prompt_key(prompt)
        return self._kept.get(key) or self._failures.get(key) or TrainingError("there is no reference answer yet")

    async def fetch(self, prompts: Sequence[tuple[Message, ...]], options: SamplingOptions) -> None:
        """Sample what is missing. Those who ask while others are being sampled are served together next."""
        self._wanted |= {key: prompt for prompt in prompts if (key := prompt_key(prompt)) not in self._kept}
        async with self._lock:
            wanted = {key: prompt for key, prompt in self._wanted.items() if key not in self._kept}
            self._wanted = {}
            if not wanted:
                return
            requests = [
                RolloutRequest(prompt, self._plan, random.Random(f"{self._seed} reference {key}").getrandbits(32))
                for key, prompt in wanted.items()
            ]
            found = dict(zip(wanted, await self._actor.sample(requests, options), strict=True))
            texts = {key: one.text for key, one in found.items() if isinstance(one, Rollout)}
            self._failures |= {key: one.error for key, one in found.items() if isinstance(one, FailedRollout)}
            self._ledger.put_references(texts)
            self._kept |= {key: (text, {}) for key, text in texts.items()}


def score_pairs(
    panel: RewardPanel,
    tasks: Sequence[Task],
    answers: Sequence[tuple[Rollout | FailedRollout, Rollout | FailedRollout]],
    references: Sequence[tuple[str, Mapping[str, float]] | MopeError],
) -> Scored:
    """Rewards for the tasks whose answers and reference are all there. Blocks as long as the reward models work."""
    results: list[Pair | MopeError | None] = [None] * len(tasks)
    whole: list[tuple[int, Rollout, Rollout, str]] = []
    for place, (task, (first, second), reference) in enumerate(zip(tasks, answers, references, strict=True)):
        if isinstance(first, FailedRollout) or isinstance(second, FailedRollout):
            results[place] = first.error if isinstance(first, FailedRollout) else second.error  # type: ignore[union-attr]
        elif isinstance(reference, MopeError):
            results[place] = reference
        else:
            text, scores = reference
            panel.keep_reference_scores(task.messages, text, scores)
            whole.append((place, first, second, text))
    judged = panel.wins(
        [tasks[place].messages for place, *_ in whole for _ in range(2)],
        [rollout.text for _, first, second, _ in whole for rollout in (first, second)],
        [text for *_, text in whole for _ in range(2)],
        [tuple(tasks[place].style.weights) for place, *_ in whole for _ in range(2)],
    )
    for (place, first, second, _), one, other in zip(whole, judged[::2], judged[1::2], strict=True):
        weights = tasks[place].style.weights
        if isinstance(one, RewardError) or isinstance(other, RewardError):
            results[place] = one if isinstance(one, RewardError) else other  # type: ignore[assignment]
        else:
            rewards = (scalarise(one.wins, weights), scalarise(other.wins, weights))
            results[place] = Pair(first, second, rewards, tasks[place].pair_id)
    return Scored(
        [one for one in results if one is not None],
        {
            prompt_key(tasks[place].messages): panel.reference_scores(tasks[place].messages, text)
            for place, _, _, text in whole
        },
    )


def prompt_key(messages: Sequence[Message]) -> str:
    """A prompt as text, equal for equal prompts."""
    return json.dumps([as_openai(message) for message in messages], sort_keys=True)
