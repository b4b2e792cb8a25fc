"""The form an answer must have: the second seam of `decode`, beside the merge rule.

A constraint speaks of bytes, so that it holds for any tokenizer and for endpoints that know no ids. What is sampled is
the merged distribution restricted to the pieces that may come next, normalised there.

An expert that knows nothing of the form wants to end its answer where the form does not allow it. There its END is
read as the next piece of the shortest text that completes the form: the end of the string, list or object that is open.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mope_bb.types import END, Candidates, Piece, TokenDistribution, TokenStep

MAX_NAMED: Final = 256
"""So many pieces at most are named where no list holds one that fits."""


class Constraint(ABC):
    """What may come next in one answer. It is advanced as the answer grows."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """The answer may end here."""

    @property
    def is_free(self) -> bool:
        """Nothing is forbidden from here on."""
        return False

    @abstractmethod
    def forced(self) -> bytes:
        """What has to come next, whole characters only; empty where there is a choice, or where the answer is over."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Nothing but the end may come."""

    @abstractmethod
    def allows(self, data: bytes) -> bool:
        """Whether `data`, not empty, may come next."""

    @abstractmethod
    def closing(self) -> bytes | None:
        """A short text that completes the answer; None where none was found."""

    @abstractmethod
    def advance(self, data: bytes) -> None:
        """The answer went on with `data`, which is allowed."""

    @abstractmethod
    def restart(self, data: bytes) -> None:
        """The answer so far is `data`, whatever it was."""

    def allows_piece(self, piece: Piece) -> bool:
        """Whether `piece` may come next. Control tokens add no bytes, and are no part of any form."""
        return self.is_complete if piece == END else bool(piece.data) and self.allows(piece.data)

    def mask(self, candidates: Candidates) -> NDArray[np.bool_]:
        """Which of C candidates may come next, (C,)."""
        return np.array([self.allows_piece(piece) for piece in candidates.pieces])

    def allowed_among(self, vocabulary: Sequence[Piece]) -> list[Piece]:
        """Pieces that may come next, the shortest first and at most `MAX_NAMED`: they are what text is made of.

        END is one of them where the answer may end here.
        """
        found = [END] if self.is_complete else []
        found += [piece for piece in vocabulary if piece != END and self.allows_piece(piece)]
        return sorted(found, key=lambda piece: len(piece.data))[:MAX_NAMED]


def read_end_as(piece: Piece, distribution: TokenDistribution) -> TokenDistribution:
    """`distribution` with the probability of END given to `piece`."""
    if END not in distribution.pieces:
        return distribution
    if piece.token_id is None and any(one.token_id is not None for one in distribution.pieces if one != END):
        # An endpoint that tells ids and no tokenizer: only what is on its lists has one.
        same = [one for one in distribution.pieces if one.data == piece.data]
        if not same:
            return distribution
        piece = same[0]
    found = dict(zip(distribution.pieces, distribution.logprobs, strict=True))
    end = found.pop(END)
    found[piece] = float(np.logaddexp(found.get(piece, -math.inf), end))
    ranked = sorted(found.items(), key=lambda entry: (-entry[1], entry[0].token_id or 0, entry[0].data))
    return TokenDistribution(
        tuple(one for one, _ in ranked),
        tuple(min(0.0, value) for _, value in ranked),
        # END is no piece any more.
        distribution.vocab_size and distribution.vocab_size - 1,
        distribution.is_guess,
    )


def forced_step(piece: Piece, policy_version: int) -> TokenStep:
    """The step that gave `piece` without any expert."""
    return TokenStep(
        piece=piece,
        logprob=0.0,
        experts=(),
        candidates=Candidates((piece,), np.zeros((0, 1)), (), ()),
        index=0,
        weights=(),
        missed_mass=None,
        floor_mass=0.0,
        entropy=0.0,
        policy_version=policy_version,
    )
