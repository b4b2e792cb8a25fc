"""`make evidence`, the part on training: does it work, on three zoo seeds, and what of it is due to what?

Runs the commands of a user (`zoo build`, `train`, `eval`) two at a time, and judges what they wrote by the promises of
docs/evidence.md. Results: evidence/training.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mope_bb.evaluation.evaluator import renamed
from mope_bb.evaluation.results import Evaluation, MethodInfo, ScoredAnswer, from_json
from mope_bb.evaluation.statistics import Interval, best_training_free, measure_cells, summarise
from mope_bb.evaluation.studies import gain_kept
from mope_bb.evaluation.suite import IDEAL, STATIC, UNIFORM, WEIGHTED, mope_name
from mope_bb.zoo.build import build_zoo
from tests.evidence import FOLDER, machine_facts, tell

SEEDS: Final = (0, 1, 2)
RULES: Final = ("product", "linear")
LEFT_OUT: Final = (
    ("simple,concise,grumpy", "technical,informative,friendly"),
    ("simple,informative,grumpy", "technical,concise,friendly"),
)
"""Two triples each, without which a PCM is trained. Of the second pair all side effects act against each other."""
LINEAR_RIVALS: Final = (UNIFORM, "averaged soup", "prompting", "best single expert")
PROMPTS: Final = ("--num-prompts", "32")
MEASURES: Final = ("reward", "oracle")
MIN_SHARE: Final = 0.85
MIN_KEPT: Final = 0.8
MAX_LOSS: Final = 0.01
"""Of fluency and of facts, against the base."""
MAX_MINUTES: Final = 6.0
FULL: Final = mope_name("product")
README_METHODS: Final = (
    "base",
    UNIFORM,
    "prompting",
    "best single expert",
    "averaged soup",
    "router by divergence @matched",
    "N system prompts, product @tuned",
    STATIC,
    f"{STATIC} @matched",
    mope_name("linear"),
    FULL,
    IDEAL,
)


@dataclass(frozen=True)
class Run:
    """One training and the evaluation of what it made."""

    name: str
    rule: str
    zoo_seed: int = 0
    train: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()


def left_out_name(pair: int, seed: int) -> str:
    """Of the run without the triples of this pair."""
    return f"left-out-{pair}" if seed == 0 else f"left-out-{pair}-seed-{seed}"


MAIN: Final = tuple(Run(f"{rule}-{seed}", rule, seed) for seed in SEEDS for rule in RULES)
TRAINING_SEEDS: Final = (0, 1, 2)
"""Single trainings without two triples differ by ten points and more on them: what is promised is the mean of three."""
OTHERS: Final = (
    Run("other-training-seed", "product", train=("--seed", "1")),
    Run("third-training-seed", "product", train=("--seed", "2")),
    *(
        Run(left_out_name(i, seed), "product", train=("--seed", str(seed), *flags))
        for i, pair in enumerate(LEFT_OUT)
        for flags in [tuple(word for names in pair for word in ("--leave-out", names))]
        for seed in TRAINING_SEEDS
    ),
    Run("context-free", "product", train=("--ablation", "context-free"), evaluate=("--context-free",)),
    Run("shuffled-rewards", "product", train=("--ablation", "shuffled-rewards")),
    Run("without-features", "product", train=("--ablation", "no-features")),
)


class Workshop:
    """Runs commands in a folder, and skips what an interrupted run has finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def command(self, name: str, *words: str) -> Path:
        """`mope-bb words... --out FOLDER/name`; its output goes to a log beside it."""
        out, done = self.folder / name, self.folder / f"{name}.done"
        if not done.exists():
            shutil.rmtree(out, ignore_errors=True)
            tell(f"{name}: mope-bb {' '.join(words)}")
            started = time.monotonic()
            with (self.folder / f"{name}.log").open("w", encoding="utf-8") as log:
                subprocess.run(
                    [sys.executable, "-m", "mope_bb", *words, "--out", str(out)],
                    check=True,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            done.write_text(f"{time.monotonic() - started:.0f} s\n", encoding="utf-8")
        return out

    def train(self, run: Run) -> str:
        """The path of the trained PCM."""
        where = ("--zoo-seed", str(run.zoo_seed), "--merge", run.rule)
        return str(self.command(f"train-{run.name}", "train", *where, *run.train) / "checkpoints" / "last")

    def evaluate(self, name: str, pcms: Sequence[str], *words: str, zoo_seed: int = 0) -> Evaluation:
        """The evaluation of these PCMs."""
        flags = [word for pcm in pcms for word in ("--pcm", pcm)]
        out = self.command(f"eval-{name}", "eval", "--zoo-seed", str(zoo_seed), *PROMPTS, *flags, *words)
        return from_json((out / "evaluation.json").read_text(encoding="utf-8"))


def main() -> None:
    """Train, evaluate, judge, write; fail if a promise is broken."""
    started = time.monotonic()
    shop = Workshop(Path(".cache/evidence") / commit())
    with ThreadPoolExecutor(2) as pool:
        paths = dict(zip([run.name for run in MAIN], pool.map(shop.train, MAIN), strict=True))
        full = pool.map(lambda seed: evaluate_seed(shop, paths, seed), SEEDS)
        others = pool.map(lambda run: shop.evaluate(run.name, [shop.train(run)], "--quick", *run.evaluate), OTHERS)
        evaluations = dict(zip(SEEDS, full, strict=True))
        ablations = dict(zip([run.name for run in OTHERS], others, strict=True))
    zoos = {seed: build_zoo(seed=seed) for seed in SEEDS}
    results: dict[str, Any] = {
        "command": "make evidence",
        "machine": machine_facts(),
        "reward_models": {str(seed): dict(zoo.rewards) for seed, zoo in zoos.items()},
        "training": {run.name: training_facts(shop.folder / f"train-{run.name}") for run in (*MAIN, *OTHERS)},
        "seeds": {str(seed): seed_facts(found) for seed, found in evaluations.items()},
        "ablations": {name: ablation_facts(found, evaluations[0]) for name, found in ablations.items()},
        "left_out_triples": left_out_facts(
            [pooled([ablations[left_out_name(i, seed)] for seed in TRAINING_SEEDS]) for i in range(len(LEFT_OUT))],
            pooled([evaluations[0], ablations["other-training-seed"], ablations["third-training-seed"]]),
        ),
        "seconds": round(time.monotonic() - started, 1),
    }
    results["broken"] = broken_promises(results)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "training.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tell(f"wrote {FOLDER / 'training.json'}")
    sys.exit(f"broken: {results['broken']}" if results["broken"] else 0)


def commit() -> str:
    """Of the sources: what another version of the code has finished is not taken for this one's."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def evaluate_seed(shop: Workshop, paths: dict[str, str], seed: int) -> Evaluation:
    """The whole table of one zoo."""
    words = ("--ceilings",) if seed == SEEDS[0] else ("--no-studies",)
    return shop.evaluate(f"zoo-{seed}", [paths[f"{rule}-{seed}"] for rule in RULES], *words, zoo_seed=seed)


def numbers(interval: Interval | None) -> list[float] | None:
    """Value and the ends of the 95 % interval."""
    return None if interval is None else [round(x, 4) for x in (interval.value, interval.low, interval.high)]


def training_facts(folder: Path) -> dict[str, Any]:
    """How long a training took, and where its reward began and ended."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def mean(some: list[dict[str, float]]) -> float:
        return round(sum(row["reward"] for row in some) / len(some), 4)

    return {
        "minutes": round(rows[-1]["seconds"] / 60, 2),
        "batches": len(rows),
        "pairs": sum(row["num_pairs"] for row in rows),
        "first_reward": mean(rows[:3]),
        "last_reward": mean(rows[-5:]),
    }


def seed_facts(evaluation: Evaluation) -> dict[str, Any]:
    """The table of one zoo, and what is promised about it."""
    summaries = summarise(evaluation)
    found: dict[str, Any] = {
        "methods": {
            one.info.name: {
                "kind": one.info.kind,
                "temperature": one.info.temperature,
                **{measure: numbers(one.of(measure)) for measure in (*MEASURES, "share", "fluency", "facts", "tokens")},
            }
            for one in summaries
        },
        "seconds": evaluation.facts["seconds"],
        "studies": {study.name: {"columns": study.columns, "rows": study.rows} for study in evaluation.studies},
    }
    for measure in MEASURES:
        cells, rival = measure_cells(evaluation, measure), best_training_free(summaries, measure)
        assert rival is not None
        trained = max(
            (one for one in summaries if one.info.kind == "mope"), key=lambda one: value_of(one.of(measure))
        ).info.name
        found[f"against_best_{measure}"] = {
            "pcm": trained,
            "rival": rival.info.name,
            "difference": numbers(cells.difference(trained, rival.info.name)),
        }
        found[f"product_against_static_{measure}"] = {
            other: numbers(cells.difference(FULL, other)) for other in cells.methods if other.startswith(STATIC)
        }
        found[f"linear_against_{measure}"] = {
            other: numbers(cells.difference(mope_name("linear"), other)) for other in LINEAR_RIVALS
        }
    for measure in ("fluency", "facts"):
        cells = measure_cells(evaluation, measure)
        found[f"{measure}_against_base"] = {
            mope_name(rule): numbers(cells.difference(mope_name(rule), "base")) for rule in RULES
        }
    return found


def readme_table(results: dict[str, Any]) -> str:
    """The README's table: each zoo's share of the headroom, and reward and oracle of the first."""
    lines = ["| | reward, zoo 0 | oracle, zoo 0 | headroom closed, zoos 0, 1, 2 |", "|---|---|---|---|"]
    first = results["seeds"]["0"]["methods"]
    for name in README_METHODS:
        cells = ["±".join(f"{x:.3f}" for x in half_width(first[name][measure])) for measure in MEASURES]
        shares = [found["methods"][name]["share"][0] for found in results["seeds"].values()]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {', '.join(f'{100 * share:.0f} %' for share in shares)} |")
    return "\n".join(lines)


def half_width(triple: list[float]) -> tuple[float, float]:
    """Value and half the width of its interval."""
    return triple[0], (triple[2] - triple[1]) / 2


def value_of(interval: Interval | None) -> float:
    """The value; below all others where there is none."""
    return -1.0 if interval is None else interval.value


def joined(one: Evaluation, whole: Evaluation) -> Evaluation:
    """The product PCM of `one` as "part" beside the product PCM, the static product and the ends of `whole`."""
    kept = {FULL, STATIC, UNIFORM, IDEAL, WEIGHTED}
    answers = [answer for answer in whole.answers if answer.method in kept]
    answers += renamed([answer for answer in one.answers if answer.method == FULL], "part")
    return Evaluation(methods=[MethodInfo(name, "mope", "") for name in (*sorted(kept), "part")], answers=answers)


def ablation_facts(one: Evaluation, whole: Evaluation) -> dict[str, Any]:
    """What a PCM that was trained otherwise gains over the static product, and how much of the full PCM's gain."""
    both = joined(one, whole)
    found: dict[str, Any] = {}
    for measure in MEASURES:
        cells = measure_cells(both, measure)
        found[measure] = {
            "mean": numbers(cells.mean("part")),
            "gain": numbers(cells.difference("part", STATIC)),
            "full_gain": numbers(cells.difference(FULL, STATIC)),
            "gain_kept": numbers(gain_kept(both.answers, part=(STATIC, "part"), whole=(STATIC, FULL), measure=measure)),
            "share": numbers(cells.share("part", bottom=UNIFORM, top=IDEAL)),
        }
    return found


def left_out_facts(each: Sequence[Evaluation], whole: Evaluation) -> dict[str, Any]:
    """The same on the triples that a PCM was not trained on: for each pair of triples, and for all of them together."""
    found: dict[str, Any] = {}
    answers: list[ScoredAnswer] = []
    every: set[str] = set()
    for pair, evaluation in zip(LEFT_OUT, each, strict=True):
        triples = {",".join(sorted(names.split(","))) for names in pair}
        part = only(evaluation, triples)
        found[" and ".join(pair)] = ablation_facts(part, only(whole, triples))
        answers += part.answers
        every |= triples
    together = Evaluation(methods=each[0].methods, answers=answers)
    return {**found, "all": ablation_facts(together, only(whole, every))}


def pooled(each: Sequence[Evaluation]) -> Evaluation:
    """The answers of PCMs of several training seeds as those of one; what was not trained counts once."""
    answers = list(each[0].answers)
    answers += [answer for one in each[1:] for answer in one.answers if answer.method == FULL]
    return Evaluation(methods=each[0].methods, answers=answers)


def only(evaluation: Evaluation, preferences: Collection[str]) -> Evaluation:
    """The answers to these preferences."""
    chosen = [answer for answer in evaluation.answers if answer.preference in preferences]
    return Evaluation(methods=evaluation.methods, answers=chosen)


def broken_promises(results: dict[str, Any]) -> list[str]:
    """What docs/evidence.md promises and these results do not keep."""
    broken = []
    for seed, found in results["seeds"].items():
        for measure in MEASURES:
            if found[f"against_best_{measure}"]["difference"][1] <= 0:
                broken.append(f"zoo {seed}: better than the best training-free method by {measure}")
            for other, difference in found[f"linear_against_{measure}"].items():
                if difference[1] <= 0:
                    broken.append(f"zoo {seed}: linear better than {other} by {measure}")
        if found["methods"][FULL]["share"][0] < MIN_SHARE:
            broken.append(f"zoo {seed}: share of the headroom")
        for measure in ("fluency", "facts"):
            for method, difference in found[f"{measure}_against_base"].items():
                if difference[0] < -MAX_LOSS:
                    broken.append(f"zoo {seed}: {measure} of {method}")
    for name, row in (
        ("unseen wordings", kept_of_wordings(results["seeds"]["0"])),
        ("left-out triples", results["left_out_triples"]["all"]["oracle"]["gain_kept"][0]),
    ):
        if row < MIN_KEPT:
            broken.append(f"{name}: gain kept")
    if any(results["ablations"]["shuffled-rewards"][measure]["gain"][1] > 0 for measure in MEASURES):
        broken.append("shuffled rewards show a gain")
    broken += [f"{name} took longer" for name, run in results["training"].items() if run["minutes"] > MAX_MINUTES]
    broken += [
        f"zoo {seed}: reward model {pole}"
        for seed, rewards in results["reward_models"].items()
        for pole, accuracy in rewards.items()
        if accuracy <= 0.9
    ]
    return broken


def kept_of_wordings(found: dict[str, Any]) -> float:
    """The share of the product PCM's gain, by the oracle, that is left on unseen wordings."""
    rows: list[list[Any]] = found["studies"]["unseen wordings: gain kept"]["rows"]
    return float(next(row[2] for row in rows if row[0] == FULL and row[1] == "oracle"))


if __name__ == "__main__":
    main()
