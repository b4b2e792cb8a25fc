"""`make evidence`, the part on asynchronous training: over HTTP, at several ages of the policy, killed and harassed.

Results: evidence/async.json. Each part is kept when it is done, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from mope_bb.cli.train_setup import open_setup
from mope_bb.config import Config, parse_config
from mope_bb.evaluation.evaluator import renamed
from mope_bb.evaluation.results import Evaluation, MethodInfo
from mope_bb.evaluation.statistics import measure_cells
from mope_bb.evaluation.suite import STATIC, UNIFORM
from mope_bb.training.trainer import Trainer
from mope_bb.zoo.build import build_zoo
from mope_bb.zoo.local import local_config
from mope_bb.zoo.serving import serve_zoo
from tests.evidence import FOLDER, machine_facts, tell
from tests.evidence_training import FULL, MEASURES, Workshop, commit, numbers
from tests.proxy import Proxy, heavy_tail, running
from tests.training.shop import Shop, equal, make_shop
from tests.training.test_endpoints import NAMES, PROMPTS, Runs, count_ended

STALENESS: Final = (0, 2, 8)
SCALED: Final = {"max_steps": 24, "batch_size": 16, "max_in_flight": 32, "max_minutes": None, "max_staleness": 2}
"""A run over HTTP that fits this machine: 384 pairs instead of 3,840."""
NUM_KILLS: Final = 30
FAULT_RATE: Final = 0.1
SLOW_SHARE: Final = 0.05


def main() -> None:
    """Measure, write, and fail if a promise is broken."""
    started = time.monotonic()
    shop = Workshop(Path(".cache/evidence") / f"async-{commit()}")
    chosen = sys.argv[1:] or list(PARTS)
    results: dict[str, Any] = {"command": "make evidence", "machine": machine_facts()}
    for name, part in PARTS.items():
        file = shop.folder / f"{name}.json"
        if name in chosen and not file.exists():
            tell(name)
            began = time.monotonic()
            found = {**part(shop), "seconds": round(time.monotonic() - began, 1)}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if file.exists():
            results[name] = json.loads(file.read_text(encoding="utf-8"))
    results["seconds"] = round(time.monotonic() - started, 1)
    results["broken"] = broken_promises(results)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "async.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tell(f"wrote {FOLDER / 'async.json'}")
    sys.exit(f"broken: {results['broken']}" if results["broken"] else 0)


def broken_promises(results: dict[str, Any]) -> list[str]:
    """What docs/evidence.md promises and these results do not keep."""
    if missing := [name for name in PARTS if name not in results]:
        return [f"{name}: not measured" for name in missing]
    kept = {
        "kills: weights or rows differ": all(one["equal"] for one in results["kills"]["runs"]),
        "kills: fewer than promised": results["kills"]["num_kills"] >= NUM_KILLS,
        "kills over HTTP: fewer than promised": results["kills_over_http"]["num_kills"] >= NUM_KILLS,
        "kills over HTTP: paid again": again_paid(results["kills_over_http"]) <= 0,
        "over HTTP: less gain than in this process": all(
            results["over_http"]["difference"][measure][2] >= 0 for measure in MEASURES
        ),
        "faults: the run did not complete": results["faults"]["num_steps"] == results["faults"]["max_steps"],
        "slow prompts: the bound": results["slow_prompts"]["staleness_max"] <= SCALED["max_staleness"],
    }
    return [name for name, is_kept in kept.items() if not is_kept]


def again_paid(kills: dict[str, int]) -> int:
    """Questions that were answered beyond those of whole answers, of references and of what the kills interrupted."""
    under_way = kills["num_kills"] * kills["most_under_way_at_a_kill"]
    allowed = kills["questions_needed"] + kills["questions_of_references_at_most"] + under_way
    return kills["questions_answered"] - allowed


# ---------------------------------------------------------------------- kills


def kill_runs(_: Workshop) -> dict[str, Any]:
    """Deterministic runs on the nano zoo, killed at random, inside checkpoints and twice in a row, then finished."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        shop = make_shop(Path(folder), build_zoo(size="nano"))
        file = shop.path / "mope.toml"
        text = file.read_text().replace("save_steps = 2", "save_steps = 1").replace("max_steps = 6", "max_steps = 10")
        file.write_text(text)
        shop.finish("whole")
        whole = shop.weights("whole")
        runs: list[dict[str, Any]] = []
        num_kills = 0
        while num_kills < NUM_KILLS:
            out = f"run-{len(runs)}"
            kills = []
            for kind in ("random", "checkpoint", "random", "at once", "random", "checkpoint"):
                if not kill_once(shop, out, kind, rng):
                    break
                kills.append(kind)
            shop.finish(out, "--resume")
            num_kills += len(kills)
            runs.append(
                {
                    "kills": kills,
                    "equal": equal(shop.weights(out), whole) and str(shop.rows(out)) == str(shop.rows("whole")),
                    "num_trained_once": shop.count(out, "SELECT COUNT(*) FROM pairs WHERE step IS NOT NULL"),
                    "num_sampled_again": shop.count(out, "SELECT COUNT(*) FROM pairs WHERE num_dispatches > 1"),
                }
            )
            tell(f"kills: {num_kills} of {NUM_KILLS}: {runs[-1]}")
        return {"num_kills": num_kills, "runs": runs}


