"""The evaluation as one HTML file that needs no other file and no network. Equal evaluations give equal files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mope_bb.errors import ConfigError
from mope_bb.evaluation import page, plots
from mope_bb.evaluation.results import KINDS, ColouredAnswer, Evaluation, ScoredAnswer, Study
from mope_bb.evaluation.statistics import MethodSummary, headroom_measure, summarise, win_rate_matrix
from mope_bb.evaluation.verdicts import JUDGES, bracketed, percent, plain, plus_minus, study_cells, verdicts

TITLE = "mope-bb: methods compared"
WIN, LOSS = "#4a7bd0", "#c98a1b"
"""Colours of a rate above and below one half: they differ for the colour-blind as well."""


def write_report(evaluation: Evaluation, path: str | Path) -> None:
    """Write the report; raises `ConfigError` without matplotlib, without answers, or where `path` cannot be written."""
    text, path = build_report(evaluation), Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report {path}: {error.strerror}") from error


def build_report(evaluation: Evaluation) -> str:
    """The report's HTML; sections that the evaluation has nothing for are left out."""
    summaries = summarise(evaluation)
    ranked = sorted(summaries, key=lambda s: -s.reward.value)
    sections = [
        _verdict_section(evaluation, summaries),
        _method_section(evaluation, ranked),
        _win_rate_section(evaluation, ranked),
        _dimension_section(evaluation, ranked),
        _curve_section(evaluation),
        _weight_section(evaluation),
        _coloured_section(evaluation),
        *(_study_section(study) for study in evaluation.studies),
        _example_section(evaluation, ranked),
        _fact_section(evaluation),
    ]
    return page.document(TITLE, page.heading(TITLE, 1) + "".join(sections))


