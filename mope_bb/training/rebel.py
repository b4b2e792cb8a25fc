"""REBEL (arXiv 2404.16767): regress the difference of two log-ratios on the difference of two rewards. Pure functions.

    loss = mean over pairs of ( D / eta - (R(y) - R(y')) )^2
    D    = [log pi(y) - log pi_old(y)] - [log pi(y') - log pi_old(y')]          summed over the tokens of an answer

This is the paper's form. The released code minimises mean (D - eta (R - R'))^2, which is eta^2 times as large, with a
gradient eta^2 times as large and the same minimiser; a learning rate does not carry over unless the optimiser rescales
gradients, as Adam does.

Shapes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mope_bb.errors import TrainingError


@dataclass(frozen=True, eq=False)
class RebelInputs:
    """Two answers to each prompt; every field is (P, 2)."""

    logprobs: Tensor
    """log pi(y) under the present parameters; gradients flow through it."""
    old_logprobs: Tensor
    """log pi_old(y) under the policy that sampled."""
    rewards: Tensor
    """R(y), any finite numbers."""


@dataclass(frozen=True, eq=False)
class RebelOutputs:
    """The loss and what one wants to see of it."""

    loss: Tensor
    """Scalar."""
    ratio_difference: Tensor
    """D, (P,)."""
    reward_difference: Tensor
    """R(y) - R(y'), (P,)."""

    @property
    def sign_align(self) -> float:
        """Share of the pairs with a reward difference whose log-ratios differ in the same direction."""
        told_apart = self.reward_difference != 0
        if not bool(told_apart.any()):
            return math.nan
        same = (self.ratio_difference.sign() == self.reward_difference.sign())[told_apart]
        return float(same.float().mean())


def rebel_loss(inputs: RebelInputs, *, eta: float) -> RebelOutputs:
    """The paper's regression; `eta` > 0 is how far one unit of reward moves the log-ratio."""
    log_ratios = inputs.logprobs - inputs.old_logprobs
    ratio_difference = log_ratios[:, 0] - log_ratios[:, 1]
    reward_difference = inputs.rewards[:, 0] - inputs.rewards[:, 1]
    loss = (ratio_difference / eta - reward_difference).square().mean()
    return RebelOutputs(loss, ratio_difference.detach(), reward_difference)


def choose_eta(reward_differences: Sequence[float], *, target: float = 1.0) -> float:
    """`eta = "auto"`: a difference as large as their root mean square is asked for a log-ratio of `target` nats.

    The mean square and not the median: where most pairs are nearly even, the few that differ carry the lesson.
    Raises TrainingError if no two rewards differ.
    """
    size = math.sqrt(sum(value * value for value in reward_differences) / max(1, len(reward_differences)))
    if size == 0.0:
        raise TrainingError(
            "all rewards of the first batches are equal, so there is nothing to learn from",
            hint="Do the reward models tell answers apart? Look at their scores, or give `eta` a number.",
        )
    return target / size


def effective_sample_share(log_ratios: Tensor) -> float:
    """Effective sample size of the importance weights exp(log-ratio), as a share of the answers: 1 = on policy."""
    weights = torch.softmax(log_ratios.detach().double().flatten(), dim=0)
    return float(1 / (weights.square().sum() * weights.numel()))
