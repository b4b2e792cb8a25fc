"""Chat and training for a bounded time on a bad day: what stays behind. `python -m tests.chaos.soak [--seconds N]`.

One session answers, some of whose answers are left early or cancelled, and one run trains, both for half of the time.
Memory is what was allocated and not freed, as the C library counts it: Python allocates through it here, and from one
arena, so that nothing else hides in it. What the operating system gives to the process (RSS) moves by more than that.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from mope_bb.config import Config, parse_config
from mope_bb.errors import MopeError
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import load_pcm
from mope_bb.rewards.base import RewardPanel
from mope_bb.rewards.function import FunctionReward
from mope_bb.session import Session, open_session
from mope_bb.training.metrics import StepMetrics
from mope_bb.training.runs import TrainingSetup
from mope_bb.training.trainer import Trainer
from mope_bb.types import Message
from mope_bb.usage import Account
from mope_bb.zoo.build import Zoo, build_zoo
from tests.chaos.faults import FAULTS, HOSTILE
from tests.chaos.server import BASE_PATHS, Plan, in_process, make_plan
from tests.endpoints.stand_ins import MODEL
from tests.evidence import tell

SECONDS: Final = 480.0
FAULT_RATE: Final = 0.1
EXCLUDED: Final = {"429 huge", "429 seconds", "429 date", *HOSTILE}
"""What mostly costs waiting is measured elsewhere; here calls count."""
SILENT: Final = {"black hole", "silent body"}
DIALECTS: Final = {"concise": "llamacpp", "friendly": "vllm", "technical": "sglang"}
PREFERENCES: Final = ("concise,friendly", "technical", "concise,friendly,technical")
NUM_ANSWERS: Final = 400
AT_ONCE: Final = 32
NUM_QUESTIONS: Final = 40
"""Greedy answers to few questions: what the server has computed once it serves at once."""
NUM_BATCHES: Final = 4
"""At least, of answers and of training."""
MOST_MIB: Final = 1.0
"""For each 100,000 calls."""


class MallInfo(ctypes.Structure):
    """What the C library's `mallinfo2` returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


@dataclass(frozen=True, slots=True)
class Held:
    """What the process holds at one moment."""

    num_calls: int
    """Since the session, or the run, began."""
    mib: float
    """Allocated and not freed."""
    rss_mib: float
    num_descriptors: int
    num_threads: int


def score(messages: list[dict[str, Any]], answer: str) -> float:
    """Any reward that tells answers apart."""
    return random.Random(answer).gauss(0.0, 1.0)


def soak(zoo: Zoo, url: str, *, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Half of `seconds` one session answers, then one run trains; each of them once before, briefly, to warm up."""
    faults = tuple(name for name in FAULTS if name not in EXCLUDED)
    # In training a reply that is refused costs a pair, and a batch without pairs ends the run.
    passing = tuple(name for name in faults if FAULTS[name].outcomes == {"retried"} and name not in SILENT)
    ends: Counter[str] = Counter()
    parts: dict[str, Any] = {}
    began = time.monotonic()
    for life, length_s in (("warm-up", 0.0), ("soak", seconds / 2)):
        config = config_of(zoo, url, life=f"{seed}-{life}", seconds=length_s)
        make_plan(url, Plan(seed=seed, rate=FAULT_RATE, faults=faults))
        tasks, chat = asyncio.run(soak_chat(config, length_s, ends))
        closed = measure_held(chat[-1].num_calls)
        make_plan(url, Plan(seed=seed, rate=FAULT_RATE, faults=passing))
        train = soak_training(config, ends)
        after = measure_held(train[-1].num_calls)
        parts[life] = {"chat": describe(chat, closed), "training": describe(train, after), "tasks_left": tasks}
        parts[life]["held_when_closed"] = asdict(after)
        tell(f"{life}: {parts[life]}")
    before, after_all = (parts[life]["held_when_closed"] for life in ("warm-up", "soak"))
    return {
        "seed": seed,
        "fault_rate": FAULT_RATE,
        "seconds": round(time.monotonic() - began, 1),
        "ends": dict(ends.most_common()),
        **parts["soak"],
        "descriptors_left": after_all["num_descriptors"] - before["num_descriptors"],
        "threads_left": after_all["num_threads"] - before["num_threads"],
    }


def describe(held: list[Held], closed: Held) -> dict[str, Any]:
    """How what was held has grown with the calls."""
    steady = held[len(held) // 2 :]  # buffers and the page cache of the ledger are full by then
    return {
        "num_calls": held[-1].num_calls,
        "num_measured": len(steady),
        "mib_per_100_000_calls": round(slope(steady, "mib")[0], 3),
        "standard_error": round(slope(steady, "mib")[1], 3),
        "rss_mib_per_100_000_calls": round(slope(steady, "rss_mib")[0], 3),
        "mib": [held[0].mib, held[-1].mib, closed.mib],
    }


def config_of(zoo: Zoo, url: str, *, life: str, seconds: float) -> Config:
    """Three experts in three dialects behind the chaos server, and the zoo's PCM, trained for so long."""
    folder = str(zoo.folder("concise"))
    experts = [
        {
            "name": name,
            "dimension": name,
            "provider": dialect,
            "base_url": f"{url}/{dialect}/{life}-{name}{BASE_PATHS.get(dialect, '/v1')}",
            "model": MODEL,
            "tokenizer": folder,
            "timeout_s": 10.0,
            "attempt_timeout_s": 1.5,
        }
        for name, dialect in DIALECTS.items()
    ]
    train = {
        **({"max_steps": 100_000, "max_minutes": seconds / 60} if seconds else {"max_steps": NUM_BATCHES}),
        "batch_size": 16,
        "max_tokens": 8,
        "max_in_flight": 32,
        "reference": "concise",
        "preferences": {"sentences": 0},
    }
    dimensions = {name: {"text": f"Be {name}."} for name in DIALECTS}
    return parse_config(
        {
            "experts": experts,
            "dimensions": dimensions,
            "pcm": {"path": str(zoo.pcm)},
            "decoding": {"on_expert_failure": "drop"},
            "cache": {"enabled": False},
            "train": train,
        }
    )


async def soak_chat(config: Config, seconds: float, ends: Counter[str]) -> tuple[int, list[Held]]:
    """Tasks that are left when the session is closed, and what was held after each batch of answers."""
    rng, room, began = random.Random(0), asyncio.Semaphore(AT_ONCE), time.monotonic()
    held: list[Held] = []

    async def one(session: Session, place: int) -> None:
        async with room:
            fate = rng.choice(("whole", "whole", "whole", "left", "cancelled"))
            question = f"How do I fix bike {place % NUM_QUESTIONS}?"
            options: dict[str, Any] = {"preference": rng.choice(PREFERENCES), "max_tokens": 12, "temperature": 0.0}
            try:
                if fate == "cancelled":
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.05 * rng.random()):
                            await session.complete(question, **options)
                else:
                    stream = session.stream(question, **options)
                    async for _ in stream:
                        if fate == "left":
                            break
                    await stream.aclose()
            except MopeError as error:
                fate = type(error).__name__
            ends[fate] += 1

    async with open_session(config) as session:
        while len(held) < NUM_BATCHES or time.monotonic() - began < seconds:
            await asyncio.gather(*(one(session, place) for place in range(NUM_ANSWERS)))
            held.append(measure_held(session.account.total.num_calls))
    await asyncio.sleep(0.3)  # connections that were reset say goodbye
    return len(asyncio.all_tasks()) - 1, held


