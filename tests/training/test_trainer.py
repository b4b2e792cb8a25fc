"""The whole loop on the nano zoo, two small batches at a time: what it writes, drops, keeps and leaves out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mope_bb.config import Config, parse_config
from mope_bb.errors import AllRolloutsFailedError, ConfigError, TrainingError
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.heads import pcm_prompt_ids
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import load_pcm
from mope_bb.pcm.rollouts import FailedRollout, Rollout, RolloutRequest
from mope_bb.rewards.base import RewardPanel, win_probability
from mope_bb.rewards.function import FunctionReward
from mope_bb.training.learner import OTHER_DEFAULTS, PRODUCT_DEFAULTS, Learner, LearnerReport, Pair
from mope_bb.training.ledger import Ledger
from mope_bb.training.metrics import StepMetrics
from mope_bb.training.rebel import choose_eta
from mope_bb.training.runs import Ablation, Prompts, TrainingSetup
from mope_bb.training.scoring import prompt_key
from mope_bb.training.tasks import reference_expert, served_dimensions
from mope_bb.training.trainer import Trainer, shuffle_rewards
from mope_bb.types import Message
from mope_bb.zoo import DIMENSIONS
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.local import local_config

Score = Callable[[list[dict[str, Any]], str], float]
SMALL = {
    "max_steps": 2,
    "max_minutes": None,
    "batch_size": 4,
    "per_device_train_batch_size": 4,
    "max_tokens": 8,
    "max_staleness": 0,
}
TIMES = ("seconds", "learner_idle_s", "rollouts_idle_s")
"""Columns of metrics.jsonl that are never twice the same."""
PROMPTS: Prompts = tuple((Message("user", f"How do I fix a {thing}?"),) for thing in ("bike", "chair", "boat"))


def score(messages: list[dict[str, Any]], answer: str) -> float:
    """Any reward that tells answers apart."""
    return random.Random(answer).gauss(0.0, 1.0)


@dataclass
class Seen:
    """What a run did, seen from outside."""

    rollouts: list[list[Rollout | FailedRollout]] = field(default_factory=list)
    """What each call of a sampler gave."""
    windows: list[list[Pair]] = field(default_factory=list)
    """What each step of the learner was given."""

    def asked(self) -> list[set[str]]:
        """The styled experts of every answer but the references."""
        found = (set(one.request.plan.experts) for batch in self.rollouts for one in batch)
        return [names for names in found if names != {"base"}]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Watch samplers and learners."""
    found = Seen()
    sample, step = LocalSampler.sample, Learner.step

    def watched_sample(self: LocalSampler, *args: Any, **options: Any) -> list[Rollout | FailedRollout]:
        found.rollouts.append(sample(self, *args, **options))
        return found.rollouts[-1]

    def watched_step(self: Learner, pairs: Sequence[Pair], **options: Any) -> LearnerReport:
        found.windows.append(list(pairs))
        return step(self, pairs, **options)

    monkeypatch.setattr(LocalSampler, "sample", watched_sample)
    monkeypatch.setattr(Learner, "step", watched_step)
    return found


@dataclass(frozen=True)
class Runs:
    """Makes trainers that share the zoo's models."""

    nano: Zoo
    bench: ExpertBench
    folder: Path

    def trainer(
        self,
        *,
        rule: str = "product",
        reward: Score = score,
        prompts: Prompts = PROMPTS,
        folder: str = "run",
        ablation: Ablation | None = None,
        **settings: Any,
    ) -> Trainer:
        """A trainer of a fresh PCM; `settings` are those of [train]."""
        path = self.folder / folder
        return Trainer(
            TrainingSetup(
                config=local_config(self.nano, train={**SMALL, **settings}),
                rule=MergeRule("linear") if rule == "linear" else MergeRule("product"),
                pcm=load_pcm(str(self.nano.pcm)),
                bench=self.bench,
                panel=RewardPanel({name: FunctionReward(name, reward) for name in DIMENSIONS}),
                prompts=prompts,
                output_dir=path,
                ablation=ablation or Ablation(),
            )
        )

    def metrics(self, folder: str = "run") -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without the times they took."""
        lines = (self.folder / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(row["seconds"] > 0 for row in rows)
        return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]

    def references(self, folder: str = "run") -> dict[str, str]:
        """Question -> reference answer, as the ledger of a run has them."""
        with Ledger(self.folder / folder) as ledger:
            return {json.loads(key)[-1]["content"]: text for key, (text, _) in ledger.references().items()}

    def put_reference(self, prompt: tuple[Message, ...], text: str, folder: str = "run") -> None:
        """Give a run that is to begin a reference answer."""
        with Ledger(self.folder / folder) as ledger:
            ledger.put_references({prompt_key(prompt): text})


@pytest.fixture(scope="module")
def bench(nano: Zoo) -> Iterator[ExpertBench]:
    """The zoo's models, opened once."""
    config = local_config(nano)
    with ExpertBench(config, [expert.name for expert in config.experts]) as opened:
        yield opened


