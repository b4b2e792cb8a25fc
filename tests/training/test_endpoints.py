"""Training over HTTP against the real llama.cpp server: what is asked, what is not asked twice, and bad days."""

from __future__ import annotations

import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mope_bb.config import Config, load_config, parse_config
from mope_bb.errors import AllRolloutsFailedError, BudgetError, StalledError
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import PreferenceControlModel, load_pcm
from mope_bb.rewards.base import RewardPanel
from mope_bb.rewards.function import FunctionReward
from mope_bb.training.metrics import StepMetrics
from mope_bb.training.runs import TrainingSetup
from mope_bb.training.tasks import open_tasks
from mope_bb.training.trainer import Trainer
from mope_bb.types import Message
from mope_bb.usage import Account
from mope_bb.zoo.serving import ZooServer
from tests.proxy import FAULTS, Proxy, running
from tests.training.shop import REPOSITORY

pytestmark = pytest.mark.deadlines
PROMPTS = tuple((Message("user", f"How do I fix a {thing}?"),) for thing in ("bike", "chair", "boat"))
NAMES = ("base", "concise", "friendly")
TRAIN: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 4,
    "max_tokens": 8,
    "max_in_flight": 8,
    "preferences": {"sentences": 0},
}


def score(messages: list[dict[str, Any]], answer: str) -> float:
    """Any reward that tells answers apart."""
    return random.Random(answer).gauss(0.0, 1.0)


@pytest.fixture
def proxy(nano_experts: ZooServer) -> Iterator[Proxy]:
    """In front of base, concise and friendly."""
    with running(Proxy({name: nano_experts.base_urls[name] for name in NAMES})) as found:
        yield found