def kill_over_http(_: Workshop) -> dict[str, Any]:
    """The same over HTTP, where it costs calls: a run on llama.cpp behind a proxy that counts what is answered."""
    rng = random.Random(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_zoo(build_zoo(size="nano")) as server,
        running(Proxy({name: server.base_urls[name] for name in NAMES})) as proxy,
    ):
        runs = Runs(server, proxy, Path(folder))
        config = runs.config(max_steps=30, save_steps=2)
        command = runs.prepare_child(config)
        ledger, num_kills = runs.path / "run" / "ledger.sqlite3", 0
        while num_kills < NUM_KILLS:
            child = runs.begin_child(command)
            before = count_ended(ledger)
            while child.poll() is None and count_ended(ledger) <= before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.1))
            if child.poll() is not None:
                break
            child.send_signal(signal.SIGKILL)
            child.communicate()
            num_kills += 1
            tell(f"kills over HTTP: {num_kills} of {NUM_KILLS}, {count_ended(ledger)} pairs")
        child = runs.begin_child(command)
        child.communicate(timeout=300)
        asked, needed, options = sum(proxy.questions.values()), runs.needed(config), config.train
        with sqlite3.connect(ledger) as database:
            num_pairs, num_trained = database.execute("SELECT COUNT(*), COUNT(step) FROM pairs").fetchone()
            (again,) = database.execute("SELECT SUM(num_dispatches - 1) FROM pairs").fetchone()
    return {
        "num_kills": num_kills,
        "num_pairs": num_pairs,
        "num_trained": num_trained,
        "questions_needed": needed,
        "questions_answered": asked,
        "most_under_way_at_a_kill": options.max_in_flight * options.max_tokens * len(NAMES),
        "questions_of_references_at_most": len(PROMPTS) * options.max_tokens,
        "pairs_begun_again": again,
    }


def kill_once(shop: Shop, out: str, kind: str, rng: random.Random) -> bool:
    """Resume `out` and kill it; False if it ended before."""
    child = shop.begin(out, "--resume")
    checkpoints = shop.path / out / "checkpoints"
    before = shop.count(out, "SELECT COUNT(*) FROM pairs")
    if kind == "at once":
        time.sleep(rng.uniform(0.0, 3.0))
    else:
        # Wait until it works; what comes before is Python being loaded.
        while child.poll() is None and shop.count(out, "SELECT COUNT(*) FROM pairs") <= before:
            time.sleep(0.002)
        if kind == "random":
            time.sleep(rng.uniform(0.0, 0.5))
        while kind == "checkpoint" and child.poll() is None and not list(checkpoints.glob(".step-*.tmp")):
            time.sleep(0.0005)
    is_killed = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return is_killed


# ------------------------------------------------------------------ staleness


