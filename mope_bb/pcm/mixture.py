"""Merging the experts' distributions: pure functions of candidate logprobs and PCM scores.

Shapes: E experts, C candidates, F features; leading batch dimensions are allowed in front of all of them. Sampling and
learning call the same functions, on numpy's arrays or torch's. Logprobs are natural logs; -inf marks a candidate that
is not on an expert's list.

    linear     pi(v) = sum_i alpha_i p_i(v)                                       (the paper, arXiv 2407.04181)
    geometric  log pi(v) = sum_i alpha_i log p_i(v) + const                       (MOD)
    product    log pi(v) = log p_0(v) + sum_i beta_i (log p_i(v) - log p_0(v)) + const

Weights: alpha = softmax over the experts of (log lambda_i + s_i); beta_i = n lambda_i exp(c tanh s_i) with n experts
asked. With all scores 0 these are the user's own weights, so an untrained PCM is the user's own mixture or product.

The product amplifies what lists cannot show and what tiny probabilities get wrong: a ratio of two noises, to the power
of beta. So only plausible candidates take part in it: those with at least `plausibility` times the largest probability
under the even mixture of all that were asked, the base included (contrastive decoding's constraint, arXiv 2210.15097).
That set does not depend on the PCM.

After truncation the policy *is* the merge of the lists, normalised once over the candidates: each expert is never
renormalised on its own, which would change the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, cast

import torch
from torch import Tensor

from mope_bb.errors import ConfigError
from mope_bb.pcm.arrays import Array, Mask, at_least, largest, log_softmax, namespace_of, softmax

MergeRuleName = Literal["linear", "geometric", "product"]


IMPOSSIBLE: Final = -1e4
"""Stands for log 0 where differences must stay finite."""


@dataclass(frozen=True, slots=True)
class MergeRule:
    """Which rule merges, and its constant."""

    name: MergeRuleName = "linear"
    product_scale: float = 1.5
    """c of the product's weights: a trained PCM can multiply a weight by exp(-c) to exp(c)."""
    plausibility: float = 0.1
    """The product's cut, in [0, 1]; 0 lets every candidate take part."""

    @property
    def needs_base(self) -> bool:
        """Whether the first expert of every merge is the base p_0."""
        return self.name == "product"

    def weights(self, log_lambda: Array, scores: Array) -> Array:
        """alpha (linear, geometric) or beta (product) of the styled experts, (..., E), from their scores (..., E).

        An expert that is not asked has log lambda -inf, and weight 0 whatever its score.
        """
        if self.name == "product":
            xp = namespace_of(scores)
            num_experts = xp.sum(log_lambda > -math.inf, axis=-1, keepdims=True)
            weights: Array = num_experts * xp.exp(log_lambda + self.product_scale * xp.tanh(scores))
            return weights
        return softmax(log_lambda + scores)

    def merge(self, logprobs: Array, weights: Array) -> Array:
        """Normalised log pi over the candidates, (..., C).

        `logprobs` is (..., E, C), filled by `fill_missing` for the rules that need a value everywhere; `weights` is
        (..., E) from `weights`. Where the rule needs the base `logprobs` has one row more: the base comes first.
        A candidate that is -inf for everyone is padding: it has probability 0.
        """
        if self.name == "linear":
            return log_softmax(_log_mixture(logprobs, weights))
        xp = namespace_of(logprobs)
        padding = largest(logprobs, axis=-2)[..., 0, :] == -math.inf
        # With -inf the gradient would not be a number.
        filled = at_least(logprobs, IMPOSSIBLE)
        merged: Array = xp.where(self._excluded(filled, padding), -math.inf, self._unnormalised(filled, weights))
        return log_softmax(merged)

    def _excluded(self, filled: Array, padding: Mask) -> Mask:
        """Which candidates (..., C) get probability 0: padding, and what is implausible to the product."""
        if self.name != "product" or self.plausibility == 0.0:
            return padding
        mixture = namespace_of(filled).exp(filled).sum(axis=-2)
        is_implausible: Mask = mixture < self.plausibility * largest(mixture, axis=-1)
        return padding | is_implausible

    def _unnormalised(self, filled: Array, weights: Array) -> Array:
        if self.name == "geometric":
            return _weighted_sum(weights, filled)
        base = filled[..., :1, :]
        return base[..., 0, :] + _weighted_sum(weights, filled[..., 1:, :] - base)


