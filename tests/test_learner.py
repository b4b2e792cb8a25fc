"""The learner recomputes exactly what was sampled, asks no expert, follows the rewards, and survives bad gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from mope_bb.config import Config, parse_config
from mope_bb.errors import TrainingError
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import PreferenceControlModel, build_pcm, load_pcm
from mope_bb.pcm.plans import build_plan
from mope_bb.pcm.pool_sampler import PoolSampler
from mope_bb.pcm.rollouts import Rollout, RolloutRequest, Sampler
from mope_bb.pcm.runner import complete_texts, response_ids
from mope_bb.preferences import parse_preference
from mope_bb.providers.pool import ExpertPool
from mope_bb.training.learner import Learner, LearnerOptions, Pair, Recorded, recompute, sum_by_rollout
from mope_bb.transport import HttpClient
from mope_bb.types import Message, Piece, SamplingOptions
from mope_bb.zoo import DIMENSIONS
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.local import local_config

RULES = (MergeRule("linear"), MergeRule("geometric"), MergeRule("product"))
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
PREFERENCES = ("technical,grumpy", "concise", "simple=0.2,technical=0.5,friendly=0.3", "text:please be brief and kind")
"""Two, one, three and six experts."""
QUESTIONS = ("How do I fix a bike?", "What is a tide?", "Hello")
OPTIONS = SamplingOptions(max_tokens=20)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class World:
    """The experts of the nano zoo, opened once."""

    nano: Zoo
    config: Config
    bench: ExpertBench

    def pcm(self, *, is_new: bool = False) -> PreferenceControlModel:
        """A PCM that knows all experts but one; its scores are 0 if `is_new`, else they depend on what it reads."""
        pcm = build_pcm(str(self.nano.folder("base")), [name for name in DIMENSIONS if name != "friendly"])
        if not is_new:
            pcm.model.score.weight.data.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
            pcm.feature_weights = torch.tensor([0.3, -0.2, 1.0])
        return pcm

    def pairs(self, sampler: Sampler, rule: MergeRule) -> list[Pair]:
        """Two answers for each preference and question; the first has the larger reward in every other pair."""
        asked = [(preference, question) for preference in PREFERENCES for question in QUESTIONS]
        requests = [
            RolloutRequest(
                (Message("user", question),),
                build_plan(self.config, parse_preference(preference), rule, reads_text=True),
                seed=seed,
            )
            for seed, (preference, question) in enumerate(one for one in asked for _ in range(2))
        ]
        return rewarded(found for found in sampler.sample(requests, OPTIONS) if isinstance(found, Rollout))


def rewarded(rollouts: Iterator[Rollout]) -> list[Pair]:
    """Pairs of neighbours with rewards 1 and 0, or 0 and 1."""
    both = list(rollouts)
    return [
        Pair(one, other, (1.0, 0.0) if number % 2 else (0.0, 1.0))
        for number, (one, other) in enumerate(zip(both[::2], both[1::2], strict=True))
    ]


@pytest.fixture(scope="module")
def world(nano: Zoo) -> Iterator[World]:
    """Opened once."""
    config = local_config(nano)
    with ExpertBench(config, [expert.name for expert in config.experts]) as bench:
        yield World(nano, config, bench)


def record(pairs: Sequence[Pair], pcm: PreferenceControlModel, **options: bool) -> Recorded:
    """All rollouts of the pairs."""
    return Recorded([rollout for pair in pairs for rollout in (pair.first, pair.second)], pcm, **options)


def gaps(pairs: Sequence[Pair], pcm: PreferenceControlModel, **options: bool) -> Tensor:
    """How far the present PCM has moved apart each pair's log-ratios, (P,)."""
    recorded = record(pairs, pcm, **options)
    with torch.no_grad():
        logprobs, _ = recompute(pcm, recorded)
    ratios = sum_by_rollout(logprobs.double() - recorded.old_logprobs, recorded).reshape(-1, 2)
    return ratios[:, 0] - ratios[:, 1]


def weights_of(pcm: PreferenceControlModel) -> list[Tensor]:
    """A copy of all that is learned."""
    return [parameter.detach().clone() for parameter in (*pcm.model.parameters(), pcm.feature_weights)]


@every_rule
@pytest.mark.parametrize("is_context_free", [False, True], ids=["context", "context-free"])
def test_recompute_is_what_was_sampled(world: World, rule: MergeRule, is_context_free: bool) -> None:
    """Log-probabilities and weights of mixes of one to six experts, one of them unknown to the PCM, padded together."""
    pcm = world.pcm()
    pairs = world.pairs(world.bench.sampler(pcm, is_context_free=is_context_free), rule)
    recorded = record(pairs, pcm, is_context_free=is_context_free)
    with torch.no_grad():
        logprobs, merged = recompute(pcm, recorded)
    torch.testing.assert_close(logprobs.double(), recorded.old_logprobs, rtol=0, atol=TOLERANCE)
    assert float(gaps(pairs, pcm, is_context_free=is_context_free).abs().max()) < TOLERANCE
    rollouts = [rollout for pair in pairs for rollout in (pair.first, pair.second)]
    assert {len(rollout.request.plan.experts) for rollout in rollouts} == {1, 2, 3, 6}
    parts = torch.split(merged.weights, [len(one) for one in rollouts])
    for weights, rollout in zip(parts, rollouts, strict=True):
        num_experts = rollout.weights.shape[1]
        torch.testing.assert_close(weights[:, :num_experts], rollout.weights, rtol=1e-3, atol=TOLERANCE)
        assert not bool(weights[:, num_experts:].any())


