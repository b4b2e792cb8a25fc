"""What the figures say in words, and how numbers are written: shared by the table and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from mope_bb.evaluation.results import Evaluation, Study
from mope_bb.evaluation.statistics import Interval, MethodSummary, best_training_free, measure_cells

Outcome = Literal["better", "worse", "even"]
JUDGES: Final = {"reward": "reward models", "oracle": "oracle"}
"""Who judges by each measure, in words; the oracle was never trained on, the reward models were."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A trained method against the best training-free black-box one."""

    method: str
    other: str
    measure: str
    difference: Interval

    @property
    def outcome(self) -> Outcome:
        """Better or worse where the interval excludes 0, else even."""
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "even"

    @property
    def sentence(self) -> str:
        """One sentence with the figures."""
        rival, by = f"the best training-free black-box method ({self.other})", JUDGES.get(self.measure, self.measure)
        size = Interval(abs(self.difference.value), *sorted(map(abs, (self.difference.low, self.difference.high))))
        if self.outcome == "better":
            return f"{self.method} beats {rival} by {bracketed(size)} ({by})."
        if self.outcome == "worse":
            return f"{self.method} is worse than {rival} by {bracketed(size)} ({by})."
        return f"{self.method} and {rival} cannot be told apart: {bracketed(self.difference, sign=True)} ({by})."


def verdicts(
    evaluation: Evaluation, summaries: Sequence[MethodSummary], measure: str = "reward", *, seed: int = 0
) -> list[Verdict]:
    """One verdict per method of the kind "mope" that shares prompts with its rival, the best first."""
    best = best_training_free(summaries, measure)
    if best is None:
        return []
    cells, rival = measure_cells(evaluation, measure, seed=seed), best.info.name
    found = [
        Verdict(summary.info.name, rival, measure, cells.difference(summary.info.name, rival))
        for summary in summaries
        if summary.info.kind == "mope" and cells.has(summary.info.name, rival)
    ]
    return sorted(found, key=lambda verdict: -verdict.difference.value)


def bracketed(interval: Interval, *, sign: bool = False) -> str:
    """Value and interval with three decimals: "0.031 [0.012, 0.050]"; with a sign for differences."""
    value, low, high = (_number(number, "+.3f" if sign else ".3f") for number in _ends(interval))
    return f"{value} [{low}, {high}]"


def plus_minus(interval: Interval | None) -> str:
    """Value and half-width: "0.612 ±0.013"; a dash for nothing."""
    return "–" if interval is None else f"{interval.value:.3f} ±{_number(interval.half_width, '.3f')}"


def percent(interval: Interval | None) -> str:
    """A share and its interval in per cent: "75 % [71, 79]"; a dash for nothing."""
    if interval is None:
        return "–"
    value, low, high = (_number(100 * number, ".0f") for number in _ends(interval))
    return f"{value} % [{low}, {high}]"


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _number(value: float, form: str) -> str:
    """A number in `form`; a question mark for NaN, the ends of an interval from a single prompt."""
    # Adding 0 turns the "-0" that rounding leaves into "0".
    return "?" if math.isnan(value) else format(round(value, 6) + 0.0, form)


def plain(interval: Interval | None, decimals: int = 2) -> str:
    """The value alone; a dash for nothing."""
    return "–" if interval is None else f"{interval.value:.{decimals}f}"


def study_cells(study: Study) -> list[list[str]]:
    """The rows of a study as text: in each column as many decimals as it needs, three at most; a dash for None."""
    columns = [_column_texts([row[column] for row in study.rows]) for column in range(len(study.columns))]
    return [list(row) for row in zip(*columns, strict=True)]


def _column_texts(values: Sequence[str | float | None]) -> list[str]:
    numbers = [float(value) for value in values if value is not None and not isinstance(value, str)]
    decimals = next((n for n in range(3) if all(abs(round(x, n) - x) < 1e-9 for x in numbers)), 3)
    return ["–" if value is None else value if isinstance(value, str) else f"{value:.{decimals}f}" for value in values]
