"""What is known ahead of one open answer: each expert's distributions along a path of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mope_bb.types import DraftStep, Piece, TokenDistribution


class Lookahead:
    """For each expert the distributions at the answer's end and beyond, as long as the answer goes its way."""

    def __init__(self, names: Sequence[str]) -> None:
        self._paths: dict[str, deque[tuple[TokenDistribution, Piece | None]]] = {name: deque() for name in names}

    def depth(self, name: str) -> int:
        """How many positions of `name` are known, the next one among them."""
        return len(self._paths[name])

    def learn(self, name: str, steps: Sequence[DraftStep]) -> None:
        """What `name` wrote from here on."""
        self._paths[name] = deque((step.distribution, step.piece) for step in steps)

    def learn_one(self, name: str, distribution: TokenDistribution) -> None:
        """What `name` says of the next position only."""
        self._paths[name] = deque([(distribution, None)])

    def common(self) -> tuple[list[list[TokenDistribution]], list[Piece]]:
        """The positions at which all experts are known if the answer goes on as they all expect: their lists, and
        between two of them the piece that all expect."""
        lists: list[list[TokenDistribution]] = []
        pieces: list[Piece] = []
        for column in zip(*self._paths.values(), strict=False):
            lists.append([distribution for distribution, _ in column])
            expected = {piece for _, piece in column}
            if len(expected) > 1 or None in expected:
                break
            pieces.extend(piece for piece in expected if piece is not None)
        return lists, pieces[: max(0, len(lists) - 1)]

    def advance(self, piece: Piece) -> None:
        """The answer went on with `piece`."""
        for path in self._paths.values():
            if path and path[0][1] == piece:
                path.popleft()
            else:
                path.clear()
