"""Two ways to sample, one policy: batches of local experts, and `decode` through the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from mope_bb.config import Config, DecodingConfig, parse_config
from mope_bb.errors import ContextLengthError, RequestError
from mope_bb.pcm.actors import Actor
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.gates import Router
from mope_bb.pcm.heads import NoHead, PcmRows
from mope_bb.pcm.local_models import open_local_models
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import PolicyWeights, PreferenceControlModel, build_pcm, load_pcm
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.plans import build_plan
from mope_bb.pcm.pool_sampler import PoolSampler
from mope_bb.pcm.rollouts import FailedRollout, Rollout, RolloutRequest
from mope_bb.pcm.row_lists import LocalModel
from mope_bb.preferences import Preference, parse_preference
from mope_bb.providers.pool import ExpertPool
from mope_bb.training.learner import Learner, LearnerOptions, Pair, Recorded, recompute
from mope_bb.transport import HttpClient
from mope_bb.types import Message, SamplingOptions
from mope_bb.zoo import DIMENSIONS
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.serving import ZooServer

RULES = (MergeRule("linear"), MergeRule("geometric"), MergeRule("product"))
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
PREFERENCES = (
    "technical,grumpy",
    "concise",
    "simple=0.2,technical=0.5,friendly=0.3",
    "grumpy=0.9,technical=0.1",
    "text:please be brief and kind",
    "informative,concise,friendly",
)
"""Different experts, different numbers of them, and the first names two that stand apart in the roster."""
QUESTIONS = ("How do I fix a bike?", "What is a tide?", "Hello", "Can you tell me how to bake bread, please?")
LOGPROB_GAP = 1e-4
"""Forwards of different shapes differ in float32, with a PCM of large scores by up to some 2e-5 in log pi; the shapes
that the pool happens to meet differ from run to run."""


def config_of(nano: Zoo) -> Config:
    """All models of the zoo in this process."""
    experts = [
        {"name": name, "provider": "local", "device": "cpu", "model": str(nano.folder(name)), "top_k": 10 + 2 * number}
        | ({"base": True} if name == "base" else {"dimension": name})
        for number, name in enumerate(("base", *DIMENSIONS))
    ]
    return parse_config({"experts": experts, "cache": {"enabled": False}})


def train(nano: Zoo) -> PreferenceControlModel:
    """A PCM whose scores depend on what it reads, and which does not know every expert."""
    pcm = build_pcm(str(nano.folder("base")), [name for name in DIMENSIONS if name != "friendly"])
    pcm.model.score.weight.data.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
    pcm.feature_weights = torch.tensor([0.3, -0.2, 1.0])
    pcm.policy_version = 7
    return pcm


class Paths:
    """The same experts behind both samplers."""

    def __init__(self, nano: Zoo) -> None:
        self.config = config_of(nano)
        self.models: dict[str, LocalModel] = open_local_models(self.config.experts)
        self.pool = ExpertPool(self.config.experts, cache=None)
        self.runner = asyncio.Runner()
        self.pcm = train(nano)

    def requests(
        self, rule: MergeRule, preferences: Sequence[str] = PREFERENCES, questions: Sequence[str] = QUESTIONS
    ) -> list[RolloutRequest]:
        """One request for each preference, the questions in turn."""
        return [
            RolloutRequest(
                (Message("user", questions[number % len(questions)]),),
                build_plan(self.config, parse_preference(text), rule, reads_text=True),
                seed=100 + number,
            )
            for number, text in enumerate(preferences)
        ]

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        options: SamplingOptions,
        pcm: PreferenceControlModel | None,
        **settings: Any,
    ) -> tuple[list[Rollout | FailedRollout], list[Rollout | FailedRollout]]:
        """By batches, and through the pool."""
        gate = settings.pop("gate", None)
        head = NoHead(gate) if pcm is None else PcmRows(pcm)
        batches = LocalSampler(self.models, head, **settings).sample(requests, options)
        return batches, PoolSampler(
            self.pool, self.runner, pcm, pace=Pace(DecodingConfig(mode="lockstep")), gate=gate
        ).sample(requests, options)


@pytest.fixture(scope="module")
def paths(nano: Zoo) -> Iterator[Paths]:
    """Opened once."""
    found = Paths(nano)
    yield found
    with found.runner:
        found.runner.run(found.pool.aclose())


def check_equal(one: Rollout | FailedRollout, other: Rollout | FailedRollout, *, shaped: bool = False) -> None:
    """Equal in all that a rollout records. `shaped`: temperature or top_p, under which `decode` records otherwise."""
    assert isinstance(one, Rollout)
    assert isinstance(other, Rollout)
    assert one.request == other.request
    assert one.pieces == other.pieces
    assert one.finish_reason == other.finish_reason
    assert one.policy_version == other.policy_version
    assert torch.equal(one.index, other.index)
    near = partial(torch.testing.assert_close, rtol=1e-4, atol=LOGPROB_GAP)
    if not shaped:
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=LOGPROB_GAP)
    near(one.weights, other.weights)
    near(one.entropies, other.entropies)
    near(one.lists.logprobs, other.lists.logprobs)
    near(one.lists.floors, other.lists.floors)
    near(one.lists.tails, other.lists.tails)


@every_rule
@pytest.mark.parametrize("has_pcm", [False, True], ids=["user", "pcm"])
def test_both_paths_give_the_same_rollouts(paths: Paths, rule: MergeRule, has_pcm: bool) -> None:
    """Equal seeds, equal answers, equal records: with mixed preferences, in one batch and in batches of two."""
    options = SamplingOptions(max_tokens=24)
    requests = paths.requests(rule)
    pcm = paths.pcm if has_pcm else None
    batches, pooled = paths.sample(requests, options, pcm)
    small, _ = paths.sample(requests, options, pcm, batch_size=2) if has_pcm else (batches, None)
    for one, other, third in zip(batches, pooled, small, strict=True):
        check_equal(one, other)
        check_equal(one, third)
    assert len({len(rollout) for rollout in batches if isinstance(rollout, Rollout)}) > 1 or rule.name == "geometric"


@every_rule
def test_both_paths_shape_alike(paths: Paths, rule: MergeRule) -> None:
    """Temperature 0.7 and top_p 0.9 draw the same pieces."""
    options = SamplingOptions(max_tokens=16, temperature=0.7, top_p=0.9)
    for one, other in zip(*paths.sample(paths.requests(rule), options, paths.pcm), strict=True):
        check_equal(one, other, shaped=True)


@pytest.mark.parametrize("feature", ["entropy", "divergence"])
def test_both_paths_route_alike(paths: Paths, feature: Any) -> None:
    """A router chooses the same expert at each step."""
    options = SamplingOptions(max_tokens=12)
    requests = paths.requests(RULES[0])
    for one, other in zip(*paths.sample(requests, options, None, gate=Router(feature)), strict=True):
        check_equal(one, other)
        assert isinstance(one, Rollout)
        assert bool((one.weights.amax(dim=-1) == 1).all())


def test_max_tokens_cuts_both_alike(paths: Paths) -> None:
    """An answer that would go on ends with reason "length" after exactly so many pieces."""
    options = SamplingOptions(max_tokens=3)
    batches, pooled = paths.sample(paths.requests(RULES[0]), options, paths.pcm)
    reasons = set()
    for one, other in zip(batches, pooled, strict=True):
        check_equal(one, other)
        assert isinstance(one, Rollout)
        assert len(one) <= 3
        assert len(one) == 3 or one.finish_reason == "stop"
        reasons.add(one.finish_reason)
    assert "length" in reasons


def test_the_end_of_the_context_ends_both_alike(paths: Paths) -> None:
    """An answer that reaches the end of an expert's context ends there with reason "length"."""
    tokenizer = paths.models["base"].tokenizer
    limit = paths.models["base"].max_length
    words = "bike"
    while len(tokenizer.encode_chat((Message("user", words),))) < limit - 4:
        words += " bike"
    requests = paths.requests(RULES[0], questions=[words])
    short = limit - len(tokenizer.encode_chat(requests[0].messages)) + 1
    batches, pooled = paths.sample(requests[:3], SamplingOptions(max_tokens=50), None)
    for one, other in zip(batches, pooled, strict=True):
        check_equal(one, other)
        assert isinstance(one, Rollout)
        assert len(one) <= short
    assert any(isinstance(one, Rollout) and one.finish_reason == "length" and len(one) == short for one in batches)


