"""Questions on the side, each a small table: list lengths, sliders, groups of tasks; and how answers came about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch

from mope_bb.evaluation.evaluator import Evaluator, renamed
from mope_bb.evaluation.methods import EvalTask, Given, Method, SampledMethod, merge_request
from mope_bb.evaluation.results import (
    ColouredAnswer,
    ColouredToken,
    Evaluation,
    MethodInfo,
    ScoredAnswer,
    Study,
    WeightsOverAnswer,
)
from mope_bb.evaluation.statistics import Interval, measure_cells
from mope_bb.evaluation.suite import UNTRAINED, WEIGHTED, Suite, ceiling_name, mope_name
from mope_bb.pcm.heads import NoHead, PcmRows
from mope_bb.pcm.local_sampler import LocalSampler
from mope_bb.pcm.mixture import carriers, fill_missing
from mope_bb.pcm.plans import configured_rule
from mope_bb.pcm.rollouts import Rollout
from mope_bb.preferences import Preference
from mope_bb.text import TextAssembler
from mope_bb.training.tasks import WantedStyle
from mope_bb.types import END

TENTHS: Final = 10
SLIDER: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Weights of the first of two opposite dimensions."""


def interval_of(answers: Sequence[ScoredAnswer], infos: Sequence[Method], method: str, measure: str) -> Interval:
    """Mean of `measure` over the answers of `method`, with its 95 % interval by prompt."""
    evaluation = Evaluation(methods=[one.info for one in infos], answers=list(answers))
    return measure_cells(evaluation, measure).mean(method)


def comparison_study(
    methods: Sequence[Method],
    groups: Mapping[str, Sequence[EvalTask]],
    evaluator: Evaluator,
    *,
    name: str,
    title: str,
    explanation: str,
) -> tuple[Study, list[ScoredAnswer]]:
    """Several methods on several groups of tasks: mean reward (and oracle) with half-widths; and the answers.

    In the answers a method is called as `grouped` says.
    """
    measures = ("reward", "oracle") if evaluator.measure else ("reward",)
    columns = ["group", "method", *(column for measure in measures for column in (measure, f"± {measure}")), "tokens"]
    rows: list[list[str | float | None]] = []
    every: list[ScoredAnswer] = []
    for group, tasks in groups.items():
        evaluator.prepare(tasks)
        for method in methods:
            answers = evaluator.run(method, tasks)
            every += renamed(answers, grouped(group, method.info.name))
            found = [interval_of(answers, methods, method.info.name, measure) for measure in (*measures, "tokens")]
            cells = [cell for one in found[:-1] for cell in _cells(one.value, one.half_width)]
            rows.append([group, method.info.name, *cells, found[-1].value])
    return Study(name, title, explanation, columns, rows), every


def grouped(group: str, method: str) -> str:
    """What a method is called among answers of several groups."""
    return f"{method} ({group})"


def gain_study(answers: Sequence[ScoredAnswer], rules: Sequence[str], *, part: str, whole: str) -> Study:
    """Of the gain that training brought on the group `whole`, the share that is there on the group `part`.

    `answers` are those of `comparison_study`. The gain is that over the same rule without training.
    """
    rows: list[list[str | float | None]] = []
    for rule in rules:
        pairs = [(grouped(group, UNTRAINED[rule]), grouped(group, mope_name(rule))) for group in (part, whole)]
        for measure in ("reward", "oracle") if answers[0].measures else ("reward",):
            kept = gain_kept(answers, part=pairs[0], whole=pairs[1], measure=measure)
            rows.append([mope_name(rule), measure, *_ends(kept)])
    return Study(
        f"{part}: gain kept",
        f"How much of the gain on {whole} is there on {part}",
        "Gain of the trained PCM over the same rule without training; 95 % interval by prompt.",
        ["method", "by", "kept", "low", "high"],
        rows,
    )


def truncation_study(suite: Suite, evaluator: Evaluator, tasks: Sequence[EvalTask], ks: Sequence[int]) -> Study:
    """What shorter and longer lists cost: the static product and every trained PCM at each k. Local experts only."""
    columns = ["k", "method", "reward", "±", "fluency", "mass off the lists"]
    rows: list[list[str | float | None]] = []
    for k in ks:
        models = {name: replace(model, top_k=k) for name, model in suite.bench.models.items()}
        methods = [
            SampledMethod(
                suite.static_product().info,
                LocalSampler(models, NoHead()),
                merge_request(suite.config, configured_rule(suite.config, "product"), reads_text=True),
            ),
            *(
                SampledMethod(
                    suite.mope(rule).info,
                    LocalSampler(models, PcmRows(pcm, is_context_free=suite.is_context_free)),
                    merge_request(suite.config, configured_rule(suite.config, rule), reads_text=True),
                )
                for rule, pcm in suite.pcms.items()
            ),
        ]
        for method in methods:
            pairs = evaluator.run_with_answers(method, tasks)
            answers = [scored for scored, _ in pairs]
            rewards = interval_of(answers, methods, method.info.name, "reward")
            tails = torch.cat([given.rollout.lists.tails.flatten() for _, given in pairs if given.rollout is not None])
            fluency = interval_of(answers, methods, method.info.name, "fluency").value if evaluator.measure else None
            reward = _cells(rewards.value, rewards.half_width)
            rows.append([str(k), method.info.name, *reward, fluency, float(tails.mean())])
    return Study(
        "truncation",
        "How much the endpoints show",
        "The same PCMs (trained at the configured k) and the static product with lists of other lengths.",
        columns,
        rows,
    )


