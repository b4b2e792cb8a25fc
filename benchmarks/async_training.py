"""Asynchronous against synchronous training on endpoints with heavy-tailed latency: time for equal work, final reward.

The nano zoo behind the real llama.cpp server and a proxy in a process of its own, which delays each request by a
lognormal time. The two modes differ in `max_staleness` alone (0 and 2) and take turns, seed by seed, in one run.

So that learner and rollouts are equally long, as on a machine where the PCM has a device of its own, each batch's
learning is stretched by sleeping to the time that sampling a batch took in a first short run. What is measured is
therefore the loop, not this machine's cores: the real learner, sampler, ledger and rewards run in both modes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

from benchmarks.claims import Claim, at_least
from mope_bb.config import Config, parse_config
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import load_pcm
from mope_bb.rewards.base import RewardPanel
from mope_bb.rewards.function import FunctionReward
from mope_bb.training.learner import Learner, LearnerReport
from mope_bb.training.runs import TrainingSetup
from mope_bb.training.trainer import Trainer
from mope_bb.types import Message
from mope_bb.zoo.build import build_zoo
from mope_bb.zoo.serving import serve_zoo
from tests.evidence import machine_facts, tell
from tests.proxy import in_process

NAMES: Final = ("base", "concise", "friendly")
LATENCY: Final = {"median_s": 0.08, "sigma": 0.8}
SEEDS: Final = (0, 1, 2)
STEPS: Final = 15
TRAIN: Final = {"batch_size": 8, "max_tokens": 8, "max_in_flight": 32, "max_minutes": None}
PROMPTS: Final = tuple(
    (Message("user", f"How do I fix a {thing}?"),) for thing in ("bike", "chair", "boat", "lamp", "door", "roof")
)
LAST: Final = 6
"""Batches whose mean is the final reward."""


def main() -> None:
    """Measure and write the JSON beside this file."""
    torch.set_num_threads(1)
    zoo = build_zoo(size="nano")
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_zoo(zoo) as server,
        in_process({name: server.base_urls[name] for name in NAMES}, **LATENCY) as url,
    ):
        data = server.config_data()
        data["experts"] = [{**one, "base_url": url(one["name"])} for one in data["experts"] if one["name"] in NAMES]
        data["dimensions"] = {name: data["dimensions"][name] for name in NAMES[1:]}
        data["presets"] = {}
        bench = Bench(data, str(zoo.pcm), Path(folder))
        rows = bench.train(seed=100, staleness=0, steps=6, learner_s=0.0)
        learner_s = statistics.median(row["learner_idle_s"] for row in rows)
        tell(f"sampling a batch takes {learner_s:.2f} s: so long will learning take")
        seeds = [bench.compare(seed, learner_s) for seed in SEEDS]
    ratios = [one["speedup"] for one in seeds]
    results = {
        "command": "python -m benchmarks.async_training",
        "machine": machine_facts(),
        "latency": LATENCY,
        "learner_s": round(learner_s, 3),
        "steps": STEPS,
        "train": TRAIN,
        "seeds": seeds,
        "speedup": {"median": round(statistics.median(ratios), 2), "min": min(ratios), "max": max(ratios)},
        "reward_difference": mean_interval([one["reward_difference"] for one in seeds]),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tell(f"asynchronous is {results['speedup']} times as fast; reward {results['reward_difference']}")


class Bench:
    """Trains in both modes."""

    def __init__(self, data: dict[str, Any], pcm: str, folder: Path) -> None:
        self._data = data
        self._pcm = pcm
        self._folder = folder

    def compare(self, seed: int, learner_s: float) -> dict[str, Any]:
        """Both modes with one seed."""
        found = {}
        for name, staleness in (("sync", 0), ("async", 2)):
            found[name] = facts_of(self.train(seed=seed, staleness=staleness, steps=STEPS, learner_s=learner_s))
            tell(f"seed {seed}, {name}: {found[name]}")
        return {
            "seed": seed,
            **found,
            "speedup": round(found["sync"]["seconds"] / found["async"]["seconds"], 2),
            "reward_difference": round(found["async"]["final_reward"] - found["sync"]["final_reward"], 4),
        }

    def train(self, *, seed: int, staleness: int, steps: int, learner_s: float) -> list[dict[str, Any]]:
        """The rows of one run."""
        settings = {**TRAIN, "seed": seed, "max_staleness": staleness, "max_steps": steps}
        config: Config = parse_config({**self._data, "train": settings})
        out = self._folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        step = Learner.step

        def stretched(self: Learner, *args: Any, **options: Any) -> LearnerReport:
            began = time.monotonic()
            report = step(self, *args, **options)
            time.sleep(max(0.0, learner_s - (time.monotonic() - began)))
            return report

        with ExpertBench(config, NAMES) as bench, mock.patch.object(Learner, "step", stretched):
            panel = RewardPanel(
                {"concise": FunctionReward("concise", few_spaces), "friendly": FunctionReward("friendly", many_vowels)}
            )
            Trainer(TrainingSetup(config, MergeRule("product"), load_pcm(self._pcm), bench, panel, PROMPTS, out)).run()
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def few_spaces(messages: list[dict[str, Any]], answer: str) -> float:
    """A reward that an expert's weight can change."""
    return -float(answer.count(" "))


def many_vowels(messages: list[dict[str, Any]], answer: str) -> float:
    """Another."""
    return sum(answer.lower().count(vowel) for vowel in "aeiou") / 2


def facts_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of one run, without its first batch, before which nothing could overlap."""
    seconds = rows[-1]["seconds"] - rows[0]["seconds"]
    later = rows[1:]
    return {
        "seconds": round(seconds, 2),
        "learner_idle": round(sum(row["learner_idle_s"] for row in later) / seconds, 3),
        "rollouts_idle": round(sum(row["rollouts_idle_s"] for row in later) / seconds, 3),
        "staleness_mean": round(statistics.mean(row["staleness_mean"] for row in later), 2),
        "staleness_max": max(row["staleness_max"] for row in later),
        "first_reward": round(statistics.mean(row["reward"] for row in rows[:3]), 4),
        "final_reward": round(statistics.mean(row["reward"] for row in rows[-LAST:]), 4),
    }


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    speedup = results["speedup"]
    interval = {"value": speedup["median"], "low": speedup["min"], "high": speedup["max"]}
    return [at_least(1.6).claim("times as fast, asynchronous against synchronous training", {"": interval})]


def mean_interval(values: list[float]) -> list[float]:
    """Mean and 95 % interval of a few seeds, by Student's t with two degrees of freedom."""
    mean, half = statistics.mean(values), 4.303 * statistics.stdev(values) / len(values) ** 0.5
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]


if __name__ == "__main__":
    main()
