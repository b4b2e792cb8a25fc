"""The token step: what the experts said and the PCM's scores to one merged distribution. No endpoint, no sampling.

align -> features -> weights -> merge
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mope_bb.pcm.alignment import AlignedPath, align_path
from mope_bb.pcm.arrays import Array, Mask, at_least, namespace_of
from mope_bb.pcm.features import expert_features
from mope_bb.pcm.gates import Gate
from mope_bb.pcm.mixture import IMPOSSIBLE, Lists, MergedLists, MergeRule, fill_missing, missed_mass
from mope_bb.types import Candidates, TokenDistribution


@dataclass(frozen=True)
class Plan:
    """Who is asked for one answer, and how what they say is merged."""

    rule: MergeRule
    experts: tuple[str, ...]
    """The styled experts with a positive lambda."""
    lambdas: tuple[float, ...]
    """Their weights, summing to 1."""
    base: str | None
    """Asked first, by a rule that needs it."""
    preference_text: str
    """The preference as the PCM reads it."""

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """Everyone who is asked, in the order of all E-sized fields of a TokenStep."""
        return (self.base, *self.experts) if self.base is not None and self.rule.needs_base else self.experts

    def without(self, expert: str) -> Plan | None:
        """The same without a styled expert, the other weights grown in proportion; None where nobody would be left."""
        left = {name: weight for name, weight in zip(self.experts, self.lambdas, strict=True) if name != expert}
        total = math.fsum(left.values())
        if expert not in self.experts or not left:
            return None
        return replace(self, experts=tuple(left), lambdas=tuple(weight / total for weight in left.values()))

    @cached_property
    def log_lambda(self) -> Tensor:
        """(E,) of the styled experts, float64."""
        return torch.tensor(self.lambdas, dtype=torch.float64).log()


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged distribution of one step."""

    candidates: Candidates
    log_pi: Tensor
    """(C,), float64, before temperature and top_p."""
    weights: Tensor
    """(E,) of the styled experts."""
    missed_mass: float | None
    floor_mass: float


def merge_lists(rule: MergeRule, lists: Lists, log_lambda: Tensor, head_scores: Tensor, gate: Gate) -> MergedLists:
    """The one token step: experts' lists and scores (..., E) to the merged distribution. Differentiable.

    Where the rule needs the base, `lists` has its row in front; `log_lambda` and `head_scores` never have one.
    """
    log_pi, weights = merge_arrays(
        rule,
        gate,
        logprobs=lists.logprobs,
        floors=lists.floors,
        tails=lists.tails,
        log_lambda=log_lambda,
        head_scores=head_scores,
    )
    return MergedLists(log_pi, weights)


def merge_arrays(
    rule: MergeRule,
    gate: Gate,
    *,
    logprobs: Array,
    floors: Array,
    tails: Array,
    log_lambda: Array,
    head_scores: Array,
    fits: Mask | None = None,
) -> tuple[Array, Array]:
    """`merge_lists` for torch or numpy: log pi (..., C) and weights (..., E).

    Of the candidates that do not `fits` (..., C) the experts' weights know, but nothing else: a rule that weighs the
    candidates against each other sees those alone that fit.
    """
    scores = head_scores
    if not gate.is_head_alone:
        phi = _features(rule, logprobs, floors, tails, log_lambda)
        scores = gate.scores(head_scores, phi, log_lambda > -math.inf)
    weights = rule.weights(log_lambda, scores)
    if fits is not None:
        logprobs = namespace_of(logprobs).where(fits[..., None, :], logprobs, -math.inf)
    return rule.merge(fill_missing(rule, logprobs, floors), weights), weights


def _features(rule: MergeRule, logprobs: Array, floors: Array, tails: Array, log_lambda: Array) -> Array:
    if not rule.needs_base:
        return expert_features(logprobs, log_lambda, tails)
    # Whatever the rule: from a base that counts as 0 where it listed nothing every divergence would be infinite.
    base: Array = namespace_of(logprobs).maximum(logprobs[..., 0, :], at_least(floors[..., :1], IMPOSSIBLE))
    return expert_features(logprobs[..., 1:, :], log_lambda, tails[..., 1:], base)


def merge_step(plan: Plan, distributions: Sequence[TokenDistribution], head_scores: Tensor, gate: Gate) -> Merged:
    """Merge what `plan.asked` said, given the PCM's scores (E,) and its gate. Raises AlignmentError."""
    return merge_path(plan, (distributions,), head_scores[None], gate)[0]


def merge_fitting(
    plan: Plan,
    distributions: Sequence[TokenDistribution],
    head_scores: Tensor,
    gate: Gate,
    fits: Callable[[Candidates], Mask],
) -> Merged | None:
    """`merge_step` over the candidates that `fits`, (C,) bool of C candidates; None where none does."""
    lists = align_path((distributions,))
    mask = fits(lists.candidates[0])
    return _merge_aligned(plan, lists, head_scores[None], gate, mask[None])[0] if mask.any() else None


def merge_path(
    plan: Plan, path: Sequence[Sequence[TokenDistribution]], head_scores: Tensor, gate: Gate
) -> tuple[Merged, ...]:
    """`merge_step` for M positions of one answer at once: M lists of E distributions, head scores (M, E)."""
    return _merge_aligned(plan, align_path(path), head_scores, gate)


def _merge_aligned(
    plan: Plan, lists: AlignedPath, head_scores: Tensor, gate: Gate, fits: Mask | None = None
) -> tuple[Merged, ...]:
    # In numpy: for so few numbers torch's calls would cost more than the work.
    log_pi, weights = merge_arrays(
        plan.rule,
        gate,
        logprobs=lists.logprobs,
        floors=lists.floors,
        tails=lists.tails,
        log_lambda=plan.log_lambda.numpy(),
        head_scores=head_scores.detach().double().numpy(),
        fits=fits,
    )
    first = 1 if plan.rule.needs_base else 0
    bounds: list[float] | list[None] = [None] * len(lists.candidates)
    if plan.rule.name == "linear":
        bounds = missed_mass(weights, lists.tails[:, first:]).tolist()
    is_unlisted = (lists.logprobs == -math.inf).any(axis=1)
    floor_masses = (np.exp(log_pi) * is_unlisted).sum(axis=1).tolist()
    return tuple(
        Merged(
            one,
            torch.from_numpy(log_pi[m, : len(one.pieces)]),
            torch.from_numpy(weights[m]),
            missed_mass=bounds[m],
            floor_mass=floor_masses[m],
        )
        for m, one in enumerate(lists.candidates)
    )