def _log_mixture(logprobs: Array, weights: Array) -> Array:
    """log sum_i w_i p_i, (..., C); -inf where nobody with a weight lists the candidate."""
    xp = namespace_of(logprobs)
    # Against the largest of each candidate nothing underflows that counts; a number must stand where all are -inf.
    most = at_least(largest(logprobs, axis=-2), xp.finfo(logprobs.dtype).min)
    mixture = _weighted_sum(weights, xp.exp(logprobs - most))
    # Neither the logarithm of 0 nor that of a subnormal number has a finite gradient.
    nobody = mixture < xp.finfo(mixture.dtype).tiny
    found: Array = xp.where(nobody, -math.inf, xp.log(xp.where(nobody, 1.0, mixture)) + most[..., 0, :])
    return found


def _weighted_sum(weights: Array, values: Array) -> Array:
    """Over the experts: (..., C) from (..., E) and (..., E, C)."""
    return (weights[..., None, :] @ values)[..., 0, :]


@dataclass(frozen=True, eq=False)
class Lists:
    """What the experts said, as tensors; leading dimensions are allowed."""

    logprobs: Tensor
    """(..., E, C); -inf where a piece is not on that expert's list."""
    floors: Tensor
    """(..., E); see `TokenDistribution.floor`."""
    tails: Tensor
    """(..., E)."""


@dataclass(frozen=True, eq=False)
class MergedLists:
    """What came of them."""

    log_pi: Tensor
    """(..., C), before temperature and top_p."""
    weights: Tensor
    """(..., E) of the styled experts."""


def build_rule(name: str, *, product_scale: float = 1.5, plausibility: float = 0.1) -> MergeRule:
    """The rule called `name`. Raises ConfigError."""
    if name not in ("linear", "geometric", "product"):
        raise ConfigError(f"unknown merge rule {name!r}", hint="Known: linear, geometric, product.")
    return MergeRule(cast(MergeRuleName, name), product_scale, plausibility)


def fill_missing(rule: MergeRule, logprobs: Array, floors: Array) -> Array:
    """Values for candidates that an expert did not list.

    Linear: p_i counts as 0 there, so that learning is exact for the policy that acted. The other rules need a value:
    the expert's floor. `logprobs` (..., E, C), `floors` (..., E). An expert whose floor is -inf has listed its whole
    vocabulary; a candidate it lacks is then impossible for it, and IMPOSSIBLE stands for its logprob, so that
    differences of two such values stay finite.
    """
    if rule.name == "linear":
        return logprobs
    xp = namespace_of(logprobs)
    padding = largest(logprobs, axis=-2) == -math.inf
    # No listed logprob is below its expert's floor.
    filled: Array = xp.where(padding, -math.inf, xp.maximum(logprobs, at_least(floors, IMPOSSIBLE)[..., None]))
    return filled


def missed_mass(weights: Array, tails: Array) -> Array:
    """Linear rule: upper bound of the total variation to the full merge, sum_i alpha_i t_i; (...) from (..., E)."""
    found: Array = namespace_of(weights).sum(weights * tails, axis=-1)
    return found


def carriers(rule: MergeRule, logprobs: Tensor, weights: Tensor) -> Tensor:
    """How much each styled expert carried each candidate, (..., E, C), summing to 1 over the experts.

    Linear: the posterior that expert i was the one who spoke, alpha_i p_i(v) / pi(v). Other rules: softmax over the
    experts of what each adds to log pi(v), beta_i (log p_i - log p_0) or alpha_i (log p_i - mean of log p).
    """
    if rule.name == "linear":
        return torch.softmax(weights.log()[..., None] + logprobs, dim=-2)
    if rule.name == "product":
        lift = logprobs[..., 1:, :] - logprobs[..., :1, :]
    else:
        lift = logprobs - logprobs.mean(dim=-2, keepdim=True)
    return torch.softmax(weights[..., None] * lift, dim=-2)
