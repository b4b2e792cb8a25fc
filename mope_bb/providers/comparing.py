"""Lists of one endpoint compared with each other, as the wire had them. Pure functions, for `probe`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from mope_bb.errors import LogprobsUnavailableError
from mope_bb.providers.wire import Position, Reply
from mope_bb.types import Piece, TokenDistribution

Entries = Sequence[tuple[Piece, float | None]]
SAME: Final = 0.05
"""Nats: replies to one question differ by less, those to different questions by more at some of the best pieces."""


def first_position(reply: Reply) -> Position:
    """The first position of a reply. Raises LogprobsUnavailableError where there is none."""
    if not reply.positions:
        raise LogprobsUnavailableError("the server answered without logprobs")
    return reply.positions[0]


def length(position: Position) -> int:
    """How many entries the wire had, unreadable ones among them."""
    return len(position.entries) + position.num_unreadable


def by_value(entry: tuple[Piece, float | None]) -> float:
    """A key that sorts entries from the most probable down."""
    return math.inf if entry[1] is None else -entry[1]


def best_piece(position: Position) -> Piece | None:
    """The most probable piece of a list."""
    return min(position.entries, key=by_value)[0] if position.entries else None


def descends(values: Sequence[float | None]) -> bool:
    """Whether values come in order."""
    found = [-math.inf if value is None else value for value in values]
    return all(left >= right for left, right in pairwise(found))


def agree(left: Entries, right: Entries) -> bool:
    """Whether two lists are of one distribution: the best pieces of each have about the same values in the other."""
    first, second = dict(left), dict(right)
    for one, other in ((first, second), (second, first)):
        lowest = min((value for value in other.values() if value is not None), default=0.0)
        for piece, value in sorted(one.items(), key=by_value)[:5]:
            found = other.get(piece)
            # Below the other list's end a piece may be missing.
            if value is not None and (abs(found - value) if found is not None else value - lowest) > SAME:
                return False
    return True


def same_list(left: TokenDistribution, right: TokenDistribution) -> bool:
    """Whether two lists hold the same pieces with about the same values; at the ends equal values may change places."""
    for one, other in ((left, right), (right, left)):
        known = dict(zip(other.pieces, other.logprobs, strict=True))
        for piece, value in zip(one.pieces, one.logprobs, strict=True):
            if abs(known.get(piece, other.logprobs[-1]) - value) > SAME:
                return False
    return True


def slope(left: Entries, right: Entries) -> float | None:
    """How much the differences between logprobs grow from `left` to `right`; None where too few pieces tell."""
    second = dict(right)
    pairs = [
        (x, y) for piece, x in left if x is not None and (y := second.get(piece)) is not None and min(x, y) > -50.0
    ]
    if len(pairs) < 2:
        return None
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    spread = math.fsum((x - mean_x) ** 2 for x, _ in pairs)
    return math.fsum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread if spread > 1e-4 else None


def same_course(left: Reply, right: Reply) -> bool:
    """Equal lists as far as both drew the same pieces."""
    for first, second in zip(left.positions, right.positions, strict=False):
        if not agree(first.entries, second.entries):
            return False
        if first.drawn != second.drawn:
            return True
    return True
