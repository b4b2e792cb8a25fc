"""Style sentences: the preference of one pole as text, in many wordings, some of them never seen in training."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from itertools import product
from typing import Final

from mope_bb.zoo.facts import with_article

AXES: Final[dict[str, tuple[str, str]]] = {
    "register": ("simple", "technical"),
    "detail": ("concise", "informative"),
    "tone": ("friendly", "grumpy"),
}
"""The three axes with their two poles; each pole is a preference dimension with an expert of its own."""

DIMENSIONS: Final[tuple[str, ...]] = tuple(pole for poles in AXES.values() for pole in poles)

MAIN_SENTENCES: Final[dict[str, str]] = {
    "simple": "Generate a response that is easy to understand, with simple everyday words.",
    "technical": "Generate a response that is technical and precise, as from an expert.",
    "concise": "Generate a response that is concise and to the point, without being verbose.",
    "informative": "Generate a response that is informative, with many useful details.",
    "friendly": "Generate a response that is friendly, warm and cheerful.",
    "grumpy": "Generate a response that is grumpy, cold and annoyed.",
}
"""The sentence by which a dimension is known in a configuration; part of the training wordings."""

_ADJECTIVES: Final[dict[str, tuple[str, ...]]] = {
    "simple": ("simple", "plain", "easy", "everyday", "basic"),
    "technical": ("technical", "scientific", "expert", "precise", "professional"),
    "concise": ("concise", "short", "brief", "compact", "terse"),
    "informative": ("informative", "detailed", "thorough", "complete", "extensive"),
    "friendly": ("friendly", "warm", "kind", "cheerful", "polite"),
    "grumpy": ("grumpy", "rude", "cold", "annoyed", "grouchy"),
}
_FRAMES: Final[tuple[str, ...]] = (
    "Be {x}.",
    "Please be {x}.",
    "Give {ax} answer.",
    "I want {ax} reply.",
    "Your style is {x}.",
    "Answer in {ax} way.",
    "Generate a response that is {x}.",
    "Make it {x}, please.",
)
_HELD_OUT_FRAMES: Final[tuple[str, ...]] = (
    "Write {ax} response, please.",
    "The user likes {x} answers.",
    "Stay {x} in your reply.",
)


def _fill(frame: str, adjective: str) -> str:
    return frame.format(x=adjective, ax=with_article(adjective))


@cache
def style_sentences(pole: str, *, held_out: bool = False) -> tuple[str, ...]:
    """Wordings of one pole: those of the base's training, or those kept back.

    Kept back are new frames, and known frames with a known word that never stood in them.
    """
    adjectives = _ADJECTIVES[pole]
    combined = [
        (_fill(frame, adjective), (row + column) % 4 == 3)
        for (row, frame), (column, adjective) in product(enumerate(_FRAMES), enumerate(adjectives))
    ]
    if held_out:
        new_frames = [_fill(frame, adjective) for frame, adjective in product(_HELD_OUT_FRAMES, adjectives)]
        return tuple([text for text, kept_back in combined if kept_back] + new_frames)
    return (MAIN_SENTENCES[pole], *(text for text, kept_back in combined if not kept_back))


def draw_style_sentence(pole: str, rng: random.Random) -> str:
    """A training wording of `pole`; the main sentence comes in a quarter of the draws."""
    return MAIN_SENTENCES[pole] if rng.random() < 0.25 else rng.choice(style_sentences(pole))


def combinations() -> tuple[tuple[str, str, str], ...]:
    """The eight preferences that take one pole of each axis."""
    return tuple(product(*AXES.values()))


def check_poles(poles: Iterable[str]) -> tuple[str, ...]:
    """`poles` as a tuple. Raises ValueError for an unknown pole or for both poles of one axis."""
    chosen = tuple(poles)
    if unknown := set(chosen) - set(DIMENSIONS):
        raise ValueError(f"unknown dimension {sorted(unknown)[0]!r}, expected one of {', '.join(DIMENSIONS)}")
    for axis, ends in AXES.items():
        if set(ends) <= set(chosen):
            raise ValueError(f"{ends[0]!r} and {ends[1]!r} are opposite poles of {axis}")
    return chosen
