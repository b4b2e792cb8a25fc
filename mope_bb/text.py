"""From pieces to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mope_bb.types import END, Piece


class TextAssembler:
    """Gives out text as soon as it is final: neither half a character nor what may be the start of a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False
        """The answer has ended: by END, or by a stop string, which is cut off."""

    def feed(self, piece: Piece) -> str:
        """The text that became final with `piece`."""
        if piece == END:
            self.is_stopped = True
            return ""
        self._held += self._decoder.decode(piece.data)
        found = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._decoder.reset()
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((self._possible_start(stop) for stop in self._stop), default=0)
        split = len(self._held) - keep
        text, self._held = self._held[:split], self._held[split:]
        return text

    def flush(self) -> str:
        """What is still held back, at the end of the answer; an incomplete character becomes U+FFFD."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return text

    def _possible_start(self, stop: str) -> int:
        """Length of the longest end of the held text that is a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
