"""Means, differences, shares and win rates, each with a 95 % percentile bootstrap by prompt.

The prompts are drawn with replacement, and all answers of a prompt travel together: answers to one prompt resemble each
other, so that counting them as independent would make the intervals too narrow. All methods and all differences of one
measure use the same resamples.

Dimension letters: P prompts, N cells of a prompt (its preferences; for win rates preferences x samples), M methods,
R resamples. A cell that a method lacks is NaN.

A measure is "reward", "tokens", "entropy", "win:DIMENSION", "score:DIMENSION", or a name in `ScoredAnswer.measures`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mope_bb.errors import ConfigError
from mope_bb.evaluation.results import Evaluation, MethodInfo, ScoredAnswer

Array = NDArray[np.float64]
Thing = TypeVar("Thing", bound=Hashable)
NUM_RESAMPLES = 2_000
LEVELS = (0.025, 0.975)
TIE = 1e-12
"""Two rewards closer than this are a tie."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval; the ends are NaN where fewer than two prompts were answered."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2


def read_measure(answer: ScoredAnswer, measure: str) -> float | None:
    """The value of `measure` for one answer; None where the answer does not have it."""
    kind, _, dimension = measure.partition(":")
    if kind in {"win", "score"} and dimension:
        return (answer.wins if kind == "win" else answer.scores).get(dimension)
    known = {"reward": answer.reward, "tokens": float(answer.num_tokens), "entropy": answer.entropy}
    return known[measure] if measure in known else answer.measures.get(measure)


