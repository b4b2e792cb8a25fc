"""The token step itself: what the experts said and the PCM's scores to one merged distribution. No endpoint, no sampling.

align -> features -> weights -> merge
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mope_bb.pcm.features import expert_features
from mope_bb.pcm.gates import Gate
from mope_bb.pcm.mixture import Lists, MergedLists, MergeRule, align, fill_missing, missed_mass
from mope_bb.types import Candidates, TokenDistribution


@dataclass(frozen=True, slots=True)
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

    @property
    def asked(self) -> tuple[str, ...]:
        """Everyone who is asked, in the order of all E-sized fields of a TokenStep."""
        return (self.base, *self.experts) if self.base is not None and self.rule.needs_base else self.experts

    @property
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
    first = 1 if rule.needs_base else 0
    filled = fill_missing(rule, lists.logprobs, lists.floors)
    # Whatever the rule: from a base that counts as 0 where it listed nothing every divergence would be infinite.
    base = fill_missing(MergeRule("product"), lists.logprobs, lists.floors)[..., 0, :] if first else None
    phi = expert_features(lists.logprobs[..., first:, :], log_lambda, lists.tails[..., first:], base)
    weights = rule.weights(log_lambda, gate.scores(head_scores, phi, torch.isfinite(log_lambda)))
    return MergedLists(rule.merge(filled, weights), weights)


def merge_step(plan: Plan, distributions: Sequence[TokenDistribution], head_scores: Tensor, gate: Gate) -> Merged:
    """Merge what `plan.asked` said, given the PCM's scores (E,) and its gate. Raises AlignmentError."""
    candidates = align(distributions)
    lists = Lists(
        torch.tensor(candidates.logprobs, dtype=torch.float64),
        torch.tensor(candidates.floors, dtype=torch.float64),
        torch.tensor(candidates.tails, dtype=torch.float64),
    )
    merged = merge_lists(plan.rule, lists, plan.log_lambda, head_scores.double(), gate)
    unlisted = torch.isneginf(lists.logprobs).any(dim=0)
    first = 1 if plan.rule.needs_base else 0
    return Merged(
        candidates,
        merged.log_pi,
        merged.weights,
        missed_mass=float(missed_mass(merged.weights, lists.tails[first:])) if plan.rule.name == "linear" else None,
        floor_mass=float(merged.log_pi.exp()[unlisted].sum()),
    )


def merge_path(
    plan: Plan, path: Sequence[Sequence[TokenDistribution]], head_scores: Tensor, gate: Gate
) -> tuple[Merged, ...]:
    """`merge_step` for M positions of one answer at once: M lists of E distributions, head scores (M, E)."""
    return tuple(merge_step(plan, one, scores, gate) for one, scores in zip(path, head_scores, strict=True))
