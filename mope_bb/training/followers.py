"""What the first learner process tells the others, and what they do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from safetensors.torch import load, save

from mope_bb.config import TrainConfig
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import PolicyWeights, PreferenceControlModel
from mope_bb.training.learner import Learner, LessonPlan, Pair, open_learner, prepare_pcm
from mope_bb.training.records import decode_rollout, encode_rollout
from mope_bb.training.tasks import TaskSource
from mope_bb.training.team import Message, Team

END_MESSAGE: Final = Message({"kind": "end"})


def begin_message(how: LessonPlan, learner: Learner, weights: PolicyWeights, *, num_steps: int) -> Message:
    """Where the run stands: `weights` and the optimiser after `num_steps` batches."""
    facts = {
        "kind": "begin",
        "how": asdict(how),
        "num_steps": num_steps,
        "policy_version": weights.policy_version,
    }
    own = {"features": weights.feature_weights.contiguous()}
    return Message(facts, [save(dict(weights.tensors)), save(own), save(learner.state())])


def lesson_message(pairs: Sequence[Pair], *, seed: int, share_done: float) -> Message:
    """A batch to learn from."""
    facts = {
        "kind": "lesson",
        "seed": seed,
        "share_done": share_done,
        "pairs": [[pair.pair_id, *pair.rewards] for pair in pairs],
    }
    return Message(facts, [encode_rollout(one) for pair in pairs for one in (pair.first, pair.second)])


def follow(team: Team, pcm: PreferenceControlModel, options: TrainConfig, rule: MergeRule, source: TaskSource) -> None:
    """Learn along with the first process until it ends."""
    prepare_pcm(pcm, options, rule)
    learner: Learner | None = None
    while (message := team.listen()).facts["kind"] != "end":
        facts = message.facts
        if facts["kind"] == "begin":
            tensors, own, optimizer = (load(part) for part in message.parts)
            learner = open_learner(pcm, options, LessonPlan(**facts["how"]), team=team)
            with_weights = PolicyWeights(tensors, own["features"], facts["policy_version"])
            with_weights.load_into(pcm)
            learner.load_state(optimizer, num_steps=facts["num_steps"])
        else:
            assert learner is not None
            learner.learn(_pairs_of(message, source), seed=facts["seed"], share_done=facts["share_done"])


def _pairs_of(message: Message, source: TaskSource) -> list[Pair]:
    """The pairs of a lesson; their requests follow from their numbers."""
    pairs = []
    for place, (pair_id, first_reward, second_reward) in enumerate(message.facts["pairs"]):
        requests = source.task(pair_id).requests
        first, second = (
            decode_rollout(message.parts[2 * place + which], request) for which, request in enumerate(requests)
        )
        pairs.append(Pair(first, second, (first_reward, second_reward), pair_id))
    return pairs
