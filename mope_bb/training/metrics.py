"""What a run tells of itself: one row of metrics.jsonl for each batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from mope_bb.training.learner import LearnerReport, Pair


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
    staleness_mean: float
    """Versions between the first token of a pair and this batch."""
    staleness_max: int
    num_questions: int
    """Next-token questions behind the batch's answers: tokens times experts asked."""
    num_requests: int
    """HTTP requests since the batch before, retries included; 0 for local experts."""
    requests_per_s: float
    """Since the batch before."""
    cache_hits: int
    """Questions since the batch before that the cache answered: few, since sampled answers differ."""
    learner_idle_s: float
    """How long the learner waited for the batch."""
    rollouts_idle_s: float
    """How long, since the batch before, no rollout was under way."""
    seconds: float
    """Since the run began, all its processes together."""


@dataclass(frozen=True, slots=True)
class Course:
    """How a batch came about, for its row of metrics."""

    step: int
    staleness: Sequence[int]
    """Of each pair."""
    num_dropped: int
    num_requests: int
    cache_hits: int
    step_s: float
    """Since the batch before."""
    learner_idle_s: float
    rollouts_idle_s: float
    seconds: float


def measure_step(pairs: Sequence[Pair], report: LearnerReport, eta: float, course: Course) -> StepMetrics:
    """The row of a batch that was made of `pairs`, at least one."""
    rewards = torch.tensor([reward for pair in pairs for reward in pair.rewards], dtype=torch.float64)
    rollouts = [rollout for pair in pairs for rollout in (pair.first, pair.second)]
    weights = [rollout.weights / rollout.weights.sum(dim=-1, keepdim=True) for rollout in rollouts]
    entropies = torch.cat([torch.special.entr(found).sum(dim=-1) for found in weights])
    lengths = torch.tensor([[len(pair.first), len(pair.second)] for pair in pairs], dtype=torch.float64)
    by_pair = rewards.reshape(-1, 2)
    both = torch.stack([by_pair[:, 0] - by_pair[:, 1], lengths[:, 0] - lengths[:, 1]])
    can_correlate = len(pairs) > 1 and bool((both.std(dim=1) > 0).all())
    return StepMetrics(
        step=course.step,
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
        num_dropped=course.num_dropped,
        num_identical=sum(pair.first.pieces == pair.second.pieces for pair in pairs),
        length_bias=float(torch.corrcoef(both)[0, 1]) if can_correlate else math.nan,
        staleness_mean=sum(course.staleness) / len(course.staleness),
        staleness_max=max(course.staleness),
        num_questions=sum(len(rollout) * len(rollout.request.plan.asked) for rollout in rollouts),
        num_requests=course.num_requests,
        requests_per_s=course.num_requests / max(course.step_s, 1e-9),
        cache_hits=course.cache_hits,
        learner_idle_s=course.learner_idle_s,
        rollouts_idle_s=course.rollouts_idle_s,
        seconds=course.seconds,
    )


def row_of(metrics: StepMetrics) -> dict[str, float | None]:
    """The metrics as JSON can hold them: null for what is not a finite number."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(metrics).items()}