def soak_training(config: Config, ends: Counter[str]) -> list[Held]:
    """A run in a folder that is thrown away; what was held after each of its steps."""
    account, names = Account.of(config), tuple(DIALECTS)
    prompts = tuple((Message("user", f"How do I paint a {thing}?"),) for thing in ("bike", "door"))
    held: list[Held] = []

    def watch(metrics: StepMetrics, share: float) -> None:
        held.append(measure_held(account.total.num_calls))

    with tempfile.TemporaryDirectory() as folder, ExpertBench(config, names, account) as bench:
        panel = RewardPanel({name: FunctionReward(name, score) for name in names})
        pcm = load_pcm(str(config.pcm.path))
        setup = TrainingSetup(
            config, MergeRule("linear"), pcm, bench, panel, prompts, Path(folder) / "run", account=account
        )
        Trainer(setup).run(watch)
        ends["trained steps"] += len(held)
        panel.close()
    return held


def measure_held(num_calls: int) -> Held:
    """After garbage was collected and free memory given back."""
    gc.collect()
    library = ctypes.CDLL("libc.so.6")
    library.malloc_trim(0)
    library.mallinfo2.restype = MallInfo
    found = library.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        num_calls,
        round((found.uordblks + found.hblkhd) / 2**20, 3),
        round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2),
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208  # as names
        threading.active_count(),
    )


def slope(held: list[Held], name: str) -> tuple[float, float]:
    """MiB for each 100,000 calls, by least squares, and its standard error."""
    if len(held) < 3:
        return 0.0, math.inf  # two points lie on any line: they tell nothing
    calls = np.array([one.num_calls for one in held], dtype=np.float64) / 100_000
    values = np.array([getattr(one, name) for one in held])
    spread = calls - calls.mean()
    found = float(spread @ values / (spread @ spread))
    rest = values - values.mean() - found * spread
    return found, float(np.sqrt(rest @ rest / max(1, len(held) - 2) / (spread @ spread)))


def broken(found: dict[str, Any]) -> list[str]:
    """What must not be."""
    # Two standard errors: on a slow machine few calls tell little.
    growth = {
        part: found[part]["mib_per_100_000_calls"] - 2 * found[part]["standard_error"] for part in ("chat", "training")
    }
    left = {name: found[name] for name in ("descriptors_left", "threads_left", "tasks_left")}
    return [
        *(
            f"{part} grows by {value:.2f} MiB or more in 100,000 calls"
            for part, value in growth.items()
            if value > MOST_MIB
        ),
        *(f"{name}: {value}" for name, value in left.items() if value > 0),
    ]


def measure(seconds: float) -> dict[str, Any]:
    """A soak on the quickly trained zoo, with the server in a process of its own."""
    torch.set_num_threads(1)
    home = os.environ.get("MOPE_BB_TEST_HOME")
    zoo = build_zoo(size="nano", home=Path(home) if home else None)
    with in_process(zoo.folder("concise")) as url:
        return soak(zoo, url, seconds=seconds)


ENVIRONMENT: Final = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1"}


def in_child(seconds: float) -> dict[str, Any]:
    """`measure` in a process whose memory can be told."""
    command = [sys.executable, "-m", "tests.chaos.soak", "--seconds", str(seconds)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Soak, tell, and fail where something stays behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.chaos.soak", *sys.argv[1:]], {**os.environ, **ENVIRONMENT}
        )
    found = measure(parser.parse_args().seconds)
    print(json.dumps(found))
    sys.exit(f"left behind: {broken(found)}" if broken(found) else 0)


if __name__ == "__main__":
    main()
