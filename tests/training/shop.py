"""Runs in processes of their own, to be killed: a folder with a configuration of local experts, and what one reads of
its runs from outside.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mope_bb.pcm.model import load_pcm
from mope_bb.zoo.build import Zoo

TIMES = ("seconds", "learner_idle_s", "rollouts_idle_s", "requests_per_s")
REPOSITORY = str(Path(__file__).parents[2])
"""Children run the code that these tests belong to, wherever another copy is installed."""
LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--num_cpu_threads_per_process",
    "1",
]
CONFIG = """
[train]
prompts = "prompts.txt"
max_steps = 6
batch_size = 3
max_tokens = 10
max_staleness = 1
save_steps = 2
per_device_train_batch_size = 2
"""
REWARDS = """
import hashlib

def fair(messages, answer):
    return hashlib.sha256(answer.encode()).digest()[0] / 64
"""


@dataclass(frozen=True)
class Shop:
    """A folder with a configuration, in which runs are begun, killed and resumed."""

    path: Path

    def begin(self, out: str, *more: str, num_processes: int = 1) -> subprocess.Popen[bytes]:
        """Start `mope-bb train` into the folder `out`, with so many learner processes."""
        launch = [*LAUNCH, "--num_processes", str(num_processes)] if num_processes > 1 else []
        paths = os.pathsep.join([str(self.path), REPOSITORY, *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, *launch, "-m", "mope_bb", "train", "mope.toml", "--out", out, *more],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(self, out: str, *more: str, num_processes: int = 1) -> None:
        """Run it to its end."""
        child = self.begin(out, *more, num_processes=num_processes)
        _, err = child.communicate(timeout=240)
        assert child.returncode == 0, err.decode()

    def kill(self, out: str, when: Callable[[], bool]) -> None:
        """Start or resume it, and kill it as soon as `when()`."""
        child = self.begin(out, "--resume")
        deadline = time.monotonic() + 120
        while not when():
            assert child.poll() is None, ((child.stderr and child.stderr.read()) or b"").decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.communicate()

    def rows(self, out: str) -> list[dict[str, Any]]:
        """The metrics without times."""
        lines = (self.path / out / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]

    def weights(self, out: str) -> dict[str, torch.Tensor]:
        """All that was learned."""
        pcm = load_pcm(str(self.path / out / "checkpoints" / "last"))
        return {**dict(pcm.model.named_parameters()), "features": pcm.feature_weights}

    def count(self, out: str, query: str) -> int:
        """A number from the ledger of a run, which may be going on."""
        file = self.path / out / "ledger.sqlite3"
        if not file.exists():
            return 0
        database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        try:
            return int(database.execute(query).fetchone()[0])
        except sqlite3.OperationalError:
            return 0
        finally:
            database.close()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def make_shop(path: Path, zoo: Zoo) -> Shop:
    """Write the configuration of three local experts, a reward function and prompts to `path`."""
    experts = "".join(
        f'[[experts]]\nname = "{name}"\nprovider = "local"\nmodel = "{zoo.folder(name)}"\ndevice = "cpu"\n'
        + ("base = true\n" if name == "base" else f'dimension = "{name}"\n')
        for name in ("base", "concise", "friendly")
    )
    reward = 'reward = { kind = "function", function = "my_rewards_of_resume:fair" }\n'
    (path / "mope.toml").write_text(
        f"{experts}[dimensions.concise]\n{reward}[dimensions.friendly]\n{reward}"
        f'[pcm]\nbackbone = "{zoo.folder("base")}"\ndevice = "cpu"\n{CONFIG}'
    )
    (path / "prompts.txt").write_text("How do I fix a bike?\nHow do I fix a chair?\nHello\nWhat now?\n")
    (path / "my_rewards_of_resume.py").write_text(REWARDS)
    return Shop(path)
