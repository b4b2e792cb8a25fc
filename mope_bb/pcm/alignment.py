"""Joining the experts' lists: which pieces are the candidates of a merge, and what each expert said of them.

Shapes: M positions of one answer, E experts, C candidates, N entries of all lists behind each other. No loop here goes
over pieces: an answer aligns hundreds of them for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from operator import attrgetter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mope_bb.errors import AlignmentError
from mope_bb.types import END, ROUNDING_MASS, Candidates, Piece, TokenDistribution

Floats = NDArray[np.float64]
KEY_BITS: Final = 40
"""Keys, which are token ids, stay below this power of 2, so that one number holds a group and a key."""


@dataclass(frozen=True, eq=False, slots=True)
class Placement:
    """Where the entries of many lists stand among the candidates of their groups."""

    named_by: NDArray[np.intp]
    """An entry that names each candidate: group by group, in the order of the keys."""
    columns: NDArray[np.intp]
    """(N,) which of its group's candidates each entry names."""
    counts: NDArray[np.intp]
    """Candidates of each group."""


def place_keys(keys: NDArray[np.int64], groups: NDArray[np.intp], *, num_groups: int) -> Placement:
    """Join equal keys within each group: keys (N,) and the group of each, (N,), counted from 0."""
    # By hand, since `numpy.unique` sorts stably, which takes three times as long.
    joint = (groups << KEY_BITS) + keys
    order = joint.argsort()
    ranked = joint[order]
    is_new = np.ones(len(ranked), dtype=np.bool_)
    np.not_equal(ranked[1:], ranked[:-1], out=is_new[1:])
    named_by = order[is_new]
    places = np.empty_like(order)
    places[order] = is_new.cumsum() - 1
    counts = np.bincount(groups[named_by], minlength=num_groups)
    return Placement(named_by, places - (counts.cumsum() - counts)[groups], counts)


@dataclass(frozen=True, eq=False, slots=True)
class AlignedPath:
    """The lists of M positions of one answer, each with E lists."""

    candidates: tuple[Candidates, ...]
    """M of them."""
    logprobs: Floats
    """(M, E, C): positions with fewer candidates than the widest are padded behind, with -inf."""
    floors: Floats
    """(M, E)."""
    tails: Floats
    """(M, E)."""


def align(distributions: Sequence[TokenDistribution]) -> Candidates:
    """Join the experts' lists: one candidate for each piece that is on any of them.

    Raises AlignmentError where the lists cannot be of one tokenizer.
    """
    return align_path((distributions,)).candidates[0]


def align_path(path: Sequence[Sequence[TokenDistribution]]) -> AlignedPath:
    """`align` for M positions of one answer at once."""
    if not path or not all(path):
        raise AlignmentError("there is no distribution to merge")
    listed = [list(chain.from_iterable(one.pieces for one in position)) for position in path]
    keys = np.concatenate([_keys_of(pieces) for pieces in listed])
    positions = np.repeat(np.arange(len(path)), [len(pieces) for pieces in listed])
    found = place_keys(keys, positions, num_groups=len(path))
    if [len(set(pieces)) for pieces in listed] != found.counts.tolist():
        raise _conflict(listed)
    pieces = list(map(list(chain.from_iterable(listed)).__getitem__, found.named_by.tolist()))
    logprobs, floors, tails = (one.reshape(len(path), -1, *one.shape[1:]) for one in _rows(path, found))
    ends = found.counts.cumsum().tolist()
    candidates = []
    for m, (end, size) in enumerate(zip(ends, found.counts.tolist(), strict=True)):
        # A copy, so that a step which is kept does not keep the whole path.
        said = logprobs[m, :, :size].copy()
        candidates.append(
            Candidates(tuple(pieces[end - size : end]), said, tuple(floors[m].tolist()), tuple(tails[m].tolist()))
        )
    return AlignedPath(tuple(candidates), logprobs, floors, tails)


def _rows(path: Sequence[Sequence[TokenDistribution]], found: Placement) -> tuple[Floats, Floats, Floats]:
    """Logprobs of the candidates (M * E, C), floors and tail masses (M * E,)."""
    lists = list(chain.from_iterable(path))
    sizes = np.array([len(one.pieces) for one in lists])
    values = np.fromiter(chain.from_iterable(one.logprobs for one in lists), np.float64, len(found.columns))
    logprobs = np.full((len(lists), found.counts.max()), -np.inf)
    logprobs[np.repeat(np.arange(len(lists)), sizes), found.columns] = values
    ends = sizes.cumsum()
    missing = np.array([1 if one.vocab_size is None else one.vocab_size - len(one.pieces) for one in lists])
    tails, floors = tails_and_floors(np.add.reduceat(np.exp(values), ends - sizes), values[ends - 1], missing)
    tails[[one.is_guess for one in lists]] = 1.0
    return logprobs, floors, tails


def tails_and_floors(masses: Floats, smallest: Floats, missing: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """`TokenDistribution.tail_mass` and `floor` of many lists that are no guesses.

    From their masses, their smallest logprobs, and how many pieces are not on them: 1 where that is not known.
    """
    tails = np.clip(1.0 - masses, 0.0, 1.0)
    shared = np.log(np.maximum(tails, ROUNDING_MASS) / np.maximum(missing, 1))
    return tails, np.where(missing > 0, np.minimum(smallest, shared), -np.inf)


def _keys_of(pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """What identifies each piece in one merge and orders the candidates: its id, else its bytes' rank; END's is -1."""
    try:
        return np.fromiter(map(attrgetter("token_id"), pieces), np.int64, len(pieces))
    except TypeError:  # a piece without an id
        known = set(pieces) - {END}
    if set(map(attrgetter("token_id"), known)) != {None}:
        raise AlignmentError("some experts give token ids and others only bytes; they cannot be merged")
    rank = {**dict(zip(sorted(known), count(), strict=False)), END: -1}
    return np.fromiter(map(rank.__getitem__, pieces), np.int64, len(pieces))


def _conflict(listed: Sequence[Sequence[Piece]]) -> AlignmentError:
    """Names the first token that has two meanings at one of the positions."""
    for pieces in listed:
        known: dict[int | bytes, Piece] = {}
        for piece in pieces:
            if known.setdefault(piece.key, piece) != piece:
                return AlignmentError(
                    f"token {piece.token_id} is {known[piece.key].data!r} for one expert, {piece.data!r} for another",
                    hint="The experts have different tokenizers; use experts fine-tuned from one base model.",
                )
    raise AssertionError("no token has two meanings")
