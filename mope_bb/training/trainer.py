"""The training loop, synchronous and in one place: draw, sample, score, learn, save.

prompts, preferences -> two rollouts each -> rewards against the reference response -> REBEL on the PCM -> checkpoint
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from mope_bb.config import Config, TrainConfig
from mope_bb.errors import AllRolloutsFailedError, ConfigError, ContextLengthError, MopeError, RewardError
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.decode import Plan
from mope_bb.pcm.heads import pcm_room
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import PreferenceControlModel
from mope_bb.pcm.plans import build_plan
from mope_bb.pcm.rollouts import FailedRollout, Progress, Rollout, RolloutRequest, Sampler
from mope_bb.pcm.runner import response_ids
from mope_bb.rewards.base import References, RewardPanel, scalarise
from mope_bb.training.checkpoints import save_checkpoint
from mope_bb.training.learner import Learner, LearnerOptions, LearnerReport, Pair
from mope_bb.training.lora import add_lora
from mope_bb.training.rebel import choose_eta
from mope_bb.training.tasks import StyleSource, WantedStyle
from mope_bb.types import Message, SamplingOptions

Prompts = Sequence[tuple[Message, ...]]
PRODUCT_DEFAULTS: Final = {"learning_rate": 1e-3, "target_log_ratio": 2.0}
OTHER_DEFAULTS: Final = {"learning_rate": 3e-3, "target_log_ratio": 5.0}
FEATURE_RATE: Final = 50.0


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One row of metrics.jsonl."""

    step: int
    reward: float
    """Mean over the rollouts of the batch, each the weighted mean of its win probabilities."""
    reward_sem: float
    """Standard error of that mean."""
    loss: float
    grad_norm: float
    learning_rate: float
    sign_align: float
    approx_kl: float
    effective_samples: float
    eta: float
    weights_entropy: float
    """Mean over the tokens of the entropy of the experts' weights, normalised to sum 1, in nats."""
    num_tokens: float
    """Mean length of an answer."""
    num_pairs: int
    num_dropped: int
    """Pairs lost to a failed rollout or score."""
    num_identical: int
    """Pairs of equal answers, which teach nothing."""
    length_bias: float
    """Correlation between the pairs' differences of reward and of length; NaN where there is none."""
    seconds: float
    """Since the run began."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """What a run leaves out, to show what it was good for."""

    shuffles_rewards: bool = False
    """Rewards are dealt out at random within each batch: nothing can be learned from them."""
    is_context_free: bool = False
    """The PCM's scores before the first token hold for the whole answer."""
    uses_features: bool = True
    """Whether the experts' features have a weight."""


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """Everything a run needs, opened."""

    config: Config
    rule: MergeRule
    pcm: PreferenceControlModel
    bench: ExpertBench
    panel: RewardPanel
    prompts: Prompts
    references: References
    output_dir: Path
    ablation: Ablation = field(default_factory=Ablation)


@dataclass(frozen=True, slots=True)
class _Task:
    """One prompt with one preference."""

    messages: tuple[Message, ...]
    style: WantedStyle
    plan: Plan


