"""Rollouts per second of `mope-bb train` over HTTP: lockstep against `[decoding] mode = "auto"`.

The tiny zoo with its reward models behind the real llama.cpp server, everything on this machine. Short runs, a pair of
them in each round, in random order; what comes before the first batch (loading, and the pace that is learned) does not
count. Sampling, scoring and learning overlap as in any run, so that the ratio is that of the whole loop.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.claims import Claim, at_least, at_most, median_interval, ratio_interval, rounded
from mope_bb.cli.train_setup import open_setup
from mope_bb.config import parse_config
from mope_bb.training.trainer import Trainer
from mope_bb.zoo.demo import build_with_bar
from mope_bb.zoo.serving import serve_zoo
from tests.evidence import machine_facts, tell

MODES: Final = ("lockstep", "auto")
NUM_ROUNDS: Final = 6
TRAIN: Final = {"batch_size": 8, "max_steps": 6, "max_tokens": 64, "max_in_flight": 16, "max_minutes": None}


@dataclass(frozen=True, slots=True)
class Run:
    """What a run did after its first batch."""

    seconds: float
    num_rollouts: int
    num_tokens: float
    num_requests: int
    num_dropped: int
    """Pairs lost to a failed rollout or score."""

    @property
    def rollouts_per_s(self) -> float:
        """Of both answers of every pair."""
        return self.num_rollouts / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Of those answers."""
        return self.num_tokens / self.seconds


def main() -> None:
    """Measure and write the JSON beside this file."""
    torch.set_num_threads(1)
    began, rng = time.monotonic(), random.Random(0)
    runs: dict[str, list[Run]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder, serve_zoo(build_with_bar()) as server:
        for number in range(NUM_ROUNDS):
            for mode in rng.sample(MODES, len(MODES)):
                out = Path(folder) / f"{mode}-{number}"
                runs[mode].append(train(server.config_data(), mode, out, seed=number))
                tell(f"{number} {mode}: {runs[mode][-1]}")
    results = {
        "command": "python -m benchmarks.rollouts",
        "machine": machine_facts(),
        "train": TRAIN,
        "num_rounds": NUM_ROUNDS,
        "modes": {mode: describe(found, runs["lockstep"]) for mode, found in runs.items()},
        "seconds": time.monotonic() - began,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def train(data: Mapping[str, Any], mode: str, out: Path, *, seed: int) -> Run:
    """One short run."""
    config = parse_config({**data, "train": {**TRAIN, "seed": seed}, "decoding": {"mode": mode}})
    with open_setup(config, "product", out, ablation=None, is_zoo=True) as setup:
        Trainer(setup).run()
    first, *rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Run(
        rows[-1]["seconds"] - first["seconds"],
        sum(2 * row["num_pairs"] for row in rows),
        sum(2 * row["num_pairs"] * row["num_tokens"] for row in rows),
        sum(row["num_requests"] for row in rows),
        sum(row["num_dropped"] for row in rows),
    )


def describe(runs: list[Run], lockstep: list[Run]) -> dict[str, Any]:
    """Of one mode, and against lockstep in the same rounds."""
    pairs = list(zip(runs, lockstep, strict=True))
    return {
        "rollouts_per_s": median_interval([one.rollouts_per_s for one in runs]),
        "tokens_per_s": median_interval([one.tokens_per_s for one in runs]),
        "requests_per_token": ratio_interval([one.num_requests for one in runs], [one.num_tokens for one in runs]),
        "num_dropped": sum(one.num_dropped for one in runs),
        "speedup": median_interval([one.rollouts_per_s / other.rollouts_per_s for one, other in pairs]),
    }


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    modes = results["modes"]
    dropped = {mode: {"value": found["num_dropped"]} for mode, found in modes.items()}
    return [
        at_least(1).claim("times lockstep's rollouts per second of training, auto", {"": modes["auto"]["speedup"]}),
        at_most(0).claim("of their pairs that were lost to an error", dropped),
    ]


if __name__ == "__main__":
    main()