@pytest.fixture
def runs(nano: Zoo, bench: ExpertBench, tmp_path: Path) -> Runs:
    """Runs below a folder of this test."""
    return Runs(nano, bench, tmp_path)


@pytest.mark.parametrize("rule", ["linear", "product"])
def test_a_run_leaves_metrics_and_a_pcm(runs: Runs, rule: str) -> None:
    """A row for each batch, told as it is written; a checkpoint of the rule; what was asked for, in run.json."""
    told: list[tuple[StepMetrics, float]] = []
    runs.trainer(rule=rule).run(lambda metrics, share: told.append((metrics, share)))
    rows = runs.metrics()
    assert [row["step"] for row in rows] == [metrics.step for metrics, _ in told] == [1, 2]
    assert [share for _, share in told] == [0.5, 1.0]
    for row, (metrics, _) in zip(rows, told, strict=True):
        assert set(row) == {one.name for one in fields(StepMetrics)} - set(TIMES)
        assert row["loss"] == metrics.loss > 0
        assert row["num_pairs"] == 4
        assert row["num_dropped"] == 0
        assert 0 < row["reward"] < 1
        assert 0 < row["num_tokens"] <= 8
    assert rows[0]["eta"] == rows[1]["eta"]
    pcm = load_pcm(str(runs.folder / "run" / "checkpoints" / "last"))
    assert (pcm.rule, pcm.policy_version) == (rule, 2)
    assert bool(pcm.model.score.weight.any())
    assert bool(pcm.feature_weights.any())
    document = json.loads((runs.folder / "run" / "run.json").read_text())
    assert (document["rule"], document["reference"], document["num_prompts"]) == (rule, "base", 3)
    assert document["train"]["batch_size"] == 4


def test_equal_seeds_train_equally(runs: Runs) -> None:
    """Metrics and weights are equal to the last bit; another seed gives others."""
    for folder, seed in (("one", 5), ("two", 5), ("three", 6)):
        runs.trainer(folder=folder, seed=seed).run()
    one, two, three = (load_pcm(str(runs.folder / name / "checkpoints" / "last")) for name in ("one", "two", "three"))
    assert str(runs.metrics("one")) == str(runs.metrics("two"))  # as text NaN is equal to itself
    assert torch.equal(one.model.score.weight, two.model.score.weight)
    assert one.feature_weights.tolist() == two.feature_weights.tolist()
    assert runs.metrics("one") != runs.metrics("three")
    assert not torch.equal(one.model.score.weight, three.model.score.weight)


def test_an_answer_without_score_costs_its_pair_only(runs: Runs, seen: Seen) -> None:
    """Pairs with an answer whose reward is NaN are left out and counted; all the others are learned from."""

    def is_bad(rollout: Rollout | FailedRollout) -> bool:
        return isinstance(rollout, FailedRollout) or rollout.text in bad

    def partly(messages: list[dict[str, Any]], answer: str) -> float:
        if answer != "the reference" and random.Random(answer).random() < 0.25:
            bad.add(answer)
        return math.nan if answer in bad else score(messages, answer)

    bad: set[str] = set()
    runs.put_reference(PROMPTS[0], "the reference")
    runs.trainer(reward=partly, prompts=PROMPTS[:1], batch_size=40, max_steps=1).run()
    answers = max(seen.rollouts, key=len)
    pairs = list(zip(answers[:40], answers[40:], strict=True))
    whole = [(one, other) for one, other in pairs if not (is_bad(one) or is_bad(other))]
    assert {(is_bad(one), is_bad(other)) for one, other in pairs} >= {(True, False), (False, True), (False, False)}
    assert [(pair.first, pair.second) for pair in seen.windows[0]] == whole
    (row,) = runs.metrics()
    assert (row["num_pairs"], row["num_dropped"]) == (len(whole), 40 - len(whole))


