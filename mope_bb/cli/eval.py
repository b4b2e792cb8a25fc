"""`mope-bb eval`: does it work? Every method side by side, with intervals, as a table, JSON and a report."""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mope_bb.cli.spending import usage_shown
from mope_bb.errors import ConfigError

if TYPE_CHECKING:
    from mope_bb.cli.zoo_choice import Experts
    from mope_bb.evaluation.evaluator import Evaluator
    from mope_bb.evaluation.methods import EvalTask, Method
    from mope_bb.evaluation.results import Curve, Evaluation, MethodInfo, ScoredAnswer
    from mope_bb.evaluation.suite import Suite
    from mope_bb.pcm.model import PreferenceControlModel

MAX_COMBINATIONS: Final = 12
KS: Final = (5, 20, 100_000)


@click.command(name="eval")
@click.option("-c", "--config", "config_path", type=click.Path(), help="A mope.toml. Without it: the embedded zoo.")
@click.option("--pcm", "pcm_paths", multiple=True, type=click.Path(), help="A trained PCM; one per merge rule.")
@click.option("--prompts", type=click.Path(), help="A text file with a prompt a line, or JSONL.")
@click.option("-o", "--out", type=click.Path(), help="Folder of the results; default evals/DATE-TIME.")
@click.option("--num-prompts", type=click.IntRange(min=2), default=48, show_default=True)
@click.option("--num-samples", type=click.IntRange(min=1), default=1, show_default=True, help="Answers per task.")
@click.option("--quick", is_flag=True, help="Only the strongest baselines, and no studies.")
@click.option(
    "--studies/--no-studies", default=True, show_default=True, help="List lengths, slider, weights, wordings."
)
@click.option("--context-free", is_flag=True, help="Hold each PCM's first scores for the whole answer.")
@click.option("--ceilings", is_flag=True, help="Zoo only: also tune what weights could reach at best (minutes).")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--zoo-size", default="tiny", show_default=True, help="Without --config.")
@click.option("--zoo-seed", default=0, show_default=True, help="Without --config.")
def evaluate(  # noqa: PLR0917  # one parameter per flag
    config_path: str | None,
    pcm_paths: tuple[str, ...],
    prompts: str | None,
    out: str | None,
    num_prompts: int,
    num_samples: int,
    quick: bool,
    studies: bool,
    context_free: bool,
    ceilings: bool,
    seed: int,
    zoo_size: str,
    zoo_seed: int,
) -> None:
    """Compare trained PCMs with everything one could do without training.

    Writes evaluation.json and report.html. The zoo is asked about questions that were held out of all training, and
    judged by its reward models and by an oracle that training never saw.
    """
    from mope_bb.cli.zoo_choice import choose_experts, new_folder, reading_names, use_cores

    if ceilings and (config_path is not None or prompts is not None):
        raise ConfigError(
            "--ceilings needs the zoo and its own questions, whose grammar is known",
            hint="Leave out --config and --prompts, or --ceilings.",
        )
    use_cores()
    started = time.monotonic()
    experts = choose_experts(
        config_path, size=zoo_size, seed=zoo_seed, train={} if prompts is None else {"prompts": prompts}
    )
    if context_free:
        # As they were trained: see `mope-bb train --ablation context-free`.
        experts = replace(experts, config=reading_names(experts.config))
    if prompts is not None:
        # The oracle knows the zoo's own questions only.
        experts = replace(experts, zoo=None)
    folder = new_folder(out, "evals")
    pcms = load_pcms(experts.config, pcm_paths)
    chosen = choose_prompts(experts, num_prompts, seed)
    evaluation = run_evaluation(
        experts,
        pcms,
        chosen,
        folder,
        quick=quick,
        has_studies=studies and not quick,
        is_context_free=context_free,
        has_ceilings=ceilings,
        num_samples=num_samples,
        seed=seed,
    )
    evaluation.facts.update(
        {
            **machine_facts(),
            "experts": config_path or f"zoo {zoo_size}-{zoo_seed}",
            "pcms": {rule: os.fspath(path) for rule, path in zip(pcms, pcm_paths, strict=True)},
            "seed": seed,
            "num_prompts": len(chosen),
            "num_samples": num_samples,
            "seconds": round(time.monotonic() - started, 1),
        }
    )
    evaluation.curves.extend(read_curves(pcm_paths, pcms))
    show(evaluation, folder)