@pytest.mark.parametrize("has_pcm", [False, True], ids=["user", "pcm"])
def test_a_bad_prompt_costs_nobody_else(paths: Paths, has_pcm: bool) -> None:
    """A prompt beyond the context, and one with a control token, fail alone; the others are as without them."""
    options = SamplingOptions(max_tokens=8)
    pcm = paths.pcm if has_pcm else None
    good = paths.requests(RULES[2], PREFERENCES[:3])
    bad = paths.requests(RULES[2], PREFERENCES[:2], ["bike " * 3000, "What is <|end|>?"])
    alone, _ = paths.sample(good, options, pcm)
    batches, pooled = paths.sample([good[0], bad[0], good[1], bad[1], good[2]], options, pcm)
    for found in (batches, pooled):
        for place, expected in ((0, alone[0]), (2, alone[1]), (4, alone[2])):
            check_equal(found[place], expected)
        first, second = found[1], found[3]
        assert isinstance(first, FailedRollout)
        assert isinstance(second, FailedRollout)
        assert (first.request, type(first.error)) == (bad[0], ContextLengthError)
        assert (second.request, type(second.error)) == (bad[1], RequestError)


def test_all_may_fail(paths: Paths) -> None:
    """A batch of nothing but bad prompts is a list of failures."""
    bad = paths.requests(RULES[0], PREFERENCES[:2], ["What is <|end|>?"])
    for found in paths.sample(bad, SamplingOptions(max_tokens=4), paths.pcm):
        assert [type(one) for one in found] == [FailedRollout, FailedRollout]


