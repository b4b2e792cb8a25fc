"""The token step: what the experts said and the PCM's scores to one merged distribution. No endpoint, no sampling.

align -> features -> weights -> merge
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mope_bb.pcm.alignment import align_path
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
    scores = head_scores if gate.is_head_alone else _gated_scores(rule, lists, log_lambda, head_scores, gate)
    weights = rule.weights(log_lambda, scores)
    return MergedLists(rule.merge(fill_missing(rule, lists.logprobs, lists.floors), weights), weights)


def _gated_scores(rule: MergeRule, lists: Lists, log_lambda: Tensor, head_scores: Tensor, gate: Gate) -> Tensor:
    logprobs, tails, base = lists.logprobs, lists.tails, None
    if rule.needs_base:
        # Whatever the rule: from a base that counts as 0 where it listed nothing every divergence would be infinite.
        base = torch.maximum(logprobs[..., 0, :], lists.floors[..., :1].clamp_min(IMPOSSIBLE))
        logprobs, tails = logprobs[..., 1:, :], tails[..., 1:]
    phi = expert_features(logprobs, log_lambda, tails, base)
    return gate.scores(head_scores, phi, log_lambda > -math.inf)


def merge_step(plan: Plan, distributions: Sequence[TokenDistribution], head_scores: Tensor, gate: Gate) -> Merged:
    """Merge what `plan.asked` said, given the PCM's scores (E,) and its gate. Raises AlignmentError."""
    return merge_path(plan, (distributions,), head_scores[None], gate)[0]


def merge_path(
    plan: Plan, path: Sequence[Sequence[TokenDistribution]], head_scores: Tensor, gate: Gate
) -> tuple[Merged, ...]:
    """`merge_step` for M positions of one answer at once: M lists of E distributions, head scores (M, E)."""
    candidates, lists = align_path(path)
    merged = merge_lists(plan.rule, lists, plan.log_lambda, head_scores.double(), gate)
    first = 1 if plan.rule.needs_base else 0
    bounds: list[float] | list[None] = [None] * len(path)
    if plan.rule.name == "linear":
        bounds = missed_mass(merged.weights, lists.tails[:, first:]).tolist()
    unlisted = torch.isneginf(lists.logprobs.amin(dim=1))
    floor_masses = (merged.log_pi.exp() * unlisted).sum(dim=1).tolist()
    return tuple(
        Merged(one, log_pi[: len(one.pieces)], weights, bound, floor_mass)
        for one, log_pi, weights, bound, floor_mass in zip(
            candidates, merged.log_pi.unbind(), merged.weights.unbind(), bounds, floor_masses, strict=True
        )
    )