def draw_resamples(num_prompts: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Array:
    """How often each prompt is in each resample, R x P: every row sums to P."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_resamples).astype(np.float64)


def bootstrap_means(cells: Array, resamples: Array) -> tuple[Array, Array]:
    """The mean of each column over its cells, (M), and the same in each resample of the prompts, (R, M).

    `cells` is P x N x M with NaN for what is missing; `resamples` comes from `draw_resamples`. A mean over no cell is
    NaN; so are all resampled means of a column with fewer than two prompts, whose spread nobody can know.
    """
    present = ~np.isnan(cells)
    sums, counts = np.where(present, cells, 0.0).sum(1), present.sum(1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means, resampled = sums.sum(0) / counts.sum(0), (resamples @ sums) / (resamples @ counts)
    resampled[:, (counts > 0).sum(0) < 2] = np.nan
    return means, resampled


def percentile_interval(value: float, resampled: Array) -> Interval:
    """`value` with the 2.5 % and 97.5 % percentiles of its resamples.

    Resamples that happen to hold no answer (NaN) are left out; where all are NaN, so are the ends of the interval.
    """
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(finite, LEVELS)
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class MeasuredCells:
    """One measure of several methods, with the resamples that all of its intervals share."""

    measure: str
    methods: tuple[str, ...]
    cells: Array
    """P x N x M: the mean over the samples of each prompt and preference; NaN where there is none."""
    resamples: Array
    """R x P."""

    def has(self, *methods: str) -> bool:
        """Whether there is a cell in which all of `methods` have this measure."""
        known = all(method in self.methods for method in methods)
        return known and not bool(np.isnan(self._columns(*methods)).any(2).all())

    def mean(self, method: str) -> Interval:
        """The mean of one method over all of its cells; raises `ConfigError` where it has none."""
        value, resampled = self._shared_means(method)
        return percentile_interval(float(value[0]), resampled[:, 0])

    def difference(self, method: str, other: str) -> Interval:
        """`method` minus `other`, paired: over the cells that both have; raises `ConfigError` where there are none."""
        value, resampled = self._shared_means(method, other)
        return percentile_interval(float(value[0] - value[1]), resampled[:, 0] - resampled[:, 1])

    def share(self, method: str, *, bottom: str, top: str) -> Interval | None:
        """Share of the headroom, (method - bottom) / (top - bottom), numerator and denominator resampled together.

        None where top and bottom are equal; raises `ConfigError` where the three share no cell.
        """
        value, resampled = self._shared_means(method, bottom, top)
        if abs(value[2] - value[1]) < TIE:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = (resampled[:, 0] - resampled[:, 1]) / (resampled[:, 2] - resampled[:, 1])
        return percentile_interval(float((value[0] - value[1]) / (value[2] - value[1])), shares)

    def gain_ratio(self, part: tuple[str, str], whole: tuple[str, str]) -> Interval | None:
        """(after - before) of `part` over that of `whole`, each (before, after), all four resampled together.

        None where the whole is no gain; raises `ConfigError` where one of the four has no cell. They may answer
        different preferences: each mean is over its own cells.
        """
        means = [self._shared_means(method) for method in (*part, *whole)]
        values = [float(value[0]) for value, _ in means]
        if abs(values[3] - values[2]) < TIE:
            return None
        draws = [resampled[:, 0] for _, resampled in means]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = (draws[1] - draws[0]) / (draws[3] - draws[2])
        return percentile_interval((values[1] - values[0]) / (values[3] - values[2]), ratios)

    def _columns(self, *methods: str) -> Array:
        return self.cells[:, :, [self.methods.index(method) for method in methods]]

    def _shared_means(self, *methods: str) -> tuple[Array, Array]:
        """Means of `methods` and their resamples over the cells that all of them have."""
        columns = self._columns(*methods)
        missing = np.isnan(columns).any(2, keepdims=True)
        if missing.all():
            raise ConfigError(f"{self.measure}: no prompt and preference answered by {_listed(methods)}")
        return bootstrap_means(np.where(missing, np.nan, columns), self.resamples)


def measure_cells(
    evaluation: Evaluation, measure: str, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> MeasuredCells:
    """Lay out one measure of all methods by prompt and preference, for the intervals of `MeasuredCells`."""
    found: defaultdict[tuple[int, str, str], list[float]] = defaultdict(list)
    for answer in evaluation.answers:
        if (value := read_measure(answer, measure)) is not None:
            found[answer.prompt, answer.preference, answer.method].append(value)
    means = {cell: float(np.mean(values)) for cell, values in found.items()}
    names, cells = _lay_out(evaluation, means)
    return MeasuredCells(measure, names, cells, _resamples_for(evaluation, num_resamples, seed))


def differences(
    evaluation: Evaluation, method: str, others: Sequence[str], measure: str = "reward", *, seed: int = 0
) -> dict[str, Interval]:
    """`method` minus each of `others`, paired over the same prompts and preferences."""
    cells = measure_cells(evaluation, measure, seed=seed)
    return {other: cells.difference(method, other) for other in others}


@dataclass(frozen=True, slots=True)
class WinRates:
    """How often the answers of one method beat the matching ones of another; 0.5 is even."""

    reward: Interval
    """By the reward as a whole."""
    dimensions: dict[str, Interval]
    """By the reward model of each dimension, over the answers for which it was requested."""
    average: Interval
    """The mean of the latter, each comparison of one dimension counting alike."""


def win_rates(
    evaluation: Evaluation, method: str, other: str, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> WinRates:
    """Compare matching answers (same prompt, preference, sample): 1 for a win, 0.5 for a tie, 0 for a loss.

    Answers without a counterpart are left out; raises `ConfigError` where nothing matches. The dimensions are compared
    by raw scores, since the win probabilities of two very good answers both round to 1.
    """
    resamples = _resamples_for(evaluation, num_resamples, seed)

    def compared(measure: str) -> Array:
        names, cells = _sample_cells(evaluation, measure)
        return _compare(cells[:, :, names.index(method)], cells[:, :, names.index(other)])

    by_reward = compared("reward")
    if np.isnan(by_reward).all():
        raise ConfigError(f"no answers of {_listed((method, other))} to the same prompt, preference and sample")
    by_dimension = {dimension: compared(f"score:{dimension}") for dimension in evaluation.dimensions}
    shared = {dimension: wins for dimension, wins in by_dimension.items() if not np.isnan(wins).all()}
    every = np.concatenate([*shared.values()] or [by_reward], axis=1)
    return WinRates(
        reward=_rate(by_reward, resamples),
        dimensions={dimension: _rate(wins, resamples) for dimension, wins in shared.items()},
        average=_rate(every, resamples),
    )


def win_rate_matrix(
    evaluation: Evaluation, *, measure: str = "reward", num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[tuple[str, str], Interval]:
    """The win rate of every method over every other one with matching answers, both ways round."""
    names, cells = _sample_cells(evaluation, measure)
    resamples = _resamples_for(evaluation, num_resamples, seed)
    rates: dict[tuple[str, str], Interval] = {}
    for i, method in enumerate(names):
        for j, other in enumerate(names[:i]):
            wins = _compare(cells[:, :, i], cells[:, :, j])
            if not np.isnan(wins).all():
                rate = rates[method, other] = _rate(wins, resamples)
                rates[other, method] = Interval(1 - rate.value, 1 - rate.high, 1 - rate.low)
    return rates


@dataclass(frozen=True, slots=True)
class MethodSummary:
    """One method in figures; what no answer of it has is None."""

    info: MethodInfo
    num_answers: int
    reward: Interval
    oracle: Interval | None
    share: Interval | None
    """Of the headroom between the evaluation's bottom and ideal, by `headroom_measure`."""
    fluency: Interval | None
    facts: Interval | None
    tokens: Interval
    entropy: Interval
    wins: dict[str, Interval]
    """Win probability against the reference, per dimension."""

    def of(self, measure: str) -> Interval | None:
        """The interval of "reward", "oracle", "share", "fluency", "facts", "tokens", "entropy" or "win:DIMENSION"."""
        if measure.startswith("win:"):
            return self.wins.get(measure.removeprefix("win:"))
        found: Interval | None = getattr(self, measure)
        return found


def headroom_measure(evaluation: Evaluation) -> str | None:
    """What the share of headroom is measured by: the oracle where both ends have it, else the reward.

    None where the bottom or the ideal has no answers.
    """
    if evaluation.ideal is None:
        return None
    by_method: defaultdict[str, list[ScoredAnswer]] = defaultdict(list)
    for answer in evaluation.answers:
        by_method[answer.method].append(answer)
    ends = (by_method[evaluation.bottom], by_method[evaluation.ideal])
    if not all(ends):
        return None
    return "oracle" if all("oracle" in answer.measures for end in ends for answer in end) else "reward"


def summarise(evaluation: Evaluation, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> list[MethodSummary]:
    """Every method that answered at all, in the order of the evaluation."""

    def cells_of(measure: str) -> MeasuredCells:
        return measure_cells(evaluation, measure, num_resamples=num_resamples, seed=seed)

    dimensions = evaluation.dimensions
    plain = ("reward", "oracle", "fluency", "facts", "tokens", "entropy", *(f"win:{name}" for name in dimensions))
    by_measure = {measure: cells_of(measure) for measure in plain}
    share_by = headroom_measure(evaluation)

    def mean(measure: str, method: str) -> Interval | None:
        return by_measure[measure].mean(method) if by_measure[measure].has(method) else None

    def share(method: str) -> Interval | None:
        bottom, top = evaluation.bottom, evaluation.ideal
        if share_by is None or top is None or not by_measure[share_by].has(method, bottom, top):
            return None
        return by_measure[share_by].share(method, bottom=bottom, top=top)

    wins_of = {
        method.name: {name: rate for name in dimensions if (rate := mean(f"win:{name}", method.name)) is not None}
        for method in evaluation.methods
    }
    return [
        MethodSummary(
            info=method,
            num_answers=sum(answer.method == method.name for answer in evaluation.answers),
            reward=by_measure["reward"].mean(method.name),
            oracle=mean("oracle", method.name),
            share=share(method.name),
            fluency=mean("fluency", method.name),
            facts=mean("facts", method.name),
            tokens=by_measure["tokens"].mean(method.name),
            entropy=by_measure["entropy"].mean(method.name),
            wins=wins_of[method.name],
        )
        for method in evaluation.methods
        if by_measure["reward"].has(method.name)
    ]


def best_training_free(summaries: Sequence[MethodSummary], measure: str = "reward") -> MethodSummary | None:
    """The best black-box method that learns nothing; None where no such method has the measure.

    It is chosen by the same answers that it is then compared on, which favours it: the comparison is a strict one.
    """

    def value(summary: MethodSummary) -> float:
        found = summary.of(measure)
        return -np.inf if found is None else found.value

    rivals = [s for s in summaries if s.info.is_black_box_training_free and s.of(measure) is not None]
    return max(rivals, key=value, default=None)


@dataclass(frozen=True, slots=True)
class SeedSpread:
    """One method over several seeds: the mean of its means, and the smallest and the largest."""

    mean: float
    low: float
    high: float
    num_seeds: int


def combine_seeds(evaluations: Sequence[Evaluation], measure: str = "reward") -> dict[str, SeedSpread]:
    """Each method over the evaluations that have it: one evaluation per zoo seed or training seed."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for evaluation in evaluations:
        cells = measure_cells(evaluation, measure, num_resamples=1)
        for method in cells.methods:
            if cells.has(method):
                found[method].append(cells.mean(method).value)
    return {
        method: SeedSpread(float(np.mean(values)), min(values), max(values), len(values))
        for method, values in found.items()
    }


def _lay_out(evaluation: Evaluation, values: Mapping[tuple[int, Thing, str], float]) -> tuple[tuple[str, ...], Array]:
    """The methods' names, and the values by (prompt, cell, method) as P x N x M."""
    prompts = _index(sorted({answer.prompt for answer in evaluation.answers}))
    names = _index([method.name for method in evaluation.methods])
    columns = _index(list(dict.fromkeys(cell for _, cell, _ in values)))
    cells = np.full((len(prompts), len(columns), len(names)), np.nan)
    for (prompt, cell, method), value in values.items():
        cells[prompts[prompt], columns[cell], names[method]] = value
    return tuple(names), cells


def _index(things: Sequence[Thing]) -> dict[Thing, int]:
    return {thing: position for position, thing in enumerate(things)}


def _sample_cells(evaluation: Evaluation, measure: str) -> tuple[tuple[str, ...], Array]:
    """One measure by prompt and (preference, sample): single answers, not means."""
    found: dict[tuple[int, tuple[str, int], str], float] = {}
    for answer in evaluation.answers:
        if (value := read_measure(answer, measure)) is None:
            continue
        cell = (answer.prompt, (answer.preference, answer.sample), answer.method)
        if cell in found:
            raise ConfigError(
                f"{answer.method!r} has two answers to prompt {answer.prompt}, preference {answer.preference!r}, "
                f"sample {answer.sample}"
            )
        found[cell] = value
    return _lay_out(evaluation, found)


def _compare(ours: Array, theirs: Array) -> Array:
    """1 where ours is higher, 0.5 where they tie, 0 where lower, NaN where either is missing."""
    gap = ours - theirs
    wins = np.where(np.abs(gap) < TIE, 0.5, (gap > 0).astype(np.float64))
    return np.where(np.isnan(gap), np.nan, wins)


def _rate(wins: Array, resamples: Array) -> Interval:
    value, resampled = bootstrap_means(wins[:, :, None], resamples)
    return percentile_interval(float(value[0]), resampled[:, 0])


def _resamples_for(evaluation: Evaluation, num_resamples: int, seed: int) -> Array:
    num_prompts = len({answer.prompt for answer in evaluation.answers})
    if not num_prompts:
        raise ConfigError("an evaluation without answers has no statistics")
    return draw_resamples(num_prompts, num_resamples=num_resamples, seed=seed)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))