def test_without_any_score_the_run_ends(runs: Runs) -> None:
    """One error that names the batch and the reason; no row and no checkpoint pretend that anything was learned."""
    with pytest.raises(AllRolloutsFailedError, match=r"none of the 4 pairs of batch 0 .* is nan, not a finite number"):
        runs.trainer(reward=lambda messages, answer: math.nan).run()
    assert not (runs.folder / "run" / "metrics.jsonl").exists()
    assert not (runs.folder / "run" / "checkpoints").exists()


def test_equal_rewards_end_the_run(runs: Runs) -> None:
    """Where no answer is better than another there is nothing to learn: an error that says so."""
    with pytest.raises(TrainingError, match="all rewards of the first batches are equal"):
        runs.trainer(reward=lambda messages, answer: 1.0).run()


def test_a_bad_prompt_costs_its_pairs_only(runs: Runs, seen: Seen) -> None:
    """A prompt that no model reads is dropped whenever it is drawn; the run goes on."""
    bad = (Message("user", "What is <|end|>?"),)
    runs.trainer(prompts=(PROMPTS[0], bad), batch_size=8).run()
    for row, pairs in zip(runs.metrics(), seen.windows, strict=True):
        assert {pair.first.request.messages for pair in pairs} == {PROMPTS[0]}
        assert row["num_dropped"] == 8 - len(pairs) > 0


def test_nothing_but_bad_prompts_says_why(runs: Runs) -> None:
    """The reason of the last failure is in the error."""
    with pytest.raises(AllRolloutsFailedError, match=r"none of the 4 pairs .*<\|end\|>.*control token"):
        runs.trainer(prompts=((Message("user", "What is <|end|>?"),),)).run()


def test_a_reference_that_fails_is_the_reason(runs: Runs) -> None:
    """Where only the reference responses cannot be had, the error names their expert and what went wrong."""
    config = local_config(runs.nano)
    experts = [one.model_copy(update={"system": "<|end|>"} if one.base else {}) for one in config.experts]
    with ExpertBench(config.model_copy(update={"experts": tuple(experts)}), [one.name for one in experts]) as bench:
        trainer = Runs(runs.nano, bench, runs.folder).trainer(rule="linear")
        with pytest.raises(AllRolloutsFailedError, match=r"none of the 4 pairs .*reason: expert 'base': .*<\|end\|>"):
            trainer.run()


def test_references_are_sampled_once_and_kept(runs: Runs, seen: Seen) -> None:
    """One per prompt, by the base, before the batch that needs it is scored."""
    runs.trainer(prompts=PROMPTS[:1], max_steps=3).run()
    (reference,) = (batch for batch in seen.rollouts if batch[0].request.plan.experts == ("base",))
    assert isinstance(reference[0], Rollout)
    assert runs.references() == {PROMPTS[0][0].content: reference[0].text}


def test_rewards_are_measured_against_the_reference(runs: Runs, seen: Seen) -> None:
    """A reference that was there before a run is the one that counts."""
    runs.put_reference(PROMPTS[0], "the one")

    def measure(messages: list[dict[str, Any]], answer: str) -> float:
        return 5.0 if answer == "the one" else score(messages, answer)

    runs.trainer(prompts=PROMPTS[:1], reward=measure).run()
    for pair in (pair for pairs in seen.windows for pair in pairs):
        expected = [win_probability(score([], rollout.text), 5.0) for rollout in (pair.first, pair.second)]
        assert pair.rewards == pytest.approx(expected)