class Trainer:
    """Trains a PCM. `run` may be ended by an exception (Ctrl-C): what was learned until then can be saved."""

    def __init__(self, setup: TrainingSetup) -> None:
        """Raises ConfigError for what cannot be trained."""
        self._setup = setup
        self._options: TrainConfig = setup.config.train
        dimensions = served_dimensions(setup.config)
        self._styles = StyleSource(setup.config, dimensions, self._options.preferences)
        self._sampling = SamplingOptions(max_tokens=self._options.max_tokens)
        if setup.ablation.is_context_free:
            self._sampler: Sampler = setup.bench.sampler(setup.pcm, is_context_free=True)
        else:
            self._sampler = setup.bench.sampler(setup.pcm)
        self._reference_sampler = setup.bench.sampler()
        self._reference = reference_expert(setup.config)
        self._learner: Learner | None = None
        self._eta_differences: list[float] = []
        self._window: list[list[Pair]] = []
        self._started = time.monotonic()
        self._num_steps = 0
        self._on_answers: Progress | None = None
        setup.pcm.rule = setup.rule.name
        if self._options.lora_rank:
            # The backbone stays in bfloat16 on a GPU; peft keeps the adapter in float32.
            add_lora(setup.pcm, rank=self._options.lora_rank)
        else:
            # AdamW's small steps would be rounded away in bfloat16.
            setup.pcm.model.float()

    @property
    def share_done(self) -> float:
        """How much of the run lies behind: by steps, or by time if that ends it sooner."""
        by_steps = self._num_steps / self._options.max_steps
        limit = self._options.max_minutes
        return by_steps if limit is None else max(by_steps, (time.monotonic() - self._started) / (60 * limit))

    def run(
        self, on_step: Callable[[StepMetrics, float], None] | None = None, *, on_answers: Progress | None = None
    ) -> None:
        """Train to the end.

        `on_step` is told each row of metrics and the share that is done; `on_answers`, while a batch is sampled, how
        many of its answers there are, of how many. Raises TrainingError, ProviderError, RewardError and ConfigError. A
        checkpoint is written at the end.
        """
        self._on_answers = on_answers
        self._setup.output_dir.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        while self.share_done < 1.0:
            metrics = self._step()
            if self._num_steps == 1:
                # Not before: a first batch that fails leaves what an earlier run wrote as it is.
                self._write_run_file()
            with (self._setup.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row_of(metrics), allow_nan=False) + "\n")
            if on_step is not None:
                on_step(metrics, self.share_done)
        self.save()

    def save(self) -> Path:
        """Write the checkpoint `last` and return its folder."""
        return save_checkpoint(self._setup.pcm, self._setup.output_dir / "checkpoints", "last")

    def _step(self) -> StepMetrics:
        seed = f"{self._options.seed} {self._num_steps}"
        rng = random.Random(seed)
        tasks = [self._draw_task(rng) for _ in range(self._options.batch_size)]
        failure = self._sample_references(tasks, rng)
        rollouts = self._sample(tasks, rng)
        pairs, dropped = self._score(tasks, rollouts, failure)
        if self._setup.ablation.shuffles_rewards:
            pairs = shuffle_rewards(pairs, rng)
        learner = self._open_learner(pairs)
        self._window = [*self._window, pairs][-self._options.window :]
        report = learner.step(
            [pair for batch in self._window for pair in batch],
            seed=rng.randrange(2**31),
            share_done=min(self.share_done, 1.0),
        )
        self._num_steps += 1
        return self._metrics(pairs, dropped, report, learner.eta)

    def _draw_task(self, rng: random.Random) -> _Task:
        style = self._styles.draw(rng)
        plan = build_plan(self._setup.config, style.preference, self._setup.rule, reads_text=True)
        return _Task(rng.choice(self._setup.prompts), style, plan)

    def _sample(self, tasks: Sequence[_Task], rng: random.Random) -> list[tuple[Rollout | FailedRollout, ...]]:
        """Two rollouts of each task: the first ones, then the second ones."""
        requests = [RolloutRequest(task.messages, task.plan, rng.getrandbits(32)) for _ in range(2) for task in tasks]
        sampled = self._sampler.sample(requests, self._sampling, progress=self._on_answers)
        found = [self._readable(one) for one in sampled]
        return [tuple(found[: len(tasks)]), tuple(found[len(tasks) :])]

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

    def _sample_references(self, tasks: Sequence[_Task], rng: random.Random) -> MopeError | None:
        return sample_references(
            (task.messages for task in tasks),
            self._setup.references,
            self._reference_sampler,
            expert=self._reference,
            options=self._sampling,
            rng=rng,
        )

    def _score(
        self,
        tasks: Sequence[_Task],
        rollouts: Sequence[Sequence[Rollout | FailedRollout]],
        error: MopeError | None,
    ) -> tuple[list[Pair], int]:
        """The pairs that could be sampled and scored, and how many could not.

        `error` is why a reference failed, if one did. Raises AllRolloutsFailedError.
        """
        references = self._setup.references
        whole: list[tuple[_Task, Rollout, Rollout, str]] = []
        for task, first, second in zip(tasks, *rollouts, strict=True):
            reference = references.get(task.messages)
            if isinstance(first, Rollout) and isinstance(second, Rollout) and reference is not None:
                whole.append((task, first, second, reference))
            else:
                error = next((found.error for found in (first, second) if isinstance(found, FailedRollout)), error)
        scored = self._setup.panel.wins(
            [task.messages for task, *_ in whole for _ in range(2)],
            [rollout.text for _, first, second, _ in whole for rollout in (first, second)],
            [reference for *_, reference in whole for _ in range(2)],
            [tuple(task.style.weights) for task, *_ in whole for _ in range(2)],
        )
        pairs = []
        for (task, first, second, _), one, other in zip(whole, scored[::2], scored[1::2], strict=True):
            if isinstance(one, RewardError) or isinstance(other, RewardError):
                error = one if isinstance(one, RewardError) else other if isinstance(other, RewardError) else error
                continue
            weights = task.style.weights
            pairs.append(Pair(first, second, (scalarise(one.wins, weights), scalarise(other.wins, weights))))
        if not pairs:
            raise AllRolloutsFailedError(
                f"none of the {len(tasks)} pairs of batch {self._num_steps} could be used; the last reason: {error}",
                hint=error.hint if error is not None else None,
            )
        return pairs, len(tasks) - len(pairs)

    def _open_learner(self, pairs: Sequence[Pair]) -> Learner:
        """The learner, built when the first rewards are there to choose eta by."""
        if self._learner is None:
            options = self._options
            defaults = PRODUCT_DEFAULTS if self._setup.rule.name == "product" else OTHER_DEFAULTS
            target = options.target_log_ratio or defaults["target_log_ratio"]
            differences = [pair.rewards[0] - pair.rewards[1] for pair in pairs]
            eta = choose_eta(differences, target=target) if options.eta == "auto" else options.eta
            rate = options.learning_rate or defaults["learning_rate"]
            feature_rate = (
                FEATURE_RATE * rate if options.feature_learning_rate is None else options.feature_learning_rate
            )
            self._learner = Learner(
                self._setup.pcm,
                LearnerOptions(
                    learning_rate=rate,
                    weight_decay=options.weight_decay,
                    max_grad_norm=options.max_grad_norm,
                    warmup_steps=options.warmup_steps,
                    lr_scheduler_type=options.lr_scheduler_type,
                    num_epochs=options.num_train_epochs,
                    per_device_train_batch_size=options.per_device_train_batch_size,
                    feature_learning_rate=feature_rate if self._setup.ablation.uses_features else 0.0,
                ),
                eta=eta,
                same_ids=self._setup.bench.reads_expert_ids(self._setup.pcm),
                is_context_free=self._setup.ablation.is_context_free,
            )
        return self._learner

    def _metrics(self, pairs: Sequence[Pair], dropped: int, report: LearnerReport, eta: float) -> StepMetrics:
        rewards = torch.tensor([reward for pair in pairs for reward in pair.rewards], dtype=torch.float64)
        rollouts = [rollout for pair in pairs for rollout in (pair.first, pair.second)]
        weights = [rollout.weights / rollout.weights.sum(dim=-1, keepdim=True) for rollout in rollouts]
        entropies = torch.cat([torch.special.entr(found).sum(dim=-1) for found in weights])
        lengths = torch.tensor([[len(pair.first), len(pair.second)] for pair in pairs], dtype=torch.float64)
        by_pair = rewards.reshape(-1, 2)
        both = torch.stack([by_pair[:, 0] - by_pair[:, 1], lengths[:, 0] - lengths[:, 1]])
        can_correlate = len(pairs) > 1 and bool((both.std(dim=1) > 0).all())
        return StepMetrics(
            step=self._num_steps,
            reward=float(rewards.mean()),
            reward_sem=float(rewards.std() / math.sqrt(len(rewards))),
            loss=report.loss,
            grad_norm=report.grad_norm,
            learning_rate=report.learning_rate,
            sign_align=report.sign_align,
            approx_kl=report.approx_kl,
            effective_samples=report.effective_samples,
            eta=eta,
            weights_entropy=float(entropies.mean()),
            num_tokens=float(lengths.mean()),
            num_pairs=len(pairs),
            num_dropped=dropped,
            num_identical=sum(pair.first.pieces == pair.second.pieces for pair in pairs),
            length_bias=float(torch.corrcoef(both)[0, 1]) if can_correlate else math.nan,
            seconds=time.monotonic() - self._started,
        )

    def _write_run_file(self) -> None:
        """What this run was asked to do, for people and for the report."""
        document: dict[str, Any] = {
            "rule": self._setup.rule.name,
            "ablation": asdict(self._setup.ablation),
            "num_prompts": len(self._setup.prompts),
            "experts": [expert.name for expert in self._setup.config.experts],
            "reference": self._reference,
            "train": self._options.model_dump(mode="json"),
        }
        (self._setup.output_dir / "run.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def row_of(metrics: StepMetrics) -> dict[str, float | None]:
    """The metrics as JSON can hold them: null for what is not a finite number."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(metrics).items()}


def served_dimensions(config: Config) -> list[str]:
    """Dimensions that have an expert, in the configuration's order. Raises ConfigError if there is none."""
    served = [expert.dimension for expert in config.experts if expert.dimension is not None and not expert.base]
    if not served:
        raise ConfigError("no expert has a dimension, so there is nothing to train", hint="Set `dimension`.")
    return list(dict.fromkeys(served))


def reference_expert(config: Config) -> str:
    """Whose answer the rewards are measured against. Raises ConfigError."""
    name = config.train.reference or config.roster().base
    if name is None:
        raise ConfigError(
            "rewards are measured against a reference response, and no expert is the base",
            hint="Set `reference` in [train] to an expert's name, or `base = true` at an expert.",
        )
    if name not in {expert.name for expert in config.experts}:
        raise ConfigError(f"`reference` in [train] is {name!r}, which is no expert")
    return name


def sample_references(
    prompts: Iterable[tuple[Message, ...]],
    references: References,
    sampler: Sampler,
    *,
    expert: str,
    options: SamplingOptions,
    rng: random.Random,
) -> MopeError | None:
    """Sample and store a reference response for every prompt that has none.

    One that fails stays without; the last such failure is returned.
    """
    failure: MopeError | None = None
    plan = Plan(MergeRule("linear"), experts=(expert,), lambdas=(1.0,), base=None, preference_text="")
    missing = [messages for messages in dict.fromkeys(prompts) if references.get(messages) is None]
    if missing:
        requests = [RolloutRequest(messages, plan, rng.getrandbits(32)) for messages in missing]
        for found in sampler.sample(requests, options):
            if isinstance(found, Rollout):
                references.put(found.request.messages, found.text)
            else:
                failure = found.error
    return failure


def shuffle_rewards(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """The same pairs with the batch's rewards dealt out at random."""
    rewards = [reward for pair in pairs for reward in pair.rewards]
    rng.shuffle(rewards)
    return [Pair(pair.first, pair.second, (rewards[2 * i], rewards[2 * i + 1])) for i, pair in enumerate(pairs)]