def test_a_preference_that_cannot_be_read_costs_nobody_else(paths: Paths) -> None:
    """A sentence with a control token fails where a PCM reads it, and alone."""
    sentence = Preference(text="Be <|end|> brief.")
    good = paths.requests(RULES[0], PREFERENCES[:1])[0]
    plan = build_plan(paths.config, sentence, RULES[0], reads_text=True)
    requests = [good, RolloutRequest(good.messages, plan, 5)]
    for first, second in paths.sample(requests, SamplingOptions(max_tokens=4), paths.pcm):
        assert isinstance(first, Rollout)
        assert isinstance(second, FailedRollout)
        assert "control token" in str(second.error)


def test_progress_counts_the_answers(paths: Paths) -> None:
    """Both tell how many answers are finished, of how many, up to all of them."""
    requests = paths.requests(RULES[0])
    for sampler in (
        LocalSampler(paths.models, NoHead(), batch_size=4),
        PoolSampler(paths.pool, paths.runner, None, pace=Pace()),
    ):
        told: list[tuple[int, int]] = []
        sampler.sample(requests, SamplingOptions(max_tokens=2), progress=lambda *counts, told=told: told.append(counts))
        assert told[-1] == (6, 6)
        assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_bench_chooses_the_path(nano: Zoo, paths: Paths) -> None:
    """All local: batches, unless the PCM has a tokenizer of its own; the numbers are the same."""
    with ExpertBench(paths.config, ["concise", "grumpy"]) as bench:
        assert sorted(bench.models) == ["concise", "grumpy"]
        assert isinstance(bench.sampler(), LocalSampler)
        assert isinstance(bench.sampler(load_pcm(str(nano.pcm))), LocalSampler)
        assert bench.reads_expert_ids(paths.pcm)
        requests = paths.requests(RULES[0], ["concise,grumpy"])
        (found,) = bench.sampler(paths.pcm).sample(requests, SamplingOptions(max_tokens=6))
    ((expected,), _) = paths.sample(requests, SamplingOptions(max_tokens=6), paths.pcm)
    check_equal(found, expected)


async def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """What an expert says that must not be asked."""
    raise AssertionError("an expert was asked")