def test_left_out_combinations_are_never_asked_for(runs: Runs, seen: Seen) -> None:
    """Of four pairs of poles three are left out: only the fourth is trained on."""
    axes = (("concise", "informative"), ("friendly", "grumpy"))
    left_out = (("friendly", "concise"), ("informative", "grumpy"), ("informative", "friendly"))
    mix = {"axes": axes, "leave_out": left_out, "opposites": 0, "sizes": (0, 1, 0), "sentences": 0}
    runs.trainer(preferences=mix, batch_size=16, max_steps=1).run()
    assert len(seen.asked()) == 32
    assert {frozenset(names) for names in seen.asked()} == {frozenset(("concise", "grumpy"))}


def test_two_answers_of_a_pair_are_independent(runs: Runs, seen: Seen) -> None:
    """The same question, plan and policy, other seeds."""
    runs.trainer(max_steps=1, batch_size=8).run()
    (pairs,) = seen.windows
    for pair in pairs:
        one, other = pair.first.request, pair.second.request
        assert (one.messages, one.plan) == (other.messages, other.plan)
        assert one.seed != other.seed
    assert any(pair.first.text != pair.second.text for pair in pairs)


def test_the_window_holds_the_last_batches(runs: Runs, seen: Seen) -> None:
    """window = 2: each step learns from its own batch and the one before."""
    runs.trainer(window=2, max_steps=3, max_staleness=1).run()
    assert [len(pairs) for pairs in seen.windows] == [4, 8, 8]
    assert seen.windows[2][:4] == seen.windows[1][4:]


@pytest.mark.parametrize(("rule", "defaults"), [("product", PRODUCT_DEFAULTS), ("linear", OTHER_DEFAULTS)])
def test_eta_follows_the_first_rewards(runs: Runs, seen: Seen, rule: str, defaults: dict[str, float]) -> None:
    """eta = "auto" asks the first batch for the rule's log-ratio, or for the one that is set; a number stands."""
    runs.trainer(rule=rule, max_steps=1).run()
    differences = [pair.rewards[0] - pair.rewards[1] for pair in seen.windows[0]]
    expected = choose_eta(differences, target=defaults["target_log_ratio"])
    assert runs.metrics()[0]["eta"] == pytest.approx(expected)
    runs.trainer(rule=rule, max_steps=1, folder="asked", target_log_ratio=0.25).run()
    assert runs.metrics("asked")[0]["eta"] == pytest.approx(choose_eta(differences, target=0.25))
    runs.trainer(rule=rule, max_steps=1, folder="given", eta=7.5).run()
    assert runs.metrics("given")[0]["eta"] == 7.5


def test_a_limit_on_time_ends_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of at most 2 minutes ends after the batch in which they are over, and its schedule knows."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("mope_bb.training.trainer.time", SimpleNamespace(monotonic=lambda: clock.now))
    shares = []

    def told(metrics: StepMetrics, share: float) -> None:
        clock.now += 60.0
        shares.append(share)

    clock.now = 1.0
    trainer = runs.trainer(max_steps=100, max_minutes=2.0)
    clock.now = 50.0  # opening everything does not count
    trainer.run(told)
    assert shares == pytest.approx([0.01, 0.5])
    assert load_pcm(str(runs.folder / "run" / "checkpoints" / "last")).policy_version == 2


@pytest.mark.parametrize("is_context_free", [False, True])
def test_features_can_be_left_out(runs: Runs, seen: Seen, is_context_free: bool) -> None:
    """Without features their weights stay 0; without context too, and the weights stay the same along an answer."""
    runs.trainer(ablation=Ablation(uses_features=False, is_context_free=is_context_free)).run()
    pcm = load_pcm(str(runs.folder / "run" / "checkpoints" / "last"))
    assert not bool(pcm.feature_weights.any())
    assert bool(pcm.model.score.weight.any())
    later = [pair.first.weights for pair in seen.windows[1] if len(pair.first) > 1]
    assert all(bool((weights == weights[:1]).all()) for weights in later) is is_context_free