def compare_staleness(shop: Workshop) -> dict[str, Any]:
    """Half the default run at staleness 0, 2 and 8: gain over the static product, difference to 0."""

    def one(staleness: int) -> Evaluation:
        name = f"staleness-{staleness}"
        words = ("--zoo-seed", "0", "--max-steps", "30", "--max-minutes", "30", "--max-staleness", str(staleness))
        path = shop.command(f"train-{name}", "train", *words) / "checkpoints" / "last"
        return shop.evaluate(name, [str(path)], "--quick")

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(STALENESS, pool.map(one, STALENESS), strict=True))
    facts: dict[str, Any] = {}
    for staleness, evaluation in found.items():
        both = side_by_side(evaluation, found[0])
        rows = metrics_of(shop.folder / f"train-staleness-{staleness}")
        facts[str(staleness)] = {
            "staleness_max": max(row["staleness_max"] for row in rows),
            "approx_kl_last": rows[-1]["approx_kl"],
            "effective_samples_last": rows[-1]["effective_samples"],
            "minutes": round(rows[-1]["seconds"] / 60, 2),
            **{
                measure: {
                    "mean": numbers(measure_cells(both, measure).mean("one")),
                    "gain": numbers(measure_cells(both, measure).difference("one", STATIC)),
                    "against_0": numbers(measure_cells(both, measure).difference("one", "other")),
                }
                for measure in MEASURES
            },
        }
    return facts


def side_by_side(one: Evaluation, other: Evaluation) -> Evaluation:
    """The product PCMs of two evaluations as "one" and "other", with what was not trained."""
    answers = [answer for answer in other.answers if answer.method in {STATIC, UNIFORM}]
    for name, evaluation in (("one", one), ("other", other)):
        answers += renamed([answer for answer in evaluation.answers if answer.method == FULL], name)
    names = (STATIC, UNIFORM, "one", "other")
    return Evaluation(methods=[MethodInfo(name, "mope", "") for name in names], answers=answers)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------- HTTP


def train_over_http(shop: Workshop) -> dict[str, Any]:
    """A scaled-down run on llama.cpp and the same in this process: gains, time, calls."""
    zoo = build_zoo()
    facts: dict[str, Any] = {"settings": SCALED}
    with serve_zoo(zoo) as server:
        config = with_training(server.config_data(), {})
        facts["llamacpp"] = run_facts(train(config, shop.folder / "train-http"), config)
    local = local_config(zoo, train={**SCALED})
    facts["in_this_process"] = run_facts(train(local, shop.folder / "train-in-process"), local)
    found = {
        name: shop.evaluate(name, [str(shop.folder / f"train-{name}" / "checkpoints" / "last")], "--quick")
        for name in ("http", "in-process")
    }
    both = side_by_side(found["http"], found["in-process"])
    cells = {measure: measure_cells(both, measure) for measure in MEASURES}
    facts["gain"] = {
        name: {measure: numbers(cell.difference(column, STATIC)) for measure, cell in cells.items()}
        for name, column in (("llamacpp", "one"), ("in_this_process", "other"))
    }
    facts["difference"] = {measure: numbers(cell.difference("one", "other")) for measure, cell in cells.items()}
    return facts


def with_training(data: dict[str, Any], expert: dict[str, Any], **train: Any) -> Config:
    """The served zoo with the training settings of the local one."""
    local = local_config(build_zoo(), train={**SCALED, **train})
    experts = [{**one, **expert} for one in data["experts"]]
    settings = local.train.model_dump(exclude_unset=True)
    return parse_config({**data, "experts": experts, "decoding": {"mode": "lockstep"}, "train": settings})


