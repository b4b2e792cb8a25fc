"""What a step can tell afterwards: the merged distribution, and which expert carried the piece."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mope_bb.pcm.mixture import MergeRule, carriers, fill_missing
from mope_bb.types import TokenStep


def merged_logprobs(step: TokenStep, rule: MergeRule) -> NDArray[np.float64]:
    """Natural logs of the merged distribution over the step's candidates, (C,), in their order.

    Before temperature, top_p and the form of the answer; not numbers where an expert gave no logprobs.
    """
    if step.is_forced:
        return np.zeros(1)
    if step.drawn_by is not None:
        return np.full(len(step.candidates.pieces), np.nan)
    logprobs, floors, weights = _said(step, rule)
    found: NDArray[np.float64] = rule.merge(fill_missing(rule, logprobs, floors), weights).numpy()
    return found


def carried_by(step: TokenStep, rule: MergeRule) -> dict[str, float]:
    """How much each styled expert carried the piece, summing to 1; nothing where no expert was asked."""
    if step.is_forced:
        return {}
    styled = step.experts[1:] if rule.needs_base else step.experts
    if step.drawn_by is not None:
        return {name: float(name == step.drawn_by) for name in styled}
    logprobs, floors, weights = _said(step, rule)
    shares = carriers(rule, fill_missing(rule, logprobs, floors), weights)[:, step.index]
    return dict(zip(styled, shares.tolist(), strict=True))


def _said(step: TokenStep, rule: MergeRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs (E, C), floors (E) and the weights of the styled experts."""
    first = 1 if rule.needs_base else 0
    return (
        torch.from_numpy(step.candidates.logprobs),
        torch.tensor(step.candidates.floors, dtype=torch.float64),
        torch.tensor(step.weights[first:], dtype=torch.float64),
    )