@pytest.mark.parametrize("rule", [RULES[0], RULES[2]], ids=lambda rule: rule.name)
def test_context_free_is_another_policy(world: World, rule: MergeRule) -> None:
    """Recomputed without the ablation under which they were sampled, the answers would have other probabilities."""
    pcm = world.pcm()
    pairs = world.pairs(world.bench.sampler(pcm, is_context_free=True), rule)
    assert float(gaps(pairs, pcm).abs().max()) > 100 * TOLERANCE


@every_rule
def test_recompute_with_a_tokenizer_of_its_own(world: World, rule: MergeRule) -> None:
    """Experts that give bytes without ids: the PCM reads text as it becomes whole, in sampling and learning alike."""
    steps = [{"Ça": 0.4, "Hi": 0.6}, {" va": 0.3, " 🚲": 0.5, "<end>": 0.2}, {"?": 0.4, " très bien": 0.6}]
    flipped = [dict(zip(step, reversed(step.values()), strict=True)) for step in steps]
    experts = [
        {"name": "base", "provider": "scripted", "base": True, "script": steps},
        {"name": "concise", "provider": "scripted", "dimension": "concise", "script": steps},
        {"name": "technical", "provider": "scripted", "dimension": "technical", "script": flipped},
    ]
    config = parse_config({"experts": experts, "cache": {"enabled": False}})
    plan = build_plan(config, parse_preference("concise=0.3,technical=0.7"), rule, reads_text=True)
    pcm = world.pcm(is_new=True)
    pcm.model.score.weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    with ExpertBench(config, [expert.name for expert in config.experts]) as bench:
        sampler = bench.sampler(pcm)
        requests = [RolloutRequest((Message("user", QUESTIONS[0]),), plan, seed) for seed in range(16)]
        found = sampler.sample(requests, OPTIONS)
        assert not bench.reads_expert_ids(pcm)
    assert isinstance(sampler, PoolSampler)
    pairs = rewarded(one for one in found if isinstance(one, Rollout))
    assert len(pairs) == 8
    assert len({rollout.text for pair in pairs for rollout in (pair.first, pair.second)}) > 2
    assert float(gaps(pairs, pcm, same_ids=False).abs().max()) < TOLERANCE
    assert float(gaps(pairs, pcm, same_ids=True).abs().max()) > TOLERANCE


def test_ids_grow_with_whole_characters(world: World) -> None:
    """Characters cut into bytes, and bytes that are none: at every piece the ids are those that sampling has read."""
    pcm = world.pcm()
    pieces = [Piece(bytes([byte])) for byte in "é🚲 ok".encode() + b"\xff\xc3 hi" + "ü".encode()[:1]]
    grown = response_ids(pcm, pieces, same_ids=False)
    assert len(grown) == len(pieces)
    for end in range(len(pieces) + 1):
        read = [token for text in complete_texts(pieces[:end]) for token in pcm.tokenizer.encode_text(text)]
        assert [token for ids in grown[:end] for token in ids] == read
    assert grown[0] == []
    assert grown[1] == list(pcm.tokenizer.encode_text("é"))


