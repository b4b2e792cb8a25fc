"""What the benchmarks claim: each claim with the figures that were measured and its target, as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES: Final = 4000


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the table."""

    text: str
    figures: str
    target: str
    is_met: bool


@dataclass(frozen=True, slots=True)
class Bound:
    """A target: a figure must be at least, or at most, `value`."""

    kind: str
    """">=" or "<="."""
    value: float

    def claim(self, text: str, figures: Mapping[str, Mapping[str, float]]) -> Claim:
        """The claim that every one of `figures` (name -> interval, or a figure alone) keeps this bound."""
        values = [one["value"] for one in figures.values()]
        is_met = all(value >= self.value if self.kind == ">=" else value <= self.value for value in values)
        shown = ", ".join(f"{name} {show(one)}".strip() for name, one in figures.items())
        return Claim(text, shown, f"{self.kind} {self.value:g}", is_met)


def at_least(value: float) -> Bound:
    """The target `>= value`."""
    return Bound(">=", value)


def at_most(value: float) -> Bound:
    """The target `<= value`."""
    return Bound("<=", value)


def show(interval: Mapping[str, float]) -> str:
    """A figure with the ends of its interval, where it has one."""
    ends = f" ({interval['low']:.3g} to {interval['high']:.3g})" if "low" in interval else ""
    return f"{interval['value']:.3g}{ends}"


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """The median over rounds, with its 95 % percentile bootstrap interval."""
    found = np.asarray(values, dtype=np.float64)
    return _interval(float(np.median(found)), np.median(found[_resamples(len(found))], axis=1))


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> dict[str, float]:
    """The sum of `parts` over rounds for each of `wholes`, with its 95 % percentile bootstrap interval."""
    some, all_ = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    drawn = _resamples(len(some))
    return _interval(float(some.sum() / all_.sum()), some[drawn].sum(axis=1) / all_[drawn].sum(axis=1))


def _resamples(num_rounds: int) -> NDArray[np.int64]:
    """Which rounds are in each resample."""
    return np.random.default_rng(0).integers(num_rounds, size=(NUM_RESAMPLES, num_rounds))


def _interval(value: float, resampled: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"value": value, "low": float(low), "high": float(high)}


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers inside `value` with so many significant digits, as a file of results shows them."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(inner, digits) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner, digits) for inner in value]
    return value


def table(claims: Sequence[Claim]) -> str:
    """All claims, one a line."""
    rows = [("claim", "measured", "target", ""), *((c.text, c.figures, c.target, mark(c)) for c in claims)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def mark(claim: Claim) -> str:
    """Whether the target was met, in a word."""
    return "met" if claim.is_met else "MISSED"