@dataclass(frozen=True)
class Runs:
    """Runs through the proxy below a folder."""

    server: ZooServer
    proxy: Proxy
    path: Path

    def config(
        self,
        *,
        expert: dict[str, Any] | None = None,
        mode: str = "lockstep",
        budget: dict[str, Any] | None = None,
        **train: Any,
    ) -> Config:
        """The experts at the proxy's address; `expert` are settings of each. In lockstep questions can be counted."""
        data = self.server.config_data()
        data["experts"] = [
            {**one, "base_url": self.proxy.url(one["name"]), **(expert or {})}
            for one in data["experts"]
            if one["name"] in NAMES
        ]
        data["dimensions"] = {name: data["dimensions"][name] for name in NAMES[1:]}
        sections = {"presets": {}, "decoding": {"mode": mode}, "budget": budget or {}, "train": {**TRAIN, **train}}
        return parse_config({**data, **sections})

    def train(self, config: Config, *, reward: Any = score, resume: bool = False) -> list[StepMetrics]:
        """Run it to its end."""
        found: list[StepMetrics] = []
        account = Account.of(config)
        with ExpertBench(config, NAMES, account) as bench:
            trainer = Trainer(
                TrainingSetup(
                    config=config,
                    rule=MergeRule("product"),
                    pcm=load_pcm(str(self.server.zoo.pcm)),
                    bench=bench,
                    panel=RewardPanel({name: FunctionReward(name, reward) for name in NAMES[1:]}),
                    prompts=PROMPTS,
                    output_dir=self.path / "run",
                    account=account,
                )
            )
            trainer.run(lambda metrics, share: found.append(metrics), resume=resume)
        return found

    def prepare_child(self, config: Config) -> list[str]:
        """Write what a process of its own needs, and return its command: begin the run or go on with it."""
        (self.path / "my_rewards_of_kill.py").write_text(CHILD)
        (self.path / "prompts.txt").write_text("\n".join(one[0].content for one in PROMPTS))
        write_toml(self.path / "mope.toml", config)
        return [sys.executable, "-m", "mope_bb", "train", "mope.toml", "--out", "run", "--resume"]

    def begin_child(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start it."""
        paths = os.pathsep.join([str(self.path), REPOSITORY, os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.Popen(
            command, cwd=self.path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def needed(self, config: Config) -> int:
        """How many questions the answers in the ledger took, by their lengths and by who was asked."""
        source = open_tasks(config, MergeRule("product"), PROMPTS)
        with sqlite3.connect(self.path / "run" / "ledger.sqlite3") as database:
            rows = database.execute("SELECT pair, num_tokens FROM rollouts").fetchall()
        return sum(num_tokens * len(source.task(pair).plan.asked) for pair, num_tokens in rows)


@pytest.fixture
def runs(nano_experts: ZooServer, proxy: Proxy, tmp_path: Path) -> Runs:
    """Runs below a folder of this test."""
    return Runs(nano_experts, proxy, tmp_path)


def test_it_trains_over_http(runs: Runs) -> None:
    """Three batches; nothing is asked that no answer needs; versions change within answers; the bound holds."""
    config = runs.config()
    found = runs.train(config)
    assert [metrics.step for metrics in found] == [1, 2, 3]
    assert all(metrics.num_dropped == 0 and metrics.staleness_max <= 2 for metrics in found)
    assert sum(metrics.num_requests for metrics in found) >= runs.proxy.num_requests > 0
    asked = sum(runs.proxy.questions.values()) - len(PROMPTS) * config.train.max_tokens
    # Answers to the prompts' references are at most max_tokens long; nothing else comes on top. What two answers ask at
    # the same time is asked once.
    assert asked <= runs.needed(config)
    assert len(runs.proxy.questions) > 0.3 * runs.needed(config)
    assert load_pcm(str(runs.path / "run" / "checkpoints" / "last")).policy_version == 3


def test_a_budget_ends_the_run_and_a_larger_one_goes_on(runs: Runs) -> None:
    """It counts over all processes of the run; what was finished is kept, and nothing of it is asked again."""
    with pytest.raises(BudgetError, match="max_tokens_billed"):
        runs.train(runs.config(budget={"max_tokens_billed": 4000}))
    with sqlite3.connect(runs.path / "run" / "ledger.sqlite3") as database:
        (num_rollouts,) = database.execute("SELECT COUNT(*) FROM rollouts").fetchone()
        calls, told, read, drawn = database.execute(
            "SELECT SUM(num_calls), SUM(num_told), SUM(input_tokens), SUM(output_tokens) FROM usage"
        ).fetchone()
    assert num_rollouts > 0
    assert read + drawn >= 4000
    num_requests = runs.proxy.num_requests
    # Those that were given up when the run ended have told nothing.
    assert told <= num_requests <= told + TRAIN["max_in_flight"] * len(NAMES)
    with pytest.raises(BudgetError, match="max_tokens_billed"):
        runs.train(runs.config(budget={"max_tokens_billed": 4000}), resume=True)
    assert runs.proxy.num_requests == num_requests
    found = runs.train(runs.config(budget={"max_tokens_billed": 1_000_000}), resume=True)
    assert [metrics.step for metrics in found][-1] == 3
    with sqlite3.connect(runs.path / "run" / "ledger.sqlite3") as database:
        (more,) = database.execute("SELECT SUM(num_calls) FROM usage").fetchone()
    assert more >= calls + runs.proxy.num_requests - num_requests


def test_it_trains_on_answers_written_ahead(runs: Runs) -> None:
    """Drafts and scores instead of a question for each token: fewer requests, and the same bounds."""
    config = runs.config(mode="draft", expert={"max_prompts": 1})
    found = runs.train(config)
    assert [metrics.step for metrics in found] == [1, 2, 3]
    assert all(metrics.num_dropped == 0 and metrics.staleness_max <= 2 for metrics in found)
    assert 0 < runs.proxy.num_requests < runs.needed(config)


def test_questions_travel_together(runs: Runs) -> None:
    """Fewer requests than questions; with `max_prompts` = 1 as many."""
    runs.train(runs.config())
    together = sum(runs.proxy.questions.values()) / runs.proxy.num_requests
    runs.proxy.questions.clear()
    runs.proxy.num_requests = 0
    single = Runs(runs.server, runs.proxy, runs.path / "single")
    single.train(single.config(expert={"max_prompts": 1}))
    assert sum(runs.proxy.questions.values()) == runs.proxy.num_requests
    # Equal ones are asked once, so fewer are left to travel together.
    assert together > 1.2


def test_a_tenth_of_the_calls_fails(runs: Runs) -> None:
    """Errors, broken connections, garbage and silence: the run completes, and no pair is lost to those."""
    runs.proxy.fault_rate = 0.1
    found = runs.train(runs.config(expert={"timeout_s": 20.0, "max_retries": 8, "attempt_timeout_s": 1.0}))
    assert [metrics.step for metrics in found] == [1, 2, 3]
    assert set(runs.proxy.num_faults) == set(FAULTS)
    assert all(metrics.staleness_max <= 2 for metrics in found)


def test_a_dead_server_ends_the_run_by_name(runs: Runs) -> None:
    """Every pair fails: the run ends with the address that it could not reach; what was learned is there to go on."""
    config = runs.config(expert={"max_retries": 0})
    runs.train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 1})}))
    runs.proxy.fault_rate, runs.proxy.faults = 1.0, ("500",)
    with pytest.raises(AllRolloutsFailedError, match=r"none of the 4 pairs of batch 1 .*127\.0\.0\.1:\d+/\w+.* 500"):
        runs.train(config, resume=True)
    runs.proxy.fault_rate = 0.0
    found = runs.train(config, resume=True)
    assert found[-1].step == 3


def test_silence_ends_by_its_deadline(runs: Runs) -> None:
    """A server that accepts and never answers: the deadline of a question, then the reason."""
    runs.proxy.fault_rate, runs.proxy.faults = 1.0, ("hang",)
    started = time.monotonic()
    with pytest.raises(AllRolloutsFailedError, match=r"no complete reply from http://127\.0\.0\.1"):
        runs.train(runs.config(expert={"timeout_s": 0.5, "max_retries": 1}))
    assert time.monotonic() - started < 30


def test_a_reward_that_hangs_is_named(runs: Runs) -> None:
    """Nothing ends any more: the run does, and says what it waits for."""
    never = threading.Event()

    def silent(messages: list[dict[str, Any]], answer: str) -> float:
        never.wait(60)
        return 0.0

    with pytest.raises(StalledError, match=r"nothing has ended for 5 s; the run waits for the rewards of \d pairs"):
        runs.train(runs.config(stall_timeout_s=5.0), reward=silent)
    never.set()


def test_an_answer_that_takes_too_long_fails(runs: Runs) -> None:
    """`rollout_timeout_s` costs that pair only; slow answers do not hold up the run for ever."""
    runs.proxy.delay = lambda rng, body: 0.05
    with pytest.raises(AllRolloutsFailedError, match=r"not whole after 0\.05 s"):
        runs.train(runs.config(rollout_timeout_s=0.05))


def test_a_full_disk_at_a_checkpoint_costs_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run says so and goes on; the next checkpoint is whole."""
    save, calls = PreferenceControlModel.save, []

    def full_once(self: PreferenceControlModel, folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:
            (folder / "half").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, folder)

    monkeypatch.setattr(PreferenceControlModel, "save", full_once)
    found = runs.train(runs.config(save_steps=1))
    assert len(found) == 3
    assert "No space left on device; the run goes on" in caplog.text
    folder = runs.path / "run" / "checkpoints"
    assert load_pcm(str(folder / "last")).policy_version == 3
    assert not list(folder.glob("**/half"))


CHILD = """
import random, sys
from pathlib import Path

def score(messages, answer):
    return random.Random(answer).gauss(0.0, 1.0)
"""


def test_a_kill_costs_at_most_what_was_under_way(runs: Runs) -> None:
    """SIGKILL, then --resume: every question of a finished answer is asked once, counted at the proxy."""
    config = runs.config(max_steps=4, save_steps=2)
    command = runs.prepare_child(config)
    num_kills = 0
    for num_ended in (3, 7):
        child = runs.begin_child(command)
        while count_ended(runs.path / "run" / "ledger.sqlite3") < num_ended:
            assert child.poll() is None, child.communicate()[1].decode()
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        num_kills += 1
    child = runs.begin_child(command)
    assert child.communicate(timeout=120)
    assert child.returncode == 0
    config = load_config(runs.path / "mope.toml")
    asked, options = sum(runs.proxy.questions.values()), config.train
    references = len(PROMPTS) * options.max_tokens
    under_way = options.max_in_flight * options.max_tokens * len(NAMES)
    # What several answers ask at the same time is asked once.
    assert 0.5 * runs.needed(config) < asked <= runs.needed(config) + num_kills * under_way + references
    with sqlite3.connect(runs.path / "run" / "ledger.sqlite3") as database:
        assert database.execute("SELECT COUNT(*), COUNT(step) FROM pairs").fetchone() == (16, 16)
        again = database.execute("SELECT COUNT(*) FROM pairs WHERE num_dispatches > 1").fetchone()[0]
    assert 0 < again <= num_kills * options.max_in_flight


def count_ended(file: Path) -> int:
    """Pairs that have ended, in a ledger that another process writes."""
    if not file.exists():
        return 0
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return int(database.execute("SELECT COUNT(*) FROM pairs WHERE state != 'dispatched'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        database.close()


def write_toml(file: Path, config: Config) -> None:
    """A `mope.toml` of these experts with a reward function for each dimension."""
    lines = []
    for one in config.experts:
        role = "base = true" if one.base else f'dimension = "{one.dimension}"'
        lines += [
            f'[[experts]]\nname = "{one.name}"\nprovider = "llamacpp"\nbase_url = "{one.base_url}"\n{role}',
            f'tokenizer = "{one.tokenizer}"' if one.tokenizer else "",
        ]
    for name in config.dimensions:
        lines.append(f'[dimensions.{name}]\nreward = {{ kind = "function", function = "my_rewards_of_kill:score" }}')
    lines.append(f'[pcm]\npath = "{config.pcm.path}"\ndevice = "cpu"\n[train]\nprompts = "prompts.txt"')
    names = ("max_steps", "batch_size", "max_tokens", "max_in_flight", "save_steps")
    lines += [f"{name} = {getattr(config.train, name)}" for name in names]
    # What is counted at the proxy must not be answered by an earlier run's cache.
    lines.append(f'[train.preferences]\nsentences = 0\n[decoding]\nmode = "{config.decoding.mode}"')
    lines.append("[cache]\nenabled = false\n")
    file.write_text("\n".join(lines))