def load_pcms(config: Any, paths: Sequence[str]) -> dict[str, PreferenceControlModel]:
    """Merge rule -> PCM. Raises ConfigError for an untrained one, or two of one rule."""
    from mope_bb.inference import choose_device
    from mope_bb.pcm.model import load_pcm
    from mope_bb.pcm.plans import configured_rule

    pcms: dict[str, PreferenceControlModel] = {}
    for path in paths:
        pcm = load_pcm(path, device=choose_device(config.pcm.device))
        if not pcm.is_trained or pcm.rule is None:
            raise ConfigError(f"the PCM {path!r} is not trained", hint="Train one: mope-bb train.")
        if configured_rule(config, pcm.rule).needs_base and config.roster().base is None:
            raise ConfigError(
                f"the PCM {path!r} was trained for the rule {pcm.rule!r}; it needs a base, and no expert is one",
                hint="Add `base = true` to the expert that the others were fine-tuned from.",
            )
        if pcm.rule in pcms:
            raise ConfigError(f"two PCMs were trained for the rule {pcm.rule!r}", hint="Pass one per rule.")
        pcms[pcm.rule] = pcm
    return pcms


def choose_prompts(experts: Experts, count: int, seed: int) -> tuple[Any, ...]:
    """The prompts that are asked: those of the configuration, or the zoo's held-out questions."""
    from mope_bb.training.tasks import load_prompts

    if experts.config.train.prompts is not None:
        every = list(dict.fromkeys(load_prompts(Path(experts.config.train.prompts))))
        random.Random(seed).shuffle(every)
        return tuple(every[:count])
    if experts.zoo is None:
        raise ConfigError("there are no prompts to ask", hint="Pass --prompts, or set `prompts` in [train].")
    from mope_bb.zoo.judging import spread_prompts

    return spread_prompts(count, held_out=True, seed=seed)


