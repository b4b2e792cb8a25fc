"""Determinism: the asynchronous loop against a plain one, and a killed run against one that nobody disturbed."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mope_bb.config import load_config
from mope_bb.errors import ConfigError
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import load_pcm
from mope_bb.pcm.rollouts import RolloutRequest
from mope_bb.rewards.registry import open_reward_panel
from mope_bb.training.learner import FEATURE_RATE, PRODUCT_DEFAULTS, Learner, LearnerOptions, Pair
from mope_bb.training.ledger import Ledger
from mope_bb.training.rebel import choose_eta
from mope_bb.training.scoring import ReferenceDesk, score_pairs
from mope_bb.training.tasks import load_prompts, open_tasks, served_dimensions
from mope_bb.types import SamplingOptions
from mope_bb.zoo.build import Zoo
from tests.training.shop import Shop, equal, make_shop


@pytest.fixture
def shop(nano: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A shop whose reward function this process can import as well."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards_of_resume", raising=False)
    return make_shop(tmp_path, nano)


def plain_loop(shop: Shop, num_steps: int) -> dict[str, torch.Tensor]:
    """REBEL as one would write it down: sample a batch, score it, learn from it. No ledger, no tasks, no versions."""
    config = load_config(shop.path / "mope.toml")
    options, rule = config.train, MergeRule("product")
    dimensions = served_dimensions(config)
    pcm = _fresh_pcm(config.pcm.backbone or "", dimensions)
    pcm.rule = rule.name
    source = open_tasks(config, rule, load_prompts(Path(options.prompts or "")))
    panel = open_reward_panel(config, dimensions)
    sampling = SamplingOptions(max_tokens=options.max_tokens)
    learner: Learner | None = None
    with ExpertBench(config, [one.name for one in config.experts]) as bench, Ledger(shop.path / "plain") as ledger:
        desk = ReferenceDesk(ledger, bench.actor(max_in_flight=1), expert="base", seed=options.seed)
        for step in range(num_steps):
            tasks = [source.task(step * options.batch_size + i) for i in range(options.batch_size)]
            requests: list[RolloutRequest] = [task.requests[place] for place in (0, 1) for task in tasks]
            rollouts = bench.sampler(pcm).sample(requests, sampling)
            bench.run(desk.fetch([task.messages for task in tasks], sampling))
            both = list(zip(rollouts[: len(tasks)], rollouts[len(tasks) :], strict=True))
            references = [desk.reference(task.messages) for task in tasks]
            pairs = [one for one in score_pairs(panel, tasks, both, references).results if isinstance(one, Pair)]
            if learner is None:
                differences = [pair.rewards[0] - pair.rewards[1] for pair in pairs]
                rate = PRODUCT_DEFAULTS["learning_rate"]
                learner = Learner(
                    pcm,
                    LearnerOptions(
                        learning_rate=rate,
                        per_device_train_batch_size=options.per_device_train_batch_size,
                        feature_learning_rate=FEATURE_RATE * rate,
                    ),
                    eta=choose_eta(differences, target=PRODUCT_DEFAULTS["target_log_ratio"]),
                )
            seed = random.Random(f"{options.seed} step {step}").randrange(2**31)
            learner.step(pairs, seed=seed, share_done=step / num_steps)
    return {**dict(pcm.model.named_parameters()), "features": pcm.feature_weights}


def _fresh_pcm(backbone: str, dimensions: list[str]) -> Any:
    from mope_bb.pcm.model import build_pcm

    return build_pcm(backbone, dimensions)


def test_without_staleness_it_is_the_synchronous_loop(shop: Shop) -> None:
    """After 20 steps, bit for bit; one version of staleness gives other weights, so the comparison can fail."""
    torch.set_num_threads(1)
    file = shop.path / "mope.toml"
    text = file.read_text().replace("max_steps = 6", "max_steps = 20")
    file.write_text(text.replace("max_staleness = 1", "max_staleness = 0"))
    expected = plain_loop(shop, 20)
    shop.finish("sync")
    assert equal(shop.weights("sync"), expected)
    assert [row["staleness_max"] for row in shop.rows("sync")] == [0] * 20
    file.write_text(text)
    shop.finish("async")
    assert not equal(shop.weights("async"), expected)
    assert [row["staleness_max"] for row in shop.rows("async")] == [0] + [1] * 19


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(shop: Shop) -> None:
    """Killed while sampling, while learning between checkpoints, and twice in a row: rows and weights are the same."""
    shop.finish("whole")
    shop.kill("killed", lambda: shop.count("killed", "SELECT COUNT(*) FROM pairs") >= 3)
    shop.kill("killed", lambda: shop.count("killed", "SELECT COALESCE(MAX(step), 0) FROM pairs") >= 4)
    shop.kill("killed", lambda: shop.count("killed", "SELECT COALESCE(MAX(step), 0) FROM pairs") >= 4)
    shop.kill("killed", lambda: shop.count("killed", "SELECT COALESCE(MAX(step), 0) FROM pairs") >= 5)
    shop.finish("killed", "--resume")
    assert shop.rows("killed") == shop.rows("whole")
    assert equal(shop.weights("killed"), shop.weights("whole"))
    for out in ("whole", "killed"):
        assert shop.count(out, "SELECT COUNT(*) FROM pairs WHERE step IS NOT NULL") == 18
        assert shop.count(out, "SELECT COUNT(DISTINCT pair) FROM rollouts") == 18


def test_ctrl_c_and_more_steps(shop: Shop) -> None:
    """A run that was stopped by hand goes on where it stood, also with more steps; no step happens twice."""
    child = shop.begin("run")
    while shop.count("run", "SELECT COALESCE(MAX(step), 0) FROM pairs") < 3:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Go on with --resume" in err
    learned = len(shop.rows("run"))
    assert load_pcm(str(shop.path / "run" / "checkpoints" / "last")).policy_version == learned >= 2
    shop.finish("run", "--resume", "--max-steps", "8")
    assert [row["step"] for row in shop.rows("run")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('dimension = "friendly"', 'dimension = "friendly"\ntop_k = 5', r"'experts.friendly.top_k' was 20"),
        ("batch_size = 3", "batch_size = 4", r"'train.batch_size' was 3 .* 4 now"),
        ("max_tokens = 10", "max_tokens = 10\nseed = 1", r"'train.seed' was 0"),
        (
            '"my_rewards_of_resume:fair" }\n[pcm]',
            '"my_rewards_of_resume:fair" }\ntext = "Hi."\n[pcm]',
            r"friendly.text",
        ),
    ],
)
def test_another_run_is_not_resumed(shop: Shop, old: str, new: str, named: str) -> None:
    """Changed experts, dimensions or settings that make the run what it is are named; nothing is touched."""
    from mope_bb.training.runs import check_same_run, describe_run, write_run_file

    def document() -> dict[str, Any]:
        config = load_config(shop.path / "mope.toml")
        return describe_run(config, rule="product", reference="base", ablation={}, prompts=[])

    write_run_file(shop.path / "run", document())
    check_same_run(shop.path / "run", document())
    file = shop.path / "mope.toml"
    text = file.read_text()
    file.write_text(text.replace("max_steps = 6", "max_steps = 9"))
    check_same_run(shop.path / "run", document())
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=named):
        check_same_run(shop.path / "run", document())


@pytest.mark.slow
def test_two_learner_processes_are_one(shop: Shop) -> None:
    """`accelerate launch` with two processes on the CPU gives the weights of one, up to the order of a sum.

    In two parts, so that the second process also has to take over weights and optimiser from a checkpoint.
    """
    for steps in ("3", "6"):
        shop.finish("one", "--resume", "--max-steps", steps)
        shop.finish("two", "--resume", "--max-steps", steps, num_processes=2)
    one, two = shop.weights("one"), shop.weights("two")
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in shop.rows("two")] == list(range(1, 7))
    for row, expected in zip(shop.rows("two"), shop.rows("one"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
