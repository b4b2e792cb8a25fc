"""How a pair is made: two answers, a reference answer, rewards. What is in the ledger already is taken from there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mope_bb.errors import ContextLengthError, MopeError, TrainingError
from mope_bb.pcm.actors import Actor
from mope_bb.pcm.heads import pcm_room
from mope_bb.pcm.model import PolicyWeights
from mope_bb.pcm.rollouts import FailedRollout, Progress, Rollout, RolloutRequest
from mope_bb.pcm.runner import response_ids
from mope_bb.threads import in_thread
from mope_bb.training.learner import Pair
from mope_bb.training.ledger import Ledger
from mope_bb.training.records import decode_rollout, encode_rollout
from mope_bb.training.runs import TrainingSetup
from mope_bb.training.scoring import ReferenceDesk, score_pairs
from mope_bb.training.tasks import Task
from mope_bb.types import SamplingOptions


@dataclass(eq=False)
class PairGroup:
    """Pairs that are sampled and scored together."""

    tasks: tuple[Task, ...]
    version: int
    """Of the policy that begins them, counted in the run's own steps."""
    stage: str = "answers"
    """What it waits for."""


class PairMaker:
    """Makes pairs, many groups at a time."""

    def __init__(
        self,
        setup: TrainingSetup,
        ledger: Ledger,
        actor: Actor,
        references: ReferenceDesk,
        *,
        unfinished: frozenset[int],
        first_version: int,
        on_answers: Progress | None,
    ) -> None:
        """`unfinished` are pairs of an earlier process, of which some answers may be in the ledger."""
        self._setup = setup
        self._options = setup.config.train
        self._sampling = SamplingOptions(max_tokens=self._options.max_tokens)
        self._ledger = ledger
        self._actor = actor
        self._references = references
        self._unfinished = unfinished
        self._first_version = first_version
        self._on_answers = on_answers
        self.num_answers = 0
        """Answers that were sampled one by one and belong to no batch yet."""

    async def make(
        self, group: PairGroup, weights: PolicyWeights | None
    ) -> tuple[dict[int, tuple[int, Pair | MopeError]], Mapping[str, Mapping[str, float]]]:
        """Sample and score the pairs of `group`: id -> (version of the policy that began it, what became of it).

        Beside it, what is known by now of the scores of their reference answers. `weights` are loaded first.
        """
        answers = await self._sample(group, weights)
        group.stage = "reference answers"
        await self._references.fetch([task.messages for task in group.tasks], self._sampling)
        group.stage = "rewards"
        both = [(answers[task.pair_id, 0], answers[task.pair_id, 1]) for task in group.tasks]
        references = [self._references.reference(task.messages) for task in group.tasks]
        scored = await in_thread(lambda: score_pairs(self._setup.panel, group.tasks, both, references), name="rewards")
        made: dict[int, tuple[int, Pair | MopeError]] = {}
        for task, pair, result in zip(group.tasks, both, scored.results, strict=True):
            begun = [one.policy_version - self._first_version for one in pair if isinstance(one, Rollout)]
            made[task.pair_id] = (min([group.version, *begun]), result)
        return made, scored.reference_scores

    async def _sample(
        self, group: PairGroup, weights: PolicyWeights | None
    ) -> dict[tuple[int, int], Rollout | FailedRollout]:
        """The answers of a group by pair and place, without those that an earlier process has sampled."""
        found: dict[tuple[int, int], Rollout | FailedRollout] = {}
        for task in group.tasks:
            if task.pair_id in self._unfinished:
                for place, data in self._ledger.rollouts(task.pair_id).items():
                    found[task.pair_id, place] = decode_rollout(data, task.requests[place])
        # The first answers of all, then the second ones.
        missing = {
            (task.pair_id, place): task.requests[place]
            for place in (0, 1)
            for task in group.tasks
            if (task.pair_id, place) not in found
        }
        if not missing:
            return found
        if weights is not None:
            await self._actor.load(weights)
        bundles = [missing] if self._actor.samples_in_step else [{key: one} for key, one in missing.items()]
        try:
            async with asyncio.TaskGroup() as tasks:
                sampled = [tasks.create_task(self._sample_bundle(bundle)) for bundle in bundles]
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None
        for task_of_bundle in sampled:
            found |= task_of_bundle.result()
        return found

    async def _sample_bundle(
        self, requests: dict[tuple[int, int], RolloutRequest]
    ) -> dict[tuple[int, int], Rollout | FailedRollout]:
        """Sample answers that begin together and record those that succeed."""
        in_step, limit = self._actor.samples_in_step, self._options.rollout_timeout_s
        try:
            async with asyncio.timeout(None if in_step else limit):
                sampled = await self._actor.sample(
                    list(requests.values()), self._sampling, progress=self._on_answers if in_step else None
                )
        except TimeoutError:
            error = TrainingError(f"the answer was not whole after {limit:g} s (`rollout_timeout_s`)")
            sampled = [FailedRollout(request, error) for request in requests.values()]
        found = {key: self._readable(one) for key, one in zip(requests, sampled, strict=True)}
        self._ledger.add_rollouts(
            [
                (pair_id, place, one.text, len(one), encode_rollout(one))
                for (pair_id, place), one in found.items()
                if isinstance(one, Rollout)
            ]
        )
        if not in_step:
            self.num_answers += len(found)
            if self._on_answers is not None:
                self._on_answers(max(0, self.num_answers), 2 * self._options.batch_size)
        return found

    def _readable(self, found: Rollout | FailedRollout) -> Rollout | FailedRollout:
        """A failure for an answer that has outgrown the PCM's context: what acted there cannot be recomputed."""
        if isinstance(found, FailedRollout):
            return found
        pcm, request = self._setup.pcm, found.request
        same_ids = self._setup.bench.reads_expert_ids(pcm)
        try:
            num_ids = sum(map(len, response_ids(pcm, found.pieces[:-1], same_ids=same_ids)))
            if num_ids < pcm_room(pcm, request):
                return found
        except MopeError as error:
            return FailedRollout(request, error)
        return FailedRollout(request, ContextLengthError(f"the answer's {num_ids} tokens do not fit the PCM's context"))


def describe_groups(groups: Iterable[PairGroup]) -> list[str]:
    """What pairs that are under way wait for, in words."""
    ids: dict[str, list[int]] = {}
    for group in groups:
        ids.setdefault(group.stage, []).extend(task.pair_id for task in group.tasks)
    return [f"the {stage} of {len(found)} pairs (the oldest is {min(found)})" for stage, found in ids.items()]