def wanted_combinations(experts: Experts) -> list[tuple[str, ...]]:
    """The preferences that are asked for: one dimension of each axis, up to three axes."""
    from mope_bb.training.tasks import served_dimensions

    axes = list(experts.config.train.preferences.axes) or [(name,) for name in served_dimensions(experts.config)]
    size = min(3, len(axes))
    every = [names for chosen in combinations(axes, size) for names in product(*chosen)]
    return every[:: max(1, -(-len(every) // MAX_COMBINATIONS))]


def build_tasks(prompts: Sequence[Any], wanted: Sequence[tuple[str, ...]]) -> list[EvalTask]:
    """Every prompt with every combination, alike in weight."""
    from mope_bb.evaluation.methods import EvalTask
    from mope_bb.preferences import Preference
    from mope_bb.training.tasks import WantedStyle

    tasks = []
    for number, messages in enumerate(prompts):
        for names in wanted:
            even = Preference.of(dict.fromkeys(names, 1.0))
            tasks.append(EvalTask(number, messages, WantedStyle(even, even.weights)))
    return tasks


def run_evaluation(
    experts: Experts,
    pcms: Mapping[str, PreferenceControlModel],
    prompts: Sequence[Any],
    folder: Path,
    *,
    quick: bool,
    has_studies: bool,
    is_context_free: bool,
    has_ceilings: bool,
    num_samples: int,
    seed: int,
) -> Evaluation:
    """Ask and judge everything."""
    from mope_bb.cli.zoo_eval import ceiling_method, ideal_method, oracle_of
    from mope_bb.evaluation.evaluator import Evaluator
    from mope_bb.evaluation.results import Evaluation
    from mope_bb.evaluation.studies import ceiling_study
    from mope_bb.evaluation.suite import IDEAL, Suite, run_all
    from mope_bb.pcm.bench import ExpertBench
    from mope_bb.rewards.base import References
    from mope_bb.rewards.registry import open_reward_panel
    from mope_bb.training.tasks import reference_expert, served_dimensions
    from mope_bb.types import SamplingOptions
    from mope_bb.usage import Account

    config = experts.config
    wanted = wanted_combinations(experts)
    tasks = build_tasks(prompts, wanted)
    account = Account.of(config)
    panel = open_reward_panel(config, served_dimensions(config), account)
    try:
        with (
            ExpertBench(config, {expert.name for expert in config.experts}, account) as bench,
            usage_shown(account, lambda: bench.cache_hits),
        ):
            evaluator = Evaluator(
                bench,
                panel,
                References(folder / "references.jsonl"),
                reference_expert(config),
                SamplingOptions(max_tokens=config.train.max_tokens),
                seed=seed,
                measure=None if experts.zoo is None else oracle_of(experts.zoo),
            )
            suite = Suite(config, bench, pcms, is_context_free=is_context_free)
            tell("sampling the reference responses")
            validation = validation_tasks(experts, tasks, wanted, seed)
            evaluator.prepare([*tasks, *validation])
            extra: list[Method] = []
            if experts.zoo is not None:
                extra.append(ideal_method(experts.zoo))
            if experts.zoo is not None and has_ceilings:
                extra += [
                    ceiling_method(rule, experts.zoo, suite, evaluator, validation, tell=tell)
                    for rule in ("linear", "product")
                ]
            if quick:
                methods, answers = run_quick(suite, evaluator, tasks, validation, extra, num_samples=num_samples)
            else:
                methods, answers = run_all(
                    suite, evaluator, tasks, validation, extra=extra, num_samples=num_samples, tell=tell
                )
            evaluation = Evaluation(
                methods=methods,
                answers=answers,
                ideal=IDEAL if extra else None,
                questions=[messages[-1].content for messages in prompts],
            )
            # What follows is extra: if it fails, the answers are there.
            save(evaluation, folder)
            if has_ceilings:
                evaluation.studies.append(ceiling_study(evaluation))
            add_pictures(evaluation, suite, evaluator, tasks)
            if has_studies:
                add_studies(evaluation, experts, suite, evaluator, tasks)
            if evaluator.failures:
                evaluation.facts["failures"] = dict(evaluator.failures)
            return evaluation
    finally:
        panel.close()


def run_quick(
    suite: Suite,
    evaluator: Evaluator,
    tasks: Sequence[EvalTask],
    validation: Sequence[EvalTask],
    extra: Sequence[Method],
    *,
    num_samples: int,
) -> tuple[list[MethodInfo], list[ScoredAnswer]]:
    """The base, the strongest baselines and the PCMs; the static product also as sharp as the best PCM."""
    from mope_bb.evaluation.suite import STATIC, ask_all, matched_methods

    names = ("base", "prompting", "uniform mixture", "router by entropy", STATIC)
    methods: list[Method] = [one for one in suite.black_box() if one.info.name in names]
    trained: list[Method] = [suite.mope(rule) for rule in suite.pcms]
    static = [one for one in methods if one.info.name == STATIC]
    methods += [*trained, *matched_methods(evaluator, static, trained, validation, tell=tell), *extra]
    return ask_all(methods, evaluator, tasks, num_samples=num_samples, tell=tell)


def validation_tasks(
    experts: Experts, tasks: Sequence[EvalTask], wanted: Sequence[tuple[str, ...]], seed: int
) -> list[EvalTask]:
    """Where temperatures and scales are tuned: the zoo's training questions; elsewhere the first prompts themselves."""
    if experts.zoo is None:
        return list(tasks[: 12 * len(wanted)])
    from mope_bb.zoo.judging import spread_prompts

    return build_tasks(spread_prompts(12, held_out=False, seed=seed + 1), wanted)


def add_pictures(evaluation: Evaluation, suite: Suite, evaluator: Evaluator, tasks: Sequence[EvalTask]) -> None:
    """How the trained weights go over the answers, and one answer coloured by expert."""
    from mope_bb.evaluation.studies import coloured_answer, weights_over_answer

    by_label: dict[str, list[EvalTask]] = {}
    for task in tasks:
        by_label.setdefault(task.style.label, []).append(task)
    for rule in suite.pcms:
        method = suite.mope(rule)
        for number, (label, some) in enumerate(by_label.items()):
            given = [one for _, one in evaluator.run_with_answers(method, some[:24])]
            if not given:
                continue
            evaluation.weights.append(weights_over_answer(method.info.name, label, given))
            if number == 0 and given[0].rollout is not None:
                question = some[0].messages[-1].content
                evaluation.coloured.append(coloured_answer(question, label, method.info.name, given[0].rollout))


def add_studies(
    evaluation: Evaluation, experts: Experts, suite: Suite, evaluator: Evaluator, tasks: Sequence[EvalTask]
) -> None:
    """List lengths, a slider, random weights, and (in the zoo) wordings known and unknown."""
    from mope_bb.cli.zoo_eval import in_words
    from mope_bb.evaluation.studies import comparison_study, gain_study, slider_study, truncation_study
    from mope_bb.evaluation.suite import GEOMETRIC, WEIGHTED

    trained = [suite.mope(rule) for rule in suite.pcms]
    some = tasks[: 16 * len({task.style.label for task in tasks})]
    axes = experts.config.train.preferences.axes
    if experts.config.roster().base is None:
        return
    if suite.bench.models:
        tell("study: list lengths")
        evaluation.studies.append(truncation_study(suite, evaluator, some, KS))
    if opposite := next((axis for axis in axes if len(axis) == 2 and "concise" in axis), None):
        tell("study: a slider")
        first = "concise"
        second = next(name for name in opposite if name != first)
        one_each = list({task.prompt: task for task in tasks}.values())
        evaluation.studies.append(slider_study(suite, evaluator, one_each, first, second))
    tell("study: random weights")
    weighted = with_random_weights(some)
    untrained: list[Method] = [
        suite.uniform(),
        suite.method(WEIGHTED, "training-free", "", "linear"),
        *([suite.method(GEOMETRIC, "training-free", "", "geometric")] if "geometric" in suite.pcms else []),
        suite.static_product(),
    ]
    study, _ = comparison_study(
        [*untrained, *trained],
        {"random weights": weighted},
        evaluator,
        name="weights",
        title="Preferences with unequal weights",
        explanation="Three dimensions with random weights; reward and oracle are weighted in the same way.",
    )
    evaluation.studies.append(study)
    if experts.zoo is not None and trained:
        tell("study: wordings")
        known, unseen = "known wordings", "unseen wordings"
        groups = {known: in_words(tasks, held_out=False), unseen: in_words(tasks, held_out=True)}
        study, answers = comparison_study(
            [*untrained[1:], *trained],
            groups,
            evaluator,
            name="wordings",
            title="Preferences in words",
            explanation="Sentences of the training, and sentences that neither experts nor PCM ever saw.",
        )
        evaluation.studies.extend([study, gain_study(answers, list(suite.pcms), part=unseen, whole=known)])


def with_random_weights(tasks: Sequence[EvalTask]) -> list[EvalTask]:
    """The same tasks with random weights."""
    from mope_bb.preferences import Preference
    from mope_bb.training.tasks import WantedStyle

    rng = random.Random("weights")
    found = []
    for task in tasks:
        weights = Preference.of({name: round(rng.uniform(0.1, 1.0), 2) for name in sorted(task.style.weights)})
        found.append(replace(task, style=WantedStyle(weights, weights.weights)))
    return found


def read_curves(paths: Sequence[str], rules: Mapping[str, Any]) -> list[Curve]:
    """The learning curves of the runs that the PCMs came from, where their metrics.jsonl is still there."""
    from mope_bb.evaluation.results import Curve
    from mope_bb.evaluation.suite import mope_name

    curves = []
    for path, rule in zip(paths, rules, strict=True):
        file = Path(path).resolve().parents[1] / "metrics.jsonl"
        if file.is_file():
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            rows = [{name: value for name, value in line.items() if value is not None} for line in lines]
            curves.append(Curve(mope_name(rule), rows))
    return curves


def machine_facts() -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(evaluation: Evaluation, folder: Path) -> None:
    """Table on standard output; JSON and report into the folder."""
    from rich.console import Console

    from mope_bb.evaluation.report import write_report
    from mope_bb.evaluation.suite import UNTRAINED, mope_name
    from mope_bb.evaluation.table import render_evaluation

    save(evaluation, folder)
    names = {method.name for method in evaluation.methods}
    pairs = {
        before: mope_name(rule) for rule, before in UNTRAINED.items() if mope_name(rule) in names and before in names
    }
    Console().print(render_evaluation(evaluation, pairs))
    write_report(evaluation, folder / "report.html")
    click.echo(f"Report: {folder / 'report.html'}")


def save(evaluation: Evaluation, folder: Path) -> None:
    """Write evaluation.json."""
    from mope_bb.evaluation.results import to_json

    (folder / "evaluation.json").write_text(to_json(evaluation), encoding="utf-8")


def tell(text: str) -> None:
    """Progress, on standard error."""
    print(f"eval: {text}", file=sys.stderr, flush=True)