def test_learning_asks_no_expert(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the answers are there the experts may be gone: the learner needs none of them."""
    pcm = world.pcm()
    sampler = world.bench.sampler(pcm)
    pairs = world.pairs(sampler, RULES[2])

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("an expert was asked")

    for model in world.bench.models.values():
        monkeypatch.setattr(model.model, "forward", refuse)
    monkeypatch.setattr(ExpertPool, "ask", refuse)
    monkeypatch.setattr(HttpClient, "_request", refuse)
    with pytest.raises(AssertionError, match="an expert was asked"):
        world.pairs(sampler, RULES[2])
    report = Learner(pcm, LearnerOptions(), eta=1.0).step(pairs, seed=0, share_done=0.0)
    assert report.num_optimizer_steps == 2
    assert pcm.policy_version == 1


@every_rule
def test_learning_follows_the_rewards(world: World, rule: MergeRule) -> None:
    """Log-ratios move apart towards the answer with the larger reward, whichever of the two that is."""
    untrained = world.pcm(is_new=True)
    # One expert alone leaves the linear rule nothing to learn.
    pairs = [
        pair
        for pair in world.pairs(world.bench.sampler(untrained), rule)
        if len(pair.first.request.plan.experts) > 1 and pair.first.pieces != pair.second.pieces
    ]
    options = LearnerOptions(learning_rate=3e-3, num_epochs=6, warmup_steps=0, lr_scheduler_type="constant")
    swapped = [Pair(pair.first, pair.second, pair.rewards[::-1]) for pair in pairs]
    for given in (pairs, swapped):
        pcm = world.pcm(is_new=True)
        learner = Learner(pcm, options, eta=2.0)
        first, *_, last = [learner.step(given, seed=seed, share_done=0.0) for seed in range(4)]
        assert last.loss < first.loss < 1.0
        assert last.sign_align == 1.0
        assert 0.0 < last.effective_samples < 1.0
        wanted = torch.tensor([one - other for one, other in (pair.rewards for pair in given)])
        assert bool((gaps(given, pcm) * wanted > 0).all())


@pytest.mark.parametrize("reward", [1e30, math.inf, math.nan])
def test_extreme_rewards_change_nothing(world: World, reward: float) -> None:
    """A gradient that is no number is a TrainingError; the weights stay, and good rewards can be learned from then."""
    pcm = world.pcm()
    pairs = world.pairs(world.bench.sampler(pcm), RULES[0])
    learner = Learner(pcm, LearnerOptions(), eta=1.0)
    before = weights_of(pcm)
    bad = [Pair(pairs[0].first, pairs[0].second, (reward, 0.0)), *pairs[1:]]
    with pytest.raises(TrainingError, match=r"the gradient is (inf|nan) .*the weights were not changed") as caught:
        learner.step(bad, seed=0, share_done=0.0)
    assert "extreme rewards" in str(caught.value.hint)
    assert all(torch.equal(old, new) for old, new in zip(before, weights_of(pcm), strict=True))
    assert pcm.policy_version == 0
    assert math.isfinite(learner.step(pairs, seed=0, share_done=0.0).loss)
    assert all(bool(torch.isfinite(new).all()) for new in weights_of(pcm))


def test_long_gradients_are_clipped(world: World) -> None:
    """However large the rewards, the gradient is cut to max_grad_norm; the report tells how long it was."""
    pcm = world.pcm()
    pairs = world.pairs(world.bench.sampler(pcm), RULES[0])
    huge = [Pair(pair.first, pair.second, (1e6 * pair.rewards[0], 0.0)) for pair in pairs]
    report = Learner(pcm, LearnerOptions(num_epochs=1, max_grad_norm=0.5), eta=1.0).step(huge, seed=0, share_done=0.0)
    gradients = [parameter.grad for parameter in (*pcm.model.parameters(), pcm.feature_weights)]
    length = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
    assert report.grad_norm > 1e3
    assert float(length) == pytest.approx(0.5, rel=1e-3)


def test_features_can_be_left_alone(world: World) -> None:
    """With a rate of 0 the features keep their weights while the PCM learns."""
    pcm = world.pcm()
    pairs = world.pairs(world.bench.sampler(pcm), RULES[0])
    head = pcm.model.score.weight.detach().clone()
    Learner(pcm, LearnerOptions(feature_learning_rate=0.0), eta=1.0).step(pairs, seed=0, share_done=0.0)
    assert pcm.feature_weights.tolist() == pytest.approx([0.3, -0.2, 1.0])
    assert not torch.equal(head, pcm.model.score.weight)


@pytest.mark.parametrize(
    ("name", "expected"), [("cosine", (0.5, 0.0)), ("linear", (0.5, 0.0)), ("constant", (1.0, 1.0))]
)
def test_rate_warms_up_and_follows_the_run(world: World, name: str, expected: tuple[float, float]) -> None:
    """A third and two thirds while it warms up; then what the schedule says in the middle and at the end of the run."""
    pcm = world.pcm()
    pairs = world.pairs(world.bench.sampler(pcm), RULES[0])[:1]
    learner = Learner(pcm, LearnerOptions(learning_rate=0.3, warmup_steps=2, lr_scheduler_type=name), eta=1.0)
    rates = [learner.step(pairs, seed=0, share_done=share).learning_rate for share in (0.9, 0.9, 0.5, 1.0)]
    assert rates == pytest.approx([0.1, 0.2, 0.3 * expected[0], 0.3 * expected[1]])


def test_equal_seeds_learn_equally(world: World) -> None:
    """The order of the pairs is the seed's; nothing else is random."""
    pairs = world.pairs(world.bench.sampler(world.pcm()), RULES[0])
    options = LearnerOptions(per_device_train_batch_size=2)
    found = []
    for seed in (1, 1, 2):
        pcm = load_pcm(str(world.nano.pcm))
        report = Learner(pcm, options, eta=1.0).step(pairs, seed=seed, share_done=0.0)
        assert report.num_optimizer_steps == 2 * len(pairs) / 2
        found.append(pcm.model.score.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
