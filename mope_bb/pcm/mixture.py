"""Merging the experts' distributions: pure functions of candidate logprobs and PCM scores.

Shapes: E experts, C candidates, F features; leading batch dimensions are allowed in front of all of them. Sampling and
learning call the same functions. Logprobs are natural logs; -inf marks a candidate that is not on an expert's list.

    linear     pi(v) = sum_i alpha_i p_i(v)                                       (the paper, arXiv 2407.04181)
    geometric  log pi(v) = sum_i alpha_i log p_i(v) + const                       (MOD)
    product    log pi(v) = log p_0(v) + sum_i beta_i (log p_i(v) - log p_0(v)) + const

Weights: alpha = softmax over the experts of (log lambda_i + s_i); beta_i = n lambda_i exp(c tanh s_i) with n experts
asked. With all scores 0 these are the user's own weights, so an untrained PCM is the user's own mixture or product.

After truncation the policy *is* the merge of the lists, normalised once over the candidates: each expert is never
renormalised on its own, which would change the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor

from mope_bb.errors import AlignmentError, ConfigError
from mope_bb.types import END, Candidates, Piece, TokenDistribution

MergeRuleName = Literal["linear", "geometric", "product"]


IMPOSSIBLE: Final = -1e4
"""Stands for log 0 where differences must stay finite."""


@dataclass(frozen=True, slots=True)
class MergeRule:
    """Which rule merges, and its constant."""

    name: MergeRuleName = "linear"
    product_scale: float = 1.5
    """c of the product's weights: a trained PCM can multiply a weight by exp(-c) to exp(c)."""

    @property
    def needs_base(self) -> bool:
        """Whether the first expert of every merge is the base p_0."""
        return self.name == "product"

    def weights(self, log_lambda: Tensor, scores: Tensor) -> Tensor:
        """alpha (linear, geometric) or beta (product) of the styled experts, (..., E), from their scores (..., E)."""
        if self.name == "product":
            num_experts = log_lambda.shape[-1]
            return num_experts * torch.exp(log_lambda + self.product_scale * torch.tanh(scores))
        return torch.softmax(log_lambda + scores, dim=-1)

    def merge(self, logprobs: Tensor, weights: Tensor) -> Tensor:
        """Normalised log pi over the candidates, (..., C).

        `logprobs` is (..., E, C), filled by `fill_missing` for the rules that need a value everywhere; `weights` is
        (..., E) from `weights`. For the product `logprobs` has one row more: the base comes first.
        """
        if self.name == "linear":
            merged = torch.logsumexp(weights.log()[..., None] + logprobs, dim=-2)
        elif self.name == "geometric":
            merged = (weights[..., None] * logprobs).sum(dim=-2)
        else:
            base = logprobs[..., 0, :]
            merged = base + (weights[..., None] * (logprobs[..., 1:, :] - base[..., None, :])).sum(dim=-2)
        return torch.log_softmax(merged, dim=-1)


def build_rule(name: str, *, product_scale: float = 1.5) -> MergeRule:
    """The rule called `name`. Raises ConfigError."""
    if name not in ("linear", "geometric", "product"):
        raise ConfigError(f"unknown merge rule {name!r}", hint="Known: linear, geometric, product.")
    return MergeRule(cast(MergeRuleName, name), product_scale)


def align(distributions: Sequence[TokenDistribution]) -> Candidates:
    """Join the experts' lists: one candidate for each piece that is on any of them.

    Raises AlignmentError where the lists cannot be of one tokenizer.
    """
    if not distributions:
        raise AlignmentError("there is no distribution to merge")
    found: dict[int | bytes, Piece] = {}
    for distribution in distributions:
        for piece in distribution.pieces:
            if found.setdefault(piece.key, piece) != piece:
                raise AlignmentError(
                    f"token {piece.token_id} is {found[piece.key].data!r} for one expert, {piece.data!r} for another",
                    hint="The experts have different tokenizers; use experts fine-tuned from one base model.",
                )
    if len({type(key) for key in found if key != END.key}) > 1:
        raise AlignmentError("some experts give token ids and others only bytes; they cannot be merged")
    order: list[Any] = sorted(found, key=lambda key: (key != END.key, key))
    column = {key: index for index, key in enumerate(order)}
    rows = []
    for distribution in distributions:
        row = [-math.inf] * len(order)
        for piece, logprob in zip(distribution.pieces, distribution.logprobs, strict=True):
            row[column[piece.key]] = logprob
        rows.append(tuple(row))
    return Candidates(
        pieces=tuple(found[key] for key in order),
        logprobs=tuple(rows),
        floors=tuple(distribution.floor for distribution in distributions),
        tails=tuple(distribution.tail_mass for distribution in distributions),
    )


def fill_missing(rule: MergeRule, logprobs: Tensor, floors: Tensor) -> Tensor:
    """Values for candidates that an expert did not list.

    Linear: p_i counts as 0 there, so that learning is exact for the policy that acted. The other rules need a value:
    the expert's floor. `logprobs` (..., E, C), `floors` (..., E). An expert whose floor is -inf has listed its whole
    vocabulary; a candidate it lacks is then impossible for it, and IMPOSSIBLE stands for its logprob, so that
    differences of two such values stay finite.
    """
    if rule.name == "linear":
        return logprobs
    return torch.where(torch.isneginf(logprobs), floors.clamp_min(IMPOSSIBLE)[..., None], logprobs)


def missed_mass(weights: Tensor, tails: Tensor) -> Tensor:
    """Linear rule: upper bound of the total variation to the full merge, sum_i alpha_i t_i; (...) from (..., E)."""
    return (weights * tails).sum(dim=-1)


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