@pytest.mark.parametrize("rule", [RULES[0], RULES[2]], ids=lambda rule: rule.name)
def test_served_experts_can_be_learned_from(
    nano_experts: ZooServer, nano: Zoo, rule: MergeRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through llama.cpp `recompute` reproduces the log-probabilities, before learning, which asks nobody, and after."""
    config = nano_experts.config()
    pcm = train(nano)
    with ExpertBench(config, [expert.name for expert in config.experts]) as bench:
        requests = [
            RolloutRequest(
                (Message("user", QUESTIONS[number % 4]),),
                build_plan(config, parse_preference(text), rule, reads_text=True),
                seed=number,
            )
            for number, text in enumerate(PREFERENCES)
        ]
        sampler = bench.sampler(pcm)
        assert isinstance(sampler, PoolSampler)
        options = SamplingOptions(max_tokens=12)
        for version in (7, 8):
            rollouts = [found for found in sampler.sample(requests, options) if isinstance(found, Rollout)]
            assert bench.reads_expert_ids(pcm)
            assert len(rollouts) == len(requests)
            assert {rollout.policy_version for rollout in rollouts} == {version}
            recorded = Recorded(rollouts, pcm)
            with torch.no_grad():
                logprobs, _ = recompute(pcm, recorded)
            torch.testing.assert_close(logprobs.double(), recorded.old_logprobs, rtol=0, atol=1e-4)
            if version == 7:
                pairs = [Pair(one, other, (1.0, 0.0)) for one, other in zip(rollouts[::2], rollouts[1::2], strict=True)]
                with monkeypatch.context() as patched:
                    patched.setattr(HttpClient, "_request", refuse)
                    Learner(pcm, LearnerOptions(), eta=1.0).step(pairs, seed=0, share_done=0.0)


def test_new_weights_within_an_answer(nano_experts: ZooServer, nano: Zoo) -> None:
    """An actor goes on with newer weights at the next token; each token's logprob is that of the version it names."""
    config = nano_experts.config()
    pcm = train(nano)
    newer = replace(pcm, model=deepcopy(pcm.model), feature_weights=pcm.feature_weights + 0.5, policy_version=8)
    with torch.no_grad():
        newer.model.score.weight.mul_(-2.0)
    request = RolloutRequest(
        (Message("user", QUESTIONS[0]),),
        build_plan(config, parse_preference("concise,friendly"), RULES[0], reads_text=True),
        seed=3,
    )

    async def sample(actor: Actor) -> Rollout | FailedRollout:
        async def change() -> None:
            while bench.num_requests < asked + 12:  # noqa: ASYNC110  # nobody tells when a request is sent
                await asyncio.sleep(0)
            await actor.load(PolicyWeights.of(newer))

        await bench.open()
        asked = bench.num_requests
        changing = asyncio.ensure_future(change())
        (found,) = await actor.sample([request], SamplingOptions(max_tokens=12))
        await changing
        await actor.aclose()
        return found

    with ExpertBench(config, [expert.name for expert in config.experts]) as bench:
        rollout = bench.run(sample(bench.actor(pcm, max_in_flight=2)))
        assert isinstance(rollout, Rollout)
        versions = rollout.policy_versions
        assert set(versions.tolist()) == {7, 8}
        assert (rollout.policy_version, versions.tolist()) == (7, sorted(versions.tolist()))
        for policy in (pcm, newer):
            recorded = Recorded([rollout], policy)
            with torch.no_grad():
                logprobs, _ = recompute(policy, recorded)
            own = versions == policy.policy_version
            torch.testing.assert_close(logprobs.double()[own], recorded.old_logprobs[own], rtol=0, atol=1e-4)
            assert not torch.allclose(logprobs.double()[~own], recorded.old_logprobs[~own], rtol=0, atol=1e-4)


def test_folders_are_loaded_once(nano: Zoo, tmp_path: Path) -> None:
    """Experts that speak through one folder share its weights; each keeps its own system prompt and list."""
    shared = {"provider": "local", "device": "cpu", "model": str(nano.folder("base"))}
    experts = [
        {"name": "plain", **shared, "top_k": 5},
        {"name": "brief", **shared, "system": "Be brief.", "dimension": "brief"},
    ]
    models = open_local_models(parse_config({"experts": experts}).experts)
    assert models["plain"].model is models["brief"].model
    assert (models["plain"].top_k, models["brief"].top_k) == (5, 20)
    assert (models["plain"].system, models["brief"].system) == (None, "Be brief.")
