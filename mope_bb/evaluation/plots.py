"""The report's plots as inline SVG, readable on light and on dark pages. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Final

from mope_bb.errors import ConfigError
from mope_bb.evaluation.results import KINDS, Curve, Study, WeightsOverAnswer
from mope_bb.evaluation.statistics import Interval, MethodSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE: Final = ("#1597a5", "#c2529b", "#4f9d3a", "#c98a1b", "#4a7bd0", "#d0563f", "#8a6fd1", "#7f8c8d")
"""Middle tones that stand out from white and from nearly black alike."""
KIND_COLOURS: Final = dict(zip(KINDS, ("#7f8c8d", "#4a7bd0", "#8a6fd1", "#c98a1b", "#d0563f", "#4f9d3a"), strict=True))
INK: Final = "#123456"
"""Stands for the colour of the page's text until the SVG is written."""
SETTINGS: Final[dict[Any, Any]] = {
    # Text stays text: smaller, searchable, and set in a font that the reader has.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
}


def draw_methods(summaries: Sequence[MethodSummary], measures: Mapping[str, str]) -> str:
    """Dots with intervals, one row per method, best on top; one panel per measure, with its label."""
    ordered = sorted(summaries, key=lambda s: _value(s.of(next(iter(measures)))))
    with _figure((9.5, 0.9 + 0.3 * len(ordered))) as figure:
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, (measure, label) in zip(panels, measures.items(), strict=True):
            for row, summary in enumerate(ordered):
                if (interval := summary.of(measure)) is not None:
                    _dot(axes, row, interval, KIND_COLOURS[summary.info.kind])
            axes.set_xlabel(label)
            axes.set_yticks(range(len(ordered)), [summary.info.name for summary in ordered])
            axes.set_ylim(-0.6, len(ordered) - 0.4)
        kinds = [kind for kind in KINDS if any(summary.info.kind == kind for summary in ordered)]
        dots = [panels[0].plot([], [], "o", color=KIND_COLOURS[kind], label=kind)[0] for kind in kinds]
        figure.legend(handles=dots, loc="outside upper center", ncols=len(kinds))
    return _to_svg(figure, "Methods in order, with 95 % intervals")


def draw_curves(curves: Sequence[Curve]) -> str:
    """The reward of each training along its steps, pale, and its running mean."""
    with _figure((8, 3.4)) as figure:
        axes = figure.subplots()
        for position, curve in enumerate(curves):
            colour = PALETTE[position % len(PALETTE)]
            points = [(row["step"], row["reward"]) for row in curve.rows if "step" in row and "reward" in row]
            steps, rewards = [step for step, _ in points], [reward for _, reward in points]
            axes.plot(steps, rewards, color=colour, alpha=0.3, linewidth=1)
            axes.plot(steps, _running_mean(rewards), color=colour, linewidth=2, label=curve.name)
        axes.set_xlabel("training step")
        axes.set_ylabel("mean reward of the rollouts")
        axes.legend()
    return _to_svg(figure, "Learning curves")


def draw_weights(weights: Sequence[WeightsOverAnswer], colours: Mapping[str, str]) -> str:
    """Mean weights along one method's answers: one panel per preference, one line per expert."""
    num_columns = min(4, len(weights))
    num_rows = -(-len(weights) // num_columns)
    with _figure((max(4.5, 2.5 * num_columns), 0.6 + 1.9 * num_rows)) as figure:
        panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        drawn: dict[str, Any] = {}
        for axes in panels.flat[len(weights) :]:
            axes.set_visible(False)
        for axes, one in zip(panels.flat, weights, strict=False):
            for expert, values in one.experts.items():
                middles = [100 * (tenth + 0.5) / len(values) for tenth in range(len(values))]
                drawn[expert] = axes.plot(middles, values, color=colours[expert], linewidth=2)[0]
            axes.set_title(one.preference.replace(",", ", "), fontsize=8)
        figure.supxlabel("part of the answer (%)", fontsize=9)
        figure.supylabel("mean weight", fontsize=9)
        figure.legend(handles=[*drawn.values()], labels=[*drawn], loc="outside upper center", ncols=4)
    return _to_svg(figure, f"Mean weight of each expert over the answer, {weights[0].method}")


def draw_study(study: Study) -> str | None:
    """The plot that a study asks for; None where it asks for none or has no rows."""
    if study.plot is None or not study.rows:
        return None
    column = {name: [row[place] for row in study.rows] for place, name in enumerate(study.columns)}
    x, drawn, errors = column[study.plot["x"]], study.plot["y"], study.plot["error"]
    line = study.plot["kind"] == "line"
    numeric = line and all(isinstance(value, int | float) for value in x)
    places = _numbers(x) if numeric else [float(place) for place in range(len(x))]
    with _figure((7, 3.4)) as figure:
        axes = figure.subplots()
        for position, name in enumerate(drawn):
            spread = None if errors is None else _numbers(column[errors[position]])
            colour, heights = PALETTE[position % len(PALETTE)], _numbers(column[name])
            if line:
                axes.errorbar(places, heights, yerr=spread, color=colour, marker="o", capsize=3, label=name)
            else:
                width = 0.8 / len(drawn)
                shifted = [place + (position - (len(drawn) - 1) / 2) * width for place in places]
                axes.bar(shifted, heights, width, yerr=spread, color=colour, ecolor=INK, capsize=3, label=name)
        if not numeric:
            _name_places(axes, [str(value) for value in x])
        axes.set_xlabel(study.plot["x"])
        if len(drawn) > 1:
            axes.legend()
        else:
            axes.set_ylabel(drawn[0])
    return _to_svg(figure, study.title)


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    """Names along the x axis, slanted where they would run into each other."""
    if sum(map(len, names)) > 70:
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    else:
        axes.set_xticks(range(len(names)), names)


def _dot(axes: Axes, row: int, interval: Interval, colour: str) -> None:
    # Percentile intervals may, in tiny samples, leave out the value itself; matplotlib refuses a negative length.
    ends = [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]
    axes.errorbar([interval.value], [row], xerr=ends, fmt="o", color=colour, capsize=3)


def _value(interval: Interval | None) -> float:
    return float("-inf") if interval is None else interval.value


def _numbers(values: Sequence[str | float | None]) -> list[float]:
    """Numbers for drawing: NaN, a gap, for whatever is none."""
    return [float("nan") if value is None or isinstance(value, str) else float(value) for value in values]


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, over a tenth of the whole."""
    window = max(1, len(values) // 10)
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


@contextmanager
def _figure(inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on in the report's style; raises `ConfigError` where matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the report draws with matplotlib", hint="pip install 'mope-bb[report]'") from error
    with matplotlib.rc_context(SETTINGS):
        yield Figure(figsize=inches, layout="constrained")


def _to_svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element: no prologue, no metadata, no ids that nothing refers to."""
    import matplotlib

    stream = io.StringIO()
    # The salt makes the ids inside the SVG depend on nothing but the drawing and its label.
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": label}), warnings.catch_warnings():
        # The reader's font draws what matplotlib's own has no glyph for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip()
