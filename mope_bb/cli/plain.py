"""What users and models wrote, made safe to print: a terminal obeys some characters instead of showing them."""

from __future__ import annotations

import json
import re
from typing import Any, Final

_KEPT: Final = frozenset("\n\t\u200c\u200d")
"""Also the joiners of Persian words and of emoji, which `str.isprintable` does not count as printable."""
_NOT_ASCII: Final = re.compile(r"[^ -~]")


def plain(text: object) -> str:
    """`text` with U+FFFD in the place of what a terminal would obey."""
    return "".join(char if char.isprintable() or char in _KEPT else "\ufffd" for char in str(text))


def first_line(text: object, width: int) -> str:
    """The beginning of `text` on one line of at most `width` characters."""
    line = " ".join(plain(text).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def json_text(value: Any) -> str:
    """`value` as JSON on one line: readable, with escapes for what a terminal would obey."""
    # Outside of strings JSON is ASCII, so these stand inside.
    return _NOT_ASCII.sub(lambda found: _escaped(found[0]), json.dumps(value, ensure_ascii=False))


def _escaped(char: str) -> str:
    return char if char.isprintable() or char in _KEPT else json.dumps(char)[1:-1]
