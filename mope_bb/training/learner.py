"""The learner: recomputes log pi of recorded rollouts for the present PCM, and moves the PCM. It calls no expert.

Shapes: B rollouts, N = all their steps, E experts (padded to the most that any rollout asked; the base in front where
the rule needs it), C candidates, L PCM ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from mope_bb.config import TrainConfig
from mope_bb.errors import TrainingError
from mope_bb.pcm.gates import LinearGate
from mope_bb.pcm.merging import merge_lists
from mope_bb.pcm.mixture import IMPOSSIBLE, Lists, MergedLists, MergeRule
from mope_bb.pcm.model import PreferenceControlModel
from mope_bb.pcm.rollouts import Rollout
from mope_bb.pcm.runner import build_pcm_messages, response_ids
from mope_bb.training.lora import add_lora
from mope_bb.training.rebel import RebelInputs, RebelOutputs, effective_sample_share, rebel_loss
from mope_bb.training.team import Team

PRODUCT_DEFAULTS: Final = {"learning_rate": 1e-3, "target_log_ratio": 2.0}
OTHER_DEFAULTS: Final = {"learning_rate": 3e-3, "target_log_ratio": 5.0}
FEATURE_RATE: Final = 50.0
"""Times the learning rate: that of the experts' features."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two independent rollouts of one prompt and preference, with their rewards."""

    first: Rollout
    second: Rollout
    rewards: tuple[float, float]
    pair_id: int = -1
    """Its number in the run."""


@dataclass(frozen=True, slots=True)
class LearnerOptions:
    """Named as in Hugging Face's TrainingArguments where the thing is the same."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    warmup_steps: int = 3
    """Batches."""
    lr_scheduler_type: str = "cosine"
    """cosine, linear or constant."""
    num_epochs: int = 2
    """Passes over the window at each batch."""
    per_device_train_batch_size: int = 32
    """Pairs of one optimiser step."""
    feature_learning_rate: float = 5e-2
    """Of the experts' features."""


@dataclass(frozen=True, slots=True)
class LearnerReport:
    """What one batch did."""

    loss: float
    """Mean over the optimiser steps, before each."""
    grad_norm: float
    """Largest, before clipping."""
    learning_rate: float
    sign_align: float
    """After the batch, on its own pairs."""
    approx_kl: float
    """Mean log pi_old - log pi per answer, after the batch, in nats."""
    effective_samples: float
    """Share of the answers, after the batch."""
    num_optimizer_steps: int


@dataclass(frozen=True, slots=True)
class Lesson:
    """What happened in one batch, by optimiser step."""

    learning_rate: float
    losses: list[float] = field(default_factory=list)
    """Before each."""
    norms: list[float] = field(default_factory=list)
    """Of the gradients, before clipping."""


@dataclass(frozen=True, slots=True)
class LessonPlan:
    """What a learner must know beside the configuration."""

    eta: float
    same_ids: bool
    """Whether the PCM's tokenizer is the experts'."""
    is_context_free: bool = False
    uses_features: bool = True


