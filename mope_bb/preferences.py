"""What the user wants, and which expert serves how much of it.

A preference is weights over names (dimensions or experts), or a sentence. `parse_preference` turns the text of a
flag, a request or a call into a `Preference`; `Roster.resolve` turns that into lambda, one weight per expert.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from mope_bb.errors import PreferenceError

PROMPT_LAYOUT: Final = "chat-2"
"""How a PCM reads: the preference's text, if it has one, is the system message, the conversation's own follows it."""
_NAME = re.compile(r"[\w.:/-]+\Z")
_WORD = re.compile(r"[\w-]+")


@dataclass(frozen=True, slots=True)
class Preference:
    """Weights over dimensions (and experts), or a sentence that a trained PCM reads."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Positive, summing to 1; empty for a sentence."""
    text: str | None = None

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Preference:
        """Normalise `weights`, dropping zeros. Raises PreferenceError for negative, non-finite or all-zero ones."""
        for name, weight in weights.items():
            is_number = isinstance(weight, int | float)
            # Beyond this a whole number does not fit into a float.
            if not is_number or not -1e308 < weight < 1e308:
                found = weight if is_number else type(weight).__name__
                raise PreferenceError(f"the weight of {name!r} is {found}, expected a finite number")
            if weight < 0:
                raise PreferenceError(
                    f"the weight of {name!r} is {weight:g}, expected 0 or more",
                    hint="To push away from a style, prefer its opposite pole.",
                )
        total = sum(weights.values())
        if total <= 0:
            raise PreferenceError(f"all weights are 0 in {dict(weights)!r}; at least one must be positive")
        if not math.isfinite(total):
            raise PreferenceError(f"the weights of {sorted(weights)!r} add up to more than a number can hold")
        return cls({name: weight / total for name, weight in weights.items() if weight / total > 0})


PreferenceLike = str | Preference | Mapping[str, float] | None
"""What `parse_preference` reads, weights by name, or None for every dimension alike."""


def parse_preference(text: str, presets: Mapping[str, Mapping[str, float]] | None = None) -> Preference:
    """Read `text` as a preset's name, names, weights or a sentence.

    If every comma-separated part is one word or word=number it is names ("concise,friendly", "concise=0.7"),
    otherwise a sentence ("short and funny, please"); "text:" in front forces a sentence. Raises PreferenceError.
    """
    stripped = text.strip()
    if not stripped:
        raise PreferenceError("the preference is empty")
    try:
        stripped.encode()
    except UnicodeEncodeError:
        raise PreferenceError("the preference holds half of a surrogate pair, which is no text") from None
    if stripped.startswith("text:"):
        sentence = stripped.removeprefix("text:").strip()
        if not sentence:
            raise PreferenceError('the preference is empty after "text:"')
        return Preference(text=sentence)
    if presets and stripped in presets:
        return Preference.of(presets[stripped])
    parts = [part.strip() for part in stripped.split(",")]
    pairs = [part.partition("=") for part in parts]
    if not all(_NAME.match(name.strip()) for name, _, _ in pairs):
        return Preference(text=stripped)
    weights: dict[str, float] = {}
    for written, equals, number in pairs:
        name = written.strip()
        if name in weights:
            raise PreferenceError(f"{name!r} stands twice in the preference {stripped!r}")
        weights[name] = _parse_weight(name, number) if equals else 1.0
    return Preference.of(weights)


def _parse_weight(name: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise PreferenceError(f"the weight of {name!r} is {number.strip()!r}, expected a number") from None


@dataclass(frozen=True, slots=True)
class Roster:
    """Who serves what: the names of the experts, each with its dimension, and which one is the base."""

    dimension_of: Mapping[str, str | None]
    """Expert name -> dimension, in the order of the configuration; None for an expert without a dimension."""
    base: str | None = None
    presets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    dimensions: tuple[str, ...] = ()
    """All known dimensions, also those that no expert serves (they count in rewards only)."""

    def parse(self, text: str) -> Preference:
        """`parse_preference` with the presets of this roster."""
        return parse_preference(text, self.presets)

    def resolve(self, preference: Preference, *, reads_text: bool) -> dict[str, float]:
        """Lambda: the weight of each expert that takes part, positive and summing to 1, in the roster's order.

        Several experts of one dimension share its weight equally. A sentence gives every expert but the base the same
        weight if `reads_text` (the PCM is trained and decides); otherwise it is refused unless it names dimensions,
        since equal weights would mix opposite poles.
        """
        if preference.text is not None:
            if reads_text:
                experts = [name for name in self.dimension_of if name != self.base]
                return {name: 1 / len(experts) for name in experts}
            preference = self._names_in(preference.text)
        weights = dict.fromkeys(self.dimension_of, 0.0)
        for name, weight in preference.weights.items():
            for expert, share in self._serving(name):
                weights[expert] += weight * share
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not weights:
            raise PreferenceError(
                f"no expert serves {_listing(preference.weights)}", hint=f"Experts serve {_listing(self.names())}."
            )
        total = math.fsum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def names(self) -> list[str]:
        """Every name that a preference may use: served dimensions, then experts."""
        served = [dimension for dimension in self.dimension_of.values() if dimension is not None]
        return list(dict.fromkeys([*served, *self.dimension_of]))

    def _serving(self, name: str) -> list[tuple[str, float]]:
        experts = [expert for expert, dimension in self.dimension_of.items() if dimension == name]
        if experts:
            return [(expert, 1 / len(experts)) for expert in experts]
        if name in self.dimension_of:
            return [(name, 1.0)]
        if name in self.dimensions:
            return []
        known = [*self.names(), *self.presets]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise PreferenceError(
            f"{name!r} is neither a dimension nor an expert nor a preset",
            hint=(f"Did you mean {nearest[0]!r}? " if nearest else "") + f"Known: {_listing(known)}.",
        )

    def _names_in(self, sentence: str) -> Preference:
        words = {word.lower() for word in _WORD.findall(sentence)}
        named = [name for name in self.names() if name.lower() in words]
        if not named:
            raise PreferenceError(
                f"the sentence {sentence!r} names no dimension, and without a trained PCM nobody can read it",
                hint=f"Use names, for example {_listing(self.names()[:3])}, or set [pcm] path to a trained PCM.",
            )
        return Preference.of(dict.fromkeys(named, 1.0))


def describe_preference(preference: Preference, texts: Mapping[str, str]) -> str:
    """The preference as the text that the PCM reads: the sentence itself, or the dimensions' texts with their shares.

    `texts` maps a dimension to its sentence; a name without one stands for itself. A single dimension, and equal
    shares, are written without numbers.
    """
    if preference.text is not None:
        return preference.text
    weights = sorted(preference.weights.items(), key=lambda item: (-item[1], item[0]))
    equal = len({round(weight, 6) for _, weight in weights}) <= 1
    parts = (texts.get(name, name) + ("" if equal else f" ({weight:.0%})") for name, weight in weights)
    return " ".join(parts)


def _listing(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
