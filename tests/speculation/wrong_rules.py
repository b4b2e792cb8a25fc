"""Ways of testing a draft that look right and are not: the chi-square test must find them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from torch import Tensor

from mope_bb.pcm.sampling import draw
from mope_bb.pcm.speculation import Verdict, verify
from mope_bb.types import Candidates, DraftStep
from tests.speculation.measure import Setup


def _drawn_again_from_pi(
    log_pi: Tensor, candidates: Candidates, step: DraftStep, uniforms: tuple[float, float]
) -> Verdict:
    """In place of a piece that is not kept, one from all of pi instead of the positive part of pi - q."""
    verdict = verify(log_pi, candidates, step, uniforms)
    return verdict if verdict.is_kept else Verdict(draw(log_pi, uniforms[1]), is_kept=False)


def _not_renormalised(
    log_pi: Tensor, candidates: Candidates, step: DraftStep, uniforms: tuple[float, float]
) -> Verdict:
    """q as the list gives it, without regard to the tail."""
    return verify(log_pi, candidates, _with_q(step, step.distribution.logprobs), uniforms)


def _at_temperature_1(
    log_pi: Tensor, candidates: Candidates, step: DraftStep, uniforms: tuple[float, float]
) -> Verdict:
    """q without regard to the temperature of the draft."""
    total = np.logaddexp.reduce(step.distribution.logprobs)
    return verify(log_pi, candidates, _with_q(step, tuple(step.distribution.logprobs - total)), uniforms)


def _kept_unlisted(log_pi: Tensor, candidates: Candidates, step: DraftStep, uniforms: tuple[float, float]) -> Verdict:
    """A piece that is not on the drafter's list, but on another's, is kept."""
    if step.index is None and step.piece in candidates.pieces:
        return Verdict(candidates.pieces.index(step.piece), is_kept=True)
    return verify(log_pi, candidates, step, uniforms)


def _with_q(step: DraftStep, log_q: tuple[float, ...]) -> DraftStep:
    return DraftStep(step.distribution, step.piece, step.index, log_q)


WRONG: Final[dict[str, tuple[Callable[..., Verdict], Setup]]] = {
    "drawn again from pi": (_drawn_again_from_pi, Setup("linear")),
    "q not renormalised": (_not_renormalised, Setup("linear")),
    "unlisted piece kept": (_kept_unlisted, Setup("linear")),
    "q at temperature 1": (_at_temperature_1, Setup("linear", temperature=0.5)),
}
"""Instead of `speculation.verify`, and where it is wrong."""