class Recorded:
    """Rollouts as tensors, all steps behind each other."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        pcm: PreferenceControlModel,
        *,
        same_ids: bool = True,
        is_context_free: bool = False,
    ) -> None:
        """`same_ids`, `is_context_free`: see `Learner`."""
        plans = [rollout.request.plan for rollout in rollouts]
        self.rule: MergeRule = plans[0].rule
        first = 1 if self.rule.needs_base else 0
        num_experts = max(len(plan.experts) for plan in plans)
        lengths = [len(rollout) for rollout in rollouts]
        width = max(rollout.lists.logprobs.shape[2] for rollout in rollouts)
        shape = (sum(lengths), num_experts + first)
        logprobs = torch.full((*shape, width), -math.inf)
        floors, tails = torch.full(shape, IMPOSSIBLE), torch.zeros(shape)
        self.log_lambda = torch.full((shape[0], num_experts), -math.inf)
        # Rows of the PCM's head; an expert that it does not know, or padding, reads the zero behind them.
        self.head_rows = torch.full((shape[0], num_experts), len(pcm.experts))
        known = {name: row for row, name in enumerate(pcm.experts)}
        start = 0
        for rollout, plan, length in zip(rollouts, plans, lengths, strict=True):
            steps, used = slice(start, start + length), rollout.lists.logprobs.shape
            logprobs[steps, : used[1], : used[2]] = rollout.lists.logprobs
            floors[steps, : used[1]], tails[steps, : used[1]] = rollout.lists.floors, rollout.lists.tails
            self.log_lambda[steps, : len(plan.experts)] = plan.log_lambda.float()
            rows = [known.get(name, len(pcm.experts)) for name in plan.experts]
            self.head_rows[steps, : len(rows)] = torch.tensor(rows)
            start += length
        self.lists = Lists(logprobs, floors, tails)
        self.index = torch.cat([rollout.index for rollout in rollouts])
        self.rollout_of = torch.repeat_interleave(torch.arange(len(rollouts)), torch.tensor(lengths))
        self.old_logprobs = torch.cat([rollout.logprobs for rollout in rollouts])
        self._set_ids(rollouts, pcm, same_ids, is_context_free)

    def _set_ids(
        self, rollouts: Sequence[Rollout], pcm: PreferenceControlModel, same_ids: bool, is_context_free: bool
    ) -> None:
        """PCM ids (B, L), padded behind, and for each step the position whose output gave its scores, (N,)."""
        sequences: list[list[int]] = []
        positions: list[int] = []
        for rollout in rollouts:
            request = rollout.request
            prompt = pcm.tokenizer.encode_chat(build_pcm_messages(request.plan.preference_text, request.messages))
            ids = list(prompt)
            positions.append(len(ids) - 1)
            for grown in response_ids(pcm, rollout.pieces[:-1], same_ids=same_ids):
                ids += grown
                positions.append(len(prompt if is_context_free else ids) - 1)
            sequences.append(ids)
        width = max(map(len, sequences))
        self.ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences])
        self.mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
        self.positions = torch.tensor(positions)


def recompute(pcm: PreferenceControlModel, recorded: Recorded) -> tuple[Tensor, MergedLists]:
    """log pi of every drawn piece under the present PCM, (N,), and the merge it came from. Differentiable."""
    device = next(pcm.model.parameters()).device
    outputs = pcm.model(
        input_ids=recorded.ids.to(device), attention_mask=recorded.mask.to(device), use_cache=False
    ).logits
    rows = outputs[recorded.rollout_of.to(device), recorded.positions.to(device)].float().cpu()
    head = nn.functional.pad(rows, (0, 1)).gather(1, recorded.head_rows)
    merged = merge_lists(recorded.rule, recorded.lists, recorded.log_lambda, head, LinearGate(pcm.feature_weights))
    return merged.log_pi.gather(1, recorded.index[:, None])[:, 0], merged


def sum_by_rollout(values: Tensor, recorded: Recorded) -> Tensor:
    """(B,) from (N,)."""
    return torch.zeros(len(recorded.ids), dtype=values.dtype).index_add(0, recorded.rollout_of, values)


class Learner:
    """Optimiser and schedule around one PCM."""

    def __init__(
        self,
        pcm: PreferenceControlModel,
        options: LearnerOptions,
        *,
        eta: float,
        same_ids: bool = True,
        is_context_free: bool = False,
        team: Team | None = None,
    ) -> None:
        """`same_ids`: the PCM's tokenizer is the experts'; `is_context_free`: see `heads.PcmRows`.

        `team` shares the work of each optimiser step; every process of it calls `learn` with the same arguments.
        """
        self.pcm = pcm
        self._team = team or Team()
        self.eta = eta
        self._record = partial(Recorded, pcm=pcm, same_ids=same_ids, is_context_free=is_context_free)
        self._num_steps = 0
        self._options = options
        # A leaf of its own: whatever tensor was loaded.
        pcm.feature_weights = pcm.feature_weights.detach().clone().requires_grad_()
        trained = [parameter for parameter in pcm.model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": trained, "initial_lr": options.learning_rate},
            {"params": [pcm.feature_weights], "initial_lr": options.feature_learning_rate, "weight_decay": 0.0},
        ]
        self._parameters = [*trained, pcm.feature_weights]
        self._optimizer = torch.optim.AdamW(
            groups, lr=options.learning_rate, betas=options.adam_betas, weight_decay=options.weight_decay
        )

    def state(self) -> dict[str, Tensor]:
        """What the optimiser remembers of each parameter, by the parameter's number and what it is."""
        return {
            f"{number}.{key}": value.detach().to("cpu", copy=True)
            for number, parameter in enumerate(self._parameters)
            for key, value in self._optimizer.state[parameter].items()
        }

    def load_state(self, state: Mapping[str, Tensor], *, num_steps: int) -> None:
        """Go on after `num_steps` batches with what `state` gave then."""
        for name, value in state.items():
            number, key = name.split(".", 1)
            parameter = self._parameters[int(number)]
            # AdamW counts its steps on the CPU whatever the device.
            device = value.device if key == "step" else parameter.device
            self._optimizer.state[parameter][key] = value.to(device, copy=True)
        self._num_steps = num_steps

    def _set_rate(self, share_done: float) -> float:
        """Set the learning rates for the next batch; return the backbone's."""
        options = self._options
        if self._num_steps < options.warmup_steps:
            factor = (self._num_steps + 1) / (options.warmup_steps + 1)
        elif options.lr_scheduler_type == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * min(1.0, share_done)))
        else:
            factor = 1 - min(1.0, share_done) if options.lr_scheduler_type == "linear" else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
        return factor * options.learning_rate

    def step(self, pairs: Sequence[Pair], *, seed: int, share_done: float) -> LearnerReport:
        """`learn`, and what came of it."""
        lesson = self.learn(pairs, seed=seed, share_done=share_done)
        with torch.no_grad():
            after, log_ratios = self._evaluate(pairs)
        return LearnerReport(
            loss=sum(lesson.losses) / len(lesson.losses),
            grad_norm=max(lesson.norms),
            learning_rate=lesson.learning_rate,
            sign_align=after.sign_align,
            approx_kl=float(-log_ratios.mean()),
            effective_samples=effective_sample_share(log_ratios),
            num_optimizer_steps=len(lesson.losses),
        )

    def learn(self, pairs: Sequence[Pair], *, seed: int, share_done: float) -> Lesson:
        """Learn from `pairs` (the window: this batch and, if wanted, earlier ones). Raises TrainingError.

        `share_done`, in [0, 1), is how much of the run lies behind it: the schedule follows it.
        """
        options = self._options
        lesson = Lesson(self._set_rate(share_done))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(options.num_epochs):
            order = torch.randperm(len(pairs), generator=generator).tolist()
            for first in range(0, len(order), options.per_device_train_batch_size):
                chosen = [pairs[i] for i in order[first : first + options.per_device_train_batch_size]]
                loss, norm = self._update(chosen)
                lesson.losses.append(loss)
                lesson.norms.append(norm)
        self._num_steps += 1
        self.pcm.policy_version += 1
        return lesson

    def _evaluate(self, pairs: Sequence[Pair]) -> tuple[RebelOutputs, Tensor]:
        recorded = self._record([rollout for pair in pairs for rollout in (pair.first, pair.second)])
        logprobs, _ = recompute(self.pcm, recorded)
        new = sum_by_rollout(logprobs, recorded).reshape(-1, 2)
        old = sum_by_rollout(recorded.old_logprobs, recorded).float().reshape(-1, 2)
        rewards = torch.tensor([pair.rewards for pair in pairs])
        return rebel_loss(RebelInputs(new, old, rewards), eta=self.eta), (new - old).detach()

    def _update(self, pairs: Sequence[Pair]) -> tuple[float, float]:
        """One optimiser step on the mean loss of `pairs`; the loss before it, and the gradient's norm."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        if mine := self._team.share(pairs):
            # A mean of this process's pairs, weighed so that the processes' parts add up to the mean of all.
            part = self._evaluate(mine)[0].loss * (len(mine) / len(pairs))
            part.backward()  # type: ignore[no-untyped-call]
            loss = part.detach()
        if self._team.size > 1:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self._team.add_up([loss, *(one.grad for one in self._parameters if one.grad is not None)])
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._options.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient is {norm} (loss {float(loss):.3g}); the weights were not changed",
                hint="Lower `learning_rate`, or look for extreme rewards in metrics.jsonl.",
            )
        self._optimizer.step()
        return float(loss), norm


def prepare_pcm(pcm: PreferenceControlModel, options: TrainConfig, rule: MergeRule) -> None:
    """Make `pcm` ready to learn for `rule`. Raises ConfigError where peft is wanted and missing."""
    pcm.rule = rule.name
    if options.lora_rank:
        # The backbone stays in bfloat16 on a GPU; peft keeps the adapter in float32.
        add_lora(pcm, rank=options.lora_rank)
    else:
        # AdamW's small steps would be rounded away in bfloat16.
        pcm.model.float()


def open_learner(
    pcm: PreferenceControlModel, options: TrainConfig, how: LessonPlan, *, team: Team | None = None
) -> Learner:
    """The learner of a run; defaults that depend on the rule are filled in."""
    rate = options.learning_rate or defaults_of(pcm.rule)["learning_rate"]
    feature_rate = FEATURE_RATE * rate if options.feature_learning_rate is None else options.feature_learning_rate
    return Learner(
        pcm,
        LearnerOptions(
            learning_rate=rate,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            warmup_steps=options.warmup_steps,
            lr_scheduler_type=options.lr_scheduler_type,
            num_epochs=options.num_train_epochs,
            per_device_train_batch_size=options.per_device_train_batch_size,
            feature_learning_rate=feature_rate if how.uses_features else 0.0,
        ),
        eta=how.eta,
        same_ids=how.same_ids,
        is_context_free=how.is_context_free,
        team=team,
    )


def defaults_of(rule: str | None) -> dict[str, float]:
    """What suits a merge rule where the configuration is silent."""
    return PRODUCT_DEFAULTS if rule == "product" else OTHER_DEFAULTS