def expert_colours(evaluation: Evaluation) -> dict[str, str]:
    """One colour per expert, the same in every plot and answer of the report."""
    names = [name for answer in evaluation.coloured for token in answer.tokens for name in token["shares"]]
    names += [name for weights in evaluation.weights for name in weights.experts]
    return {name: plots.PALETTE[i % len(plots.PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def _verdict_section(evaluation: Evaluation, summaries: Sequence[MethodSummary]) -> str:
    found = [verdict for measure in JUDGES for verdict in verdicts(evaluation, summaries, measure)]
    lines = [f'<p class="verdict {verdict.outcome}">{page.words(verdict.sentence)}</p>\n' for verdict in found]
    if not lines:
        reason = (
            "no trained method was evaluated"
            if all(summary.info.kind != "mope" for summary in summaries)
            else "no training-free black-box method was evaluated on the same prompts"
        )
        lines = [f'<p class="verdict even">No verdict: {reason}.</p>\n']
    prompts = len({answer.prompt for answer in evaluation.answers})
    preferences = len({answer.preference for answer in evaluation.answers})
    about = (
        f"{len(evaluation.answers):,} answers of {len(summaries)} methods to {prompts} prompts under {preferences} "
        "preferences. A learned result counts only where it beats the best method that learns nothing and sees only "
        "logprobs. That rival was chosen on these same answers, which favours it. Intervals are 95 % bootstraps by "
        "prompt; a difference whose interval includes 0 counts as none."
    )
    return "".join(lines) + page.paragraph(about, "soft")


def _method_section(evaluation: Evaluation, ranked: Sequence[MethodSummary]) -> str:
    measures = {"reward": "reward (mean win probability)"}
    if any(summary.oracle is not None for summary in ranked):
        measures["oracle"] = "oracle"
    share = headroom_measure(evaluation)
    explained = (
        f"Headroom is the share of the way from {evaluation.bottom} to {evaluation.ideal}, by the {JUDGES[share]}."
        if share
        else f"No share of the headroom: answers of both {evaluation.bottom!r} and an ideal are needed."
    )
    return (
        page.heading("All methods")
        + plots.draw_methods(ranked, measures)
        + page.paragraph(
            "Reward is the weighted mean, over the requested dimensions, of the probability to win against the "
            f"reference response, by the reward models. {explained}"
        )
        + _method_table(ranked)
    )


def _method_table(ranked: Sequence[MethodSummary]) -> str:
    rows: list[page.Row] = []
    for kind in KINDS:
        members = [summary for summary in ranked if summary.info.kind == kind]
        rows += [kind, *map(_method_row, members)] if members else []
    headings = (
        "method",
        "reward",
        "oracle",
        "headroom",
        "fluency",
        "facts",
        "tokens",
        "entropy",
        "temperature",
        "answers",
    )
    return page.table(headings, rows)


def _method_row(summary: MethodSummary) -> list[str | page.Cell]:
    return [
        page.Cell(summary.info.name, title=summary.info.description),
        plus_minus(summary.reward),
        plus_minus(summary.oracle),
        percent(summary.share),
        plain(summary.fluency),
        plain(summary.facts),
        plain(summary.tokens, 1),
        plain(summary.entropy),
        f"{summary.info.temperature:g}",
        f"{summary.num_answers:,}",
    ]


def _rate_cell(text: str, rate: float, title: str) -> page.Cell:
    return page.Cell(text, page.tint(WIN if rate > 0.5 else LOSS, 2 * abs(rate - 0.5)), title)


def _win_rate_section(evaluation: Evaluation, ranked: Sequence[MethodSummary]) -> str:
    rates, names = win_rate_matrix(evaluation), [summary.info.name for summary in ranked]
    if not rates:
        return ""
    rows: list[page.Row] = []
    for method in names:
        row: list[str | page.Cell] = [method]
        for other in names:
            rate = rates.get((method, other))
            title = f"{method} over {other}: {bracketed(rate)}" if rate else ""
            row.append(_rate_cell(f"{100 * rate.value:.0f}", rate.value, title) if rate else "")
        against = [rates[method, other].value for other in names if (method, other) in rates]
        rows.append([*row, f"{100 * sum(against) / len(against):.0f}" if against else "–"])
    return (
        page.heading("Win rates, method against method")
        + page.paragraph(
            "How often, in per cent, the answer of the row's method has a higher reward than that of the column's "
            "method to the same prompt, preference and sample; a tie counts one half. Point at a cell for its interval."
        )
        + page.table(["", *names, "average"], rows, "upright")
    )


def _dimension_section(evaluation: Evaluation, ranked: Sequence[MethodSummary]) -> str:
    rows: list[page.Row] = []
    for summary in ranked:
        row: list[str | page.Cell] = [summary.info.name]
        for dimension in evaluation.dimensions:
            win = summary.wins.get(dimension)
            row.append(_rate_cell(plain(win), win.value, bracketed(win)) if win else "–")
        rows.append(row)
    return (
        page.heading("Each dimension by itself")
        + page.paragraph(
            "Probability to win against the reference response, by the reward model of one dimension, over the answers "
            "for which it was requested. One half is as good as the reference. Point at a cell for its interval."
        )
        + page.table(["method", *evaluation.dimensions], rows)
    )


def _curve_section(evaluation: Evaluation) -> str:
    curves = [curve for curve in evaluation.curves if curve.rows]
    if not curves:
        return ""
    rows: list[page.Row] = []
    for curve in curves:
        first, last = curve.rows[0], curve.rows[-1]
        shared = [name for name in first if name in last and name != "step"]
        rows.append(f"{curve.name}: {len(curve.rows)} rows")
        rows += [[name, f"{first[name]:.4g}", f"{last[name]:.4g}"] for name in shared]
    return (
        page.heading("Learning curves")
        + page.paragraph("The mean reward of the answers that were sampled in training. Thick: the running mean.")
        + plots.draw_curves(curves)
        + "<details><summary>What else was logged, first and last</summary>"
        + page.table(("measure", "first", "last"), rows)
        + "</details>\n"
    )


def _weight_section(evaluation: Evaluation) -> str:
    if not evaluation.weights:
        return ""
    parts = [page.heading("Who is asked when")]
    parts.append(page.paragraph("The mean weight of each expert from the beginning of an answer to its end."))
    for method in dict.fromkeys(weights.method for weights in evaluation.weights):
        group = [weights for weights in evaluation.weights if weights.method == method]
        parts += [page.heading(method, 3), plots.draw_weights(group, expert_colours(evaluation))]
    return "".join(parts)


def _coloured_section(evaluation: Evaluation) -> str:
    if not evaluation.coloured:
        return ""
    colours = expert_colours(evaluation)
    asked = {name for answer in evaluation.coloured for token in answer.tokens for name in token["shares"]}
    key = "".join(page.span(name, page.tint(colour, 1)) for name, colour in colours.items() if name in asked)
    return (
        page.heading("Answers, coloured by expert")
        + page.paragraph(
            "Each token has the colour of the expert that carried it most, the stronger the larger its share. Point at "
            "a token for all shares and weights."
        )
        + f'<p class="key">{key}</p>\n'
        + "".join(_coloured_answer(answer, colours) for answer in evaluation.coloured)
    )


def _coloured_answer(answer: ColouredAnswer, colours: dict[str, str]) -> str:
    spans = []
    for token in answer.tokens:
        shares, weights = token["shares"], token["weights"]
        strongest = max(shares, key=lambda name: shares[name], default=None)
        lines = [f"{name}: share {shares[name]:.2f}, weight {weights.get(name, 0.0):.2f}" for name in shares]
        colour = "transparent" if strongest is None else page.tint(colours[strongest], shares[strongest])
        spans.append(page.span(token["text"], colour, "\n".join(lines)))
    about = page.paragraph(f"{answer.method}, asked for {answer.preference}: {answer.question}", "soft")
    return f'<div class="card">{about}<p class="answer">{"".join(spans)}</p></div>\n'


def _study_section(study: Study) -> str:
    return (
        page.heading(study.title)
        + page.paragraph(study.explanation)
        + (plots.draw_study(study) or "")
        + page.table(study.columns, study_cells(study))
    )


def _example_section(evaluation: Evaluation, ranked: Sequence[MethodSummary]) -> str:
    """Every method's answer to the first prompt, first and last preference: chosen by place, not by merit."""
    first = min(answer.prompt for answer in evaluation.answers)
    labels = list(dict.fromkeys(answer.preference for answer in evaluation.answers if answer.prompt == first))
    known = 0 <= first < len(evaluation.questions)
    question = evaluation.questions[first] if known else f"prompt {first}"
    parts = [page.heading("The same question, every method")]
    parts.append(page.paragraph(f"{question} (the first prompt; chosen by its place, not by what came out)"))
    for label in dict.fromkeys((labels[0], labels[-1])):
        chosen: dict[str, ScoredAnswer] = {}
        for answer in evaluation.answers:
            if answer.prompt == first and answer.preference == label:
                chosen.setdefault(answer.method, answer)
        cards = [_example(chosen[s.info.name]) for s in ranked if s.info.name in chosen]
        parts.append(page.heading(label, 3) + f'<div class="cards">\n{"".join(cards)}</div>\n')
    return "".join(parts)


def _example(answer: ScoredAnswer) -> str:
    oracle = f", oracle {answer.measures['oracle']:.2f}" if "oracle" in answer.measures else ""
    figures = f"reward {answer.reward:.2f}{oracle}, {answer.num_tokens} tokens"
    return (
        f'<div class="card"><strong>{page.words(answer.method)}</strong> <small>{figures}</small>'
        f'<p class="answer">{page.words(answer.text)}</p></div>\n'
    )


def _fact_section(evaluation: Evaluation) -> str:
    rows: list[page.Row] = [[name, _fact(value)] for name, value in evaluation.facts.items()]
    methods: list[page.Row] = [[m.name, m.kind, f"{m.temperature:g}", m.description] for m in evaluation.methods]
    return (
        page.heading("How it was made")
        + (page.table(("fact", "value"), rows, "words") if rows else "")
        + page.heading("The methods", 3)
        + page.table(("method", "kind", "temperature", "what it does"), methods, "words")
    )


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(inner)}" for name, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
