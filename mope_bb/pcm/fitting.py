"""Drawing pieces that fit a form, so that the answer is whole when its last token is spent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from mope_bb.errors import AlignmentError, ConfigError
from mope_bb.pcm.constraint import Constraint, read_end_as
from mope_bb.pcm.merging import Merged
from mope_bb.pcm.sampling import draw
from mope_bb.types import END, Piece, TokenDistribution

SLACK: Final = 4
"""Pieces kept in reserve: the end of an answer that is written in parts may take more than in one."""
CONTINUATION: Final = bytes(range(0x80, 0xC0))
"""Bytes that are no beginning of a character in UTF-8."""
SPELLINGS_KEPT: Final = 256


class Fitting:
    """One answer's form, and what still fits into it."""

    def __init__(self, constraint: Constraint, spell: Callable[[bytes], Awaitable[tuple[Piece, ...]]]) -> None:
        """`spell` gives the pieces of a text."""
        self.constraint = constraint
        self._spell = spell
        self._spelt: dict[bytes, tuple[Piece, ...]] = {}
        self._path: list[Piece] = []

    async def begin(self, path: Sequence[Piece], max_tokens: int) -> None:
        """The answer begins with `path`, and may have `max_tokens` more pieces.

        Raises ConfigError where that does not fit, or where not even the shortest answer fits into `max_tokens`.
        """
        try:
            self.restart(path)
        except ValueError as error:
            raise ConfigError(
                f"the answer so far does not fit the form that is asked for: {error}", hint="Leave one of them out."
            ) from None
        if self.constraint.closing() is None:
            raise ConfigError(
                "no short answer of the form that is asked for was found",
                hint="Does the schema need itself without end, or very long texts?",
            )
        closing = await self.end()
        if len(closing) > max_tokens:
            raise ConfigError(
                f"max_tokens is {max_tokens}, and the shortest answer of this form needs about {len(closing)}",
                hint=f"Set max_tokens to {4 * len(closing)} or more.",
            )

    async def given(self, num_left: int) -> tuple[Piece, ...]:
        """What needs no expert: what the form leaves alone, or its end where nothing else fits into `num_left`."""
        if self.constraint.is_over:
            return (END,)
        if not await self._has_room(num_left - 1) and (end := await self.end()):
            return end
        return await self.spell(self.constraint.forced())

    async def end(self) -> tuple[Piece, ...]:
        """What completes the answer, END included; nothing where no way is known."""
        closing = self.constraint.closing()
        if closing is None:
            return ()
        try:
            return (*await self.spell(closing), END)
        except AlignmentError:  # in the middle of a character, which an expert must complete
            return ()

    async def read(self, lists: Sequence[TokenDistribution]) -> list[TokenDistribution]:
        """The lists as the form understands them: see `constraint`."""
        if self.constraint.is_complete or all(END not in one.pieces for one in lists):
            return list(lists)
        end = await self.end()
        return [read_end_as(end[0], one) for one in lists] if end else list(lists)

    async def draw(
        self, merged: Merged, shape: Callable[[Tensor], Tensor], uniform: Callable[[], float], num_left: int
    ) -> tuple[int, Tensor] | None:
        """A candidate that fits, and log pi (C) it was drawn from; the form goes on with it. None where none fits.

        `shape` applies temperature and top_p; `num_left` pieces may still come, this one among them.
        """
        path, left = tuple(self._path), merged.log_pi.clone()
        while bool((left > -torch.inf).any()):
            shaped = shape(torch.log_softmax(left, dim=-1))
            index = draw(shaped, uniform())
            piece = merged.candidates.pieces[index]
            self.advance(piece)
            if piece == END or await self._has_room(num_left - 1):
                return index, shaped
            self.restart(path)
            left[index] = -torch.inf
        return None

    def advance(self, piece: Piece) -> None:
        """The answer went on with `piece`."""
        self._path.append(piece)
        if piece != END:
            self.constraint.advance(piece.data)

    def follow(self, path: Sequence[Piece]) -> None:
        """The answer so far is `path`: what was drawn beyond it does not count."""
        if self._path != list(path):
            self.restart(path)

    def restart(self, path: Sequence[Piece]) -> None:
        """The answer so far is `path`, whatever it was."""
        self._path = list(path)
        self.constraint.restart(b"".join(piece.data for piece in path))

    async def spell(self, data: bytes) -> tuple[Piece, ...]:
        """The pieces of `data`; they are the same again and again."""
        if not data:
            return ()
        if data not in self._spelt:
            if len(self._spelt) >= SPELLINGS_KEPT:
                self._spelt.clear()
            self._spelt[data] = await self._spell(data)
        return self._spelt[data]

    async def _has_room(self, num_left: int) -> bool:
        """Whether the answer can be completed with `num_left` pieces, END among them."""
        closing = self.constraint.closing()
        # A piece has at least one byte: most of the time nothing needs to be spelt.
        if closing is None or len(closing) + SLACK < num_left:
            return True
        # The rest of a character may take a piece for each of its bytes.
        whole = closing.lstrip(CONTINUATION)
        return len(closing) - len(whole) + len(await self.spell(whole)) + SLACK < num_left