def slider_study(suite: Suite, evaluator: Evaluator, prompts: Sequence[EvalTask], first: str, second: str) -> Study:
    """From `second` to `first` by weight: does the answer follow? Lengths, and the reward model's score of `first`."""
    methods: list[Method] = [suite.uniform(), suite.static_product(), *(suite.mope(rule) for rule in suite.pcms)]
    methods[0] = suite.method(WEIGHTED, "training-free", "", "linear")
    rows: list[list[str | float | None]] = []
    for weight in SLIDER:
        style = WantedStyle(Preference.of({first: weight, second: 1 - weight}), {first: 1.0})
        tasks = [replace(task, style=style) for task in prompts]
        row: list[str | float | None] = [f"{weight:g}"]
        for method in methods:
            answers = evaluator.run(method, tasks)
            # A pairwise judge gives no scores: an empty cell then.
            scores = [one.scores[first] for one in answers if first in one.scores]
            row += [
                sum(one.num_tokens for one in answers) / len(answers),
                sum(scores) / len(scores) if scores else None,
            ]
        rows.append(row)
    names = [method.info.name for method in methods]
    columns = [f"weight of {first}", *(f"{name}: {what}" for name in names for what in ("tokens", "score"))]
    return Study(
        "slider",
        f"A slider from {second} to {first}",
        f"Mean length of the answers, and the score of the reward model of {first}, as its weight grows.",
        columns,
        rows,
        plot={"kind": "line", "x": columns[0], "y": [f"{name}: tokens" for name in names], "error": None},
    )


def weights_over_answer(method: str, preference: str, answers: Sequence[Given]) -> WeightsOverAnswer:
    """Mean weight of each expert in each tenth of the answers, which share one preference; each step sums to 1."""
    rollouts = [given.rollout for given in answers if given.rollout is not None]
    names = rollouts[0].request.plan.experts
    tenths = []
    for rollout in rollouts:
        weights = rollout.weights / rollout.weights.sum(dim=-1, keepdim=True)
        # Every token ten times, so that an answer of any length, however short, can be cut into ten equal parts.
        tenths.append(weights.repeat_interleave(TENTHS, dim=0).view(TENTHS, len(rollout), -1).mean(dim=1))
    means = torch.stack(tenths).mean(dim=0)
    return WeightsOverAnswer(method, preference, {name: means[:, i].tolist() for i, name in enumerate(names)})


def coloured_answer(question: str, preference: str, method: str, rollout: Rollout) -> ColouredAnswer:
    """An answer with each expert's share in each token."""
    plan = rollout.request.plan
    shares = carriers(plan.rule, fill_missing(plan.rule, rollout.lists.logprobs, rollout.lists.floors), rollout.weights)
    assembler = TextAssembler()
    tokens: list[ColouredToken] = []
    for step, piece in enumerate(rollout.pieces):
        if piece == END:
            break
        carried = shares[step, :, int(rollout.index[step])].tolist()
        tokens.append(
            ColouredToken(
                text=assembler.feed(piece),
                shares=dict(zip(plan.experts, carried, strict=True)),
                weights=dict(zip(plan.experts, rollout.weights[step].tolist(), strict=True)),
            )
        )
    if tokens:
        # Of a character that the end of the answer cut.
        tokens[-1]["text"] += assembler.flush()
    return ColouredAnswer(question, preference, method, tokens)


def ceiling_study(evaluation: Evaluation) -> Study:
    """How much of what its own weights could gain over the uniform mixture each rule has gained, by the oracle."""
    cells = measure_cells(evaluation, "oracle")
    rows: list[list[str | float | None]] = []
    for rule in UNTRAINED:
        top = ceiling_name(rule)
        for method in (UNTRAINED[rule], mope_name(rule)):
            if cells.has(method, top, evaluation.bottom):
                share = cells.share(method, bottom=evaluation.bottom, top=top)
                rows.append([method, cells.mean(method).value, cells.mean(top).value, *_ends(share)])
    return Study(
        "ceilings",
        "What weights could reach",
        "Share of the way from the uniform mixture to the rule's own ceiling: weights chosen by an oracle that knows "
        "the grammar, tuned by the oracle's score. 95 % interval by prompt.",
        ["method", "oracle", "ceiling", "share", "low", "high"],
        rows,
    )


def gain_kept(
    answers: Sequence[ScoredAnswer], *, part: tuple[str, str], whole: tuple[str, str], measure: str
) -> Interval | None:
    """Share of a gain that is left: (after - before) of `part` over that of `whole`, each (before, after).

    The four names are methods of `answers`. None where the whole is no gain, or one of them has no answers.
    """
    names = dict.fromkeys((*part, *whole))
    chosen = [answer for answer in answers if answer.method in names]
    if {answer.method for answer in chosen} != set(names):
        return None
    evaluation = Evaluation(methods=[MethodInfo(name, "mope", "") for name in names], answers=chosen)
    return measure_cells(evaluation, measure).gain_ratio(part, whole)


def _cells(*values: float) -> list[float | None]:
    """An end of an interval that nobody can know is an empty cell: JSON has no NaN."""
    return [None if math.isnan(value) else value for value in values]


def _ends(interval: Interval | None) -> list[float | None]:
    return [None] * 3 if interval is None else _cells(interval.value, interval.low, interval.high)
