"""What a token can tell of itself: OpenAI's logprobs, and our trace of the experts. Computed only where asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.readout import carried_by, merged_logprobs
from mope_bb.server.protocol import Trace
from mope_bb.types import END, Piece, Token, TokenStep

END_SHOWN: Final = "<end>"
NUM_OWN: Final = 5
"""Next tokens of each expert in a trace."""
LOWEST: Final = -9999.0
"""What OpenAI writes for a probability of 0."""


@dataclass(frozen=True, slots=True)
class Details:
    """What one token tells, where it was asked for."""

    logprob: dict[str, Any] | None = None
    """An entry of OpenAI's `logprobs.content`, the end of the answer among them."""
    trace: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request wants to know of each token."""

    top: int | None = None
    """How many other pieces OpenAI's logprobs tell; None = no logprobs."""
    trace: Trace | None = None

    def of(self, token: Token, rule: MergeRule) -> Details:
        """What `token` tells."""
        if self.top is None and self.trace is None:
            return Details()
        step = token.step
        logprobs = merged_logprobs(step, rule)
        entry = None
        if self.top is not None:
            best = np.argsort(-logprobs, kind="stable")[: self.top].tolist()
            tops = [_entry(step.candidates.pieces[at], logprobs[at]) for at in best if logprobs[at] > -math.inf]
            entry = {**_entry(step.piece, logprobs[step.index]), "top_logprobs": tops}
        trace = None if self.trace is None else _trace(token, rule, logprobs, with_experts=self.trace == "experts")
        return Details(entry, trace)


def shown(piece: Piece) -> str:
    """A piece as text of its own; half a character becomes U+FFFD."""
    return END_SHOWN if piece == END else piece.data.decode(errors="replace")


def _entry(piece: Piece, logprob: float) -> dict[str, Any]:
    # The id is ours, not OpenAI's: with it a mixture can be an expert of another one.
    known = {} if piece.token_id is None else {"token_id": piece.token_id}
    return {"token": shown(piece), "logprob": _told(logprob), "bytes": list(piece.data), **known}


def _told(logprob: float) -> float | None:
    """None where it is not known: an expert without logprobs takes part."""
    return None if math.isnan(logprob) else max(float(logprob), LOWEST)


def _trace(token: Token, rule: MergeRule, logprobs: Any, *, with_experts: bool) -> dict[str, Any]:
    step = token.step
    trace: dict[str, Any] = {
        "text": token.text,
        "bytes": list(step.piece.data),
        "logprob": _told(logprobs[step.index]),
        "is_forced": step.is_forced,
        "weights": dict(token.weights),
        "carriers": carried_by(step, rule),
        "missed_mass": step.missed_mass,
    }
    if with_experts:
        trace["experts"] = {name: _own(step, row) for row, name in enumerate(step.experts)}
    return trace


def _own(step: TokenStep, row: int) -> dict[str, Any]:
    said = step.candidates.logprobs[row]
    best = [at for at in np.argsort(-said, kind="stable")[:NUM_OWN].tolist() if said[at] > -math.inf]
    of_this = float(said[step.index])
    return {
        "logprob": of_this if math.isfinite(of_this) else None,
        "top": [{"text": shown(step.candidates.pieces[at]), "logprob": float(said[at])} for at in best],
    }
