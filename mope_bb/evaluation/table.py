"""The evaluation in the terminal: one row per method, verdicts, studies. Returns renderables, prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mope_bb.errors import ConfigError
from mope_bb.evaluation.results import KINDS, Evaluation, Study
from mope_bb.evaluation.statistics import (
    MeasuredCells,
    MethodSummary,
    headroom_measure,
    measure_cells,
    summarise,
)
from mope_bb.evaluation.verdicts import JUDGES, bracketed, percent, plain, plus_minus, study_cells, verdicts

OUTCOME_STYLES: Mapping[str, str] = {"better": "green", "worse": "red", "even": "yellow"}


@dataclass(frozen=True)
class Column:
    """One column of the main table."""

    heading: str
    cell: Callable[[MethodSummary], str]
    priority: int
    """On a narrow terminal the columns with the highest number go first, all of one number together; 0 stays."""


@dataclass(frozen=True)
class MethodTable:
    """The main table; it leaves out columns until it fits the terminal that it is printed on."""

    summaries: Sequence[MethodSummary]
    columns: Sequence[Column]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(self.columns)
        while (widest := max(column.priority for column in columns)) > 0:
            table = _build_table(self.summaries, columns)
            if Measurement.get(console, options.update(width=10_000), table).maximum <= options.max_width:
                break
            columns = [column for column in columns if column.priority < widest]
        yield _build_table(self.summaries, columns)


def method_table(evaluation: Evaluation, summaries: Sequence[MethodSummary] | None = None) -> MethodTable:
    """One row per method, grouped by kind, the best first within each; measures that no method has are left out."""
    summaries = summarise(evaluation) if summaries is None else summaries
    ordered = sorted(summaries, key=lambda s: (KINDS.index(s.info.kind), -s.reward.value))
    columns = [
        Column("method", lambda s: s.info.name, 0),
        Column("reward", lambda s: plus_minus(s.reward), 0),
        Column("oracle", lambda s: plus_minus(s.oracle), 1),
        Column("headroom", lambda s: percent(s.share), 2),
        *(Column(name, _win_of(name), 6) for name in evaluation.dimensions),
        Column("fluency", lambda s: plain(s.fluency), 4),
        Column("facts", lambda s: plain(s.facts), 5),
        Column("tokens", lambda s: plain(s.tokens, 1), 3),
    ]
    shown = [column for column in columns if any(column.cell(summary) != "–" for summary in ordered)]
    return MethodTable(ordered, shown or columns[:2])


def verdict_lines(evaluation: Evaluation, summaries: Sequence[MethodSummary]) -> list[Text]:
    """For each trained method whether it beats the best training-free one, by the reward models and by the oracle."""
    found = [verdict for measure in JUDGES for verdict in verdicts(evaluation, summaries, measure)]
    return [Text(verdict.sentence, style=OUTCOME_STYLES[verdict.outcome]) for verdict in found]


def study_table(study: Study) -> Group:
    """A study's title, table and explanation."""
    table = Table(box=None, pad_edge=False)
    for heading, values in zip(study.columns, zip(*study.rows, strict=True), strict=False):
        numbers = all(not isinstance(value, str) for value in values)
        table.add_column(Text(heading), justify="right" if numbers else "left")
    for row in study_cells(study):
        table.add_row(*map(Text, row))
    return Group(Text(study.title, style="bold"), table, Text(study.explanation, style="dim"))


def before_and_after(evaluation: Evaluation, pairs: Mapping[str, str]) -> Table:
    """What training changed: for each untrained method and the trained one that it became, before, after, difference.

    Raises `ConfigError` for a method that is not there, or two that share no prompt.
    """
    table = Table(box=None, pad_edge=False, title="Before and after training", title_justify="left")
    for heading in ("before", "after", "by", "before: mean", "after: mean", "difference"):
        figure = heading.endswith(("mean", "difference"))
        table.add_column(heading, justify="right" if figure else "left", no_wrap=figure, overflow="fold")
    for measure in JUDGES:
        cells = measure_cells(evaluation, measure)
        for before, after in pairs.items():
            if measure == "reward" or cells.has(before, after):
                table.add_row(*map(Text, _change_row(cells, before, after)))
    return table


def render_evaluation(evaluation: Evaluation, pairs: Mapping[str, str] | None = None) -> Group:
    """Everything that `mope-bb eval` prints: main table, verdicts, before and after (`pairs`), studies."""
    summaries = summarise(evaluation)
    parts: list[RenderableType] = [method_table(evaluation, summaries), Text(_legend(evaluation), style="dim")]
    parts += verdict_lines(evaluation, summaries)
    if pairs:
        parts += ["", before_and_after(evaluation, pairs)]
    for study in evaluation.studies:
        parts += ["", study_table(study)]
    return Group(*parts)


def _win_of(dimension: str) -> Callable[[MethodSummary], str]:
    return lambda summary: plain(summary.wins.get(dimension))


def _build_table(summaries: Sequence[MethodSummary], columns: Sequence[Column]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in columns:
        left = column.heading == "method"
        # Long names fold; figures never do.
        table.add_column(Text(column.heading), justify="left" if left else "right", no_wrap=not left, overflow="fold")
    kind: str | None = None
    for summary in summaries:
        if summary.info.kind != kind:
            kind = summary.info.kind
            table.add_row(Text(kind, style="bold dim"))
        table.add_row(*(Text(column.cell(summary)) for column in columns))
    return table


def _change_row(cells: MeasuredCells, before: str, after: str) -> list[str]:
    for name in (before, after):
        if name not in cells.methods:
            raise ConfigError(f"no method {name!r}; there are {', '.join(map(repr, cells.methods))}")
    change = cells.difference(after, before)
    means = (plus_minus(cells.mean(name)) for name in (before, after))
    return [before, after, cells.measure, *means, bracketed(change, sign=True)]


def _legend(evaluation: Evaluation) -> str:
    share = headroom_measure(evaluation)
    ends = f"; headroom: from {evaluation.bottom} to {evaluation.ideal}, by the {JUDGES[share]}" if share else ""
    return f"± and [ ]: 95 % bootstrap by prompt{ends}; dimensions: win probability against the reference"
