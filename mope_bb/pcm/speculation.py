"""Testing a drafted piece against the merged distribution, so that what is kept has exactly that distribution.

Draft and score (METHOD section 4; Leviathan et al., arXiv 2211.17192): a piece d drawn from q is kept with probability
min(1, pi(d) / q(d)), else one is drawn from the positive part of pi - q. Under top-k q is known on the drafter's list
only: given that d is on it, d comes from q renormalised there; a piece that is not on it is thrown away and one is
drawn from pi.

Shapes: E experts, C candidates, K entries of the drafter's list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mope_bb.pcm.pacing import SHARPNESS
from mope_bb.pcm.sampling import draw
from mope_bb.types import Candidates, DraftStep, TokenDistribution

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The candidate that this position gets."""

    index: int
    is_kept: bool
    """It is the drafted piece, so that the next position of the draft can be tested."""


def verify(log_pi: Tensor, candidates: Candidates, step: DraftStep, uniforms: tuple[float, float]) -> Verdict:
    """Keep the drafted piece or replace it; log pi (C) is what would be drawn from without a draft."""
    pi = log_pi.exp().numpy()
    if step.index is None:
        return Verdict(draw(log_pi, uniforms[1]), is_kept=False)
    columns = columns_of(candidates, step.distribution)
    drafted = int(columns[step.index])
    q = np.zeros_like(pi)
    q[columns] = np.exp(np.array(step.log_q))
    if uniforms[0] * q[drafted] < pi[drafted]:
        return Verdict(drafted, is_kept=True)
    positive = np.maximum(pi - q, 0.0)
    if not positive.any():  # pi is q, up to rounding
        return Verdict(drafted, is_kept=True)
    return Verdict(draw(torch.from_numpy(positive).log(), uniforms[1]), is_kept=False)


def columns_of(candidates: Candidates, distribution: TokenDistribution) -> npt.NDArray[np.intp]:
    """Where each entry of a list stands among the candidates, (K)."""
    place = {piece.key: column for column, piece in enumerate(candidates.pieces)}
    return np.array([place[piece.key] for piece in distribution.pieces], dtype=np.intp)


def agreement_row(log_pi: Floats, logprobs: Floats, temperature: float) -> Floats:
    """A row of `pacing.Agreement`, from log pi (C) as it is drawn from, the lists (E, C) and the answer's temperature.

    Drafts by expert i are kept with probability sum_v min(pi(v), q_i(v)), q_i its list at the drafting temperature:
    for every sharpness and expert. Then pi of the piece that all experts hold for the most probable, 0 where they
    differ; then 1.
    """
    pi = np.exp(log_pi)
    best = logprobs.argmax(axis=1)
    common = pi[best[0]] if (best == best[0]).all() else 0.0
    if temperature == 0.0:
        return np.concatenate((*(pi[best] for _ in SHARPNESS), (common, 1.0)))
    powers = np.multiply.outer(1 / (temperature * np.array(SHARPNESS)), logprobs - logprobs.max(axis=1, keepdims=True))
    q = np.exp(powers)
    kept = np.minimum(pi, q / q.sum(axis=2, keepdims=True)).sum(axis=2)
    return np.concatenate((kept.ravel(), (common, 1.0)))