def test_shuffled_rewards_are_the_same_numbers(runs: Runs, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner gets the batch's own rewards, dealt out anew; the answers stay in their pairs."""
    given: list[list[Pair]] = []

    def watched(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
        given.append(list(pairs))
        return shuffle_rewards(pairs, rng)

    monkeypatch.setattr("mope_bb.training.trainer.shuffle_rewards", watched)
    runs.trainer(ablation=Ablation(shuffles_rewards=True), batch_size=12).run()
    for before, after in zip(given, seen.windows, strict=True):
        assert [(pair.first, pair.second) for pair in after] == [(pair.first, pair.second) for pair in before]
        rewards = [[reward for pair in pairs for reward in pair.rewards] for pairs in (before, after)]
        assert rewards[0] != rewards[1]
        assert sorted(rewards[0]) == sorted(rewards[1])


def test_an_adapter_can_be_trained(runs: Runs) -> None:
    """lora_rank trains an adapter: the checkpoint is a plain PCM whose embeddings are untouched."""
    runs.trainer(lora_rank=2).run()
    folder = runs.folder / "run" / "checkpoints" / "last"
    pcm, before = load_pcm(str(folder)), load_pcm(str(runs.nano.pcm))
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert torch.equal(pcm.model.model.embed_tokens.weight, before.model.model.embed_tokens.weight)
    assert bool(pcm.model.score.weight.any())
    assert pcm.policy_version == 2


def config_of(*experts: dict[str, Any], **train: Any) -> Config:
    """Scripted experts."""
    return parse_config({"experts": [{"provider": "scripted", **one} for one in experts], "train": train})


def test_what_cannot_be_trained_is_told() -> None:
    """No dimension, no reference, or a reference that is no expert: each one ConfigError."""
    plain, styled = {"name": "plain", "base": True}, {"name": "styled", "dimension": "concise"}
    with pytest.raises(ConfigError, match="no expert has a dimension"):
        served_dimensions(config_of(plain))
    with pytest.raises(ConfigError, match="no expert is the base"):
        reference_expert(config_of(styled))
    with pytest.raises(ConfigError, match="'plian', which is no expert"):
        reference_expert(config_of(plain, styled, reference="plian"))
    assert served_dimensions(config_of(plain, styled)) == ["concise"]
    assert reference_expert(config_of(plain, styled)) == "plain"
    assert reference_expert(config_of(plain, styled, reference="styled")) == "styled"


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_is_trained_is_trained_in_float32(nano: Zoo, runs: Runs, lora_rank: int) -> None:
    """A PCM that was loaded in bfloat16, as on a GPU, learns with float32 weights: all of them, or its adapter."""
    setup = runs.trainer(max_steps=1)._setup
    setup.pcm.model.bfloat16()
    config = local_config(nano, train={**SMALL, "max_steps": 1, "lora_rank": lora_rank})
    trainer = Trainer(replace(setup, config=config))
    trained = {name: value for name, value in setup.pcm.model.named_parameters() if value.requires_grad}
    assert {value.dtype for name, value in trained.items() if "lora" in name or not lora_rank} == {torch.float32}
    trainer.run()
    assert setup.pcm.policy_version == 1


def runs_requests(trainer: Trainer) -> list[RolloutRequest]:
    """Some of the requests that a run may make."""
    return [request for pair_id in range(25) for request in trainer._source.task(pair_id).requests]


def test_an_answer_beyond_the_pcm_is_not_learned_from(runs: Runs, seen: Seen) -> None:
    """Answers end where the PCM's context ends, so that each one that is learned from can be recomputed."""
    trainer = runs.trainer(max_steps=1, prompts=PROMPTS[:1])
    pcm = trainer._setup.pcm
    longest = 4 + max(len(pcm_prompt_ids(pcm, request)) for request in runs_requests(trainer))
    pcm.model.config.max_position_embeddings = longest
    trainer.run()
    for rollout in (one for pair in seen.windows[0] for one in (pair.first, pair.second)):
        assert len(pcm_prompt_ids(pcm, rollout.request)) + len(rollout) - 1 <= longest


def test_a_prompt_beyond_the_pcm_ends_the_run(runs: Runs) -> None:
    """Where the PCM can read no prompt at all the error says how much it reads."""
    trainer = runs.trainer(max_steps=1)
    trainer._setup.pcm.model.config.max_position_embeddings = 3
    with pytest.raises(AllRolloutsFailedError, match="the PCM reads at most 3"):
        trainer.run()