def train(config: Config, folder: Path) -> Path:
    """Train for the product in this process and return the run's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    with open_setup(config, "product", folder, ablation=None, is_zoo=True) as setup:
        Trainer(setup).run(lambda metrics, share: tell(f"{folder.name}: batch {metrics.step}"))
    return folder


def run_facts(folder: Path, config: Config) -> dict[str, Any]:
    """Time and calls of a run."""
    rows = metrics_of(folder)
    tokens = sum(2 * row["num_pairs"] * row["num_tokens"] for row in rows)
    return {
        "minutes": round(rows[-1]["seconds"] / 60, 2),
        "batches": len(rows),
        "requests": sum(row["num_requests"] for row in rows),
        "questions": sum(row["num_questions"] for row in rows),
        "questions_per_trained_token": round(sum(row["num_questions"] for row in rows) / tokens, 2),
        "cache": "off" if not config.cache.enabled else "on",
        "staleness_max": max(row["staleness_max"] for row in rows),
        "num_dropped": sum(row["num_dropped"] for row in rows),
        "learner_idle_share": round(sum(row["learner_idle_s"] for row in rows) / rows[-1]["seconds"], 3),
        "rollouts_idle_share": round(sum(row["rollouts_idle_s"] for row in rows) / rows[-1]["seconds"], 3),
    }


def train_with_faults(shop: Workshop) -> dict[str, Any]:
    """A tenth of the next-token requests fails: status 500, reset, garbage, silence."""
    steps = 4
    with serve_zoo(build_zoo()) as server, running(Proxy(server.base_urls, fault_rate=FAULT_RATE)) as proxy:
        data = server.config_data()
        data["experts"] = [{**one, "base_url": proxy.url(one["name"])} for one in data["experts"]]
        config = with_training(data, {"attempt_timeout_s": 2.0, "max_retries": 8}, max_steps=steps)
        folder = train(config, shop.folder / "train-faults")
        return {
            "rate": FAULT_RATE,
            "num_faults": dict(proxy.num_faults),
            "num_requests_at_the_server": proxy.num_requests,
            "max_steps": steps,
            "num_steps": len(metrics_of(folder)),
            **run_facts(folder, config),
        }


def train_with_slow_prompts(shop: Workshop) -> dict[str, Any]:
    """5 % of the prompts are 20 times slower: the bound, the price of waiting, and whether slow prompts are trained."""
    steps = 6
    delay = heavy_tail(0.02, 0.5, slow_share=SLOW_SHARE)
    with serve_zoo(build_zoo()) as server, running(Proxy(server.base_urls, delay=delay)) as proxy:
        data = server.config_data()
        data["experts"] = [{**one, "base_url": proxy.url(one["name"])} for one in data["experts"]]
        # Lists would make the quick prompts wait for the slow ones.
        config = with_training(data, {"max_prompts": 1}, max_steps=steps, max_tokens=24)
        folder = train(config, shop.folder / "train-slow")
    with sqlite3.connect(folder / "ledger.sqlite3") as database:
        lengths = [
            (step, tokens)
            for step, tokens in database.execute(
                "SELECT pairs.step, AVG(rollouts.num_tokens) FROM pairs JOIN rollouts ON rollouts.pair = pairs.id"
                " GROUP BY pairs.id"
            )
        ]
        seconds = [
            row[0]
            for row in database.execute(
                "SELECT ended_at - dispatched_at FROM pairs WHERE step IS NOT NULL ORDER BY ended_at - dispatched_at"
            )
        ]
    trained = sorted(tokens for step, tokens in lengths if step is not None)
    dispatched = sorted(tokens for _, tokens in lengths)
    return {
        "slow_share": SLOW_SHARE,
        "seconds_per_pair": {"median": round(seconds[len(seconds) // 2], 2), "max": round(seconds[-1], 2)},
        "largest_gap_of_length_distributions": round(distance(trained, dispatched), 3),
        "num_trained": len(trained),
        "num_dispatched": len(dispatched),
        **run_facts(folder, config),
    }


def distance(one: list[float], other: list[float]) -> float:
    """Kolmogorov-Smirnov: the largest difference of two cumulated distributions."""

    def share(values: list[float], limit: float) -> float:
        return sum(value <= limit for value in values) / len(values)

    return max(abs(share(one, limit) - share(other, limit)) for limit in {*one, *other})


PARTS: Final[dict[str, Callable[[Workshop], dict[str, Any]]]] = {
    "kills": kill_runs,
    "kills_over_http": kill_over_http,
    "staleness": compare_staleness,
    "over_http": train_over_http,
    "faults": train_with_faults,
    "slow_prompts": train_with_slow_prompts,
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    main()
