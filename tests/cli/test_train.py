"""`mope-bb train`: it trains and saves, saves what it has when it is stopped, and refuses without touching anything."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mope_bb.cli.train_view import View
from mope_bb.pcm.model import load_pcm
from tests.rewards.conftest import save_llama

if TYPE_CHECKING:
    from mope_bb.zoo import Zoo
    from tests.command_line import Run

FAILED = 1
CONFIGURATION = 2
INTERRUPTED = 130
REWARDS = """
import hashlib
import signal
import time
from pathlib import Path

def fair(messages, answer):
    return hashlib.sha256(answer.encode()).digest()[0] / 64

def tiring(messages, answer):
    return float("nan") if Path("new/metrics.jsonl").exists() else fair(messages, answer)

def broken(messages, answer):
    return float("nan")

def stopped(messages, answer):
    signal.raise_signal(signal.SIGINT)
    time.sleep(1)
    return 0.0
"""
FAIR = 'kind = "function", function = "my_rewards_of_train:fair"'
TRAIN = """
[train]
prompts = "prompts.txt"
max_steps = 2
batch_size = 3
max_tokens = 6
max_staleness = 0
"""


class Folder:
    """A folder with a `mope.toml` of local experts, prompts, reward functions, and `run`, where something stands."""

    def __init__(self, path: Path, nano: Zoo) -> None:
        self.path = path
        self._nano = nano
        (path / "prompts.txt").write_text("How do I fix a bike?\nHello\n")
        (path / "my_rewards_of_train.py").write_text(REWARDS)
        self.run = path / "run"
        for name in ("notes.txt", "checkpoints/mine/mope.json"):
            (self.run / name).parent.mkdir(parents=True, exist_ok=True)
            (self.run / name).write_text("older")

    def config(self, *, base: bool = True, reward: str = FAIR, dimension: str = "concise", more: str = "") -> str:
        """The path of the configuration: two styled experts, perhaps the base; `more` is appended."""
        tables = [
            f'[[experts]]\nname = "{name}"\nprovider = "local"\nmodel = "{self._nano.folder(name)}"\ndevice = "cpu"\n'
            + ("base = true\n" if name == "base" else f'dimension = "{name}"\n')
            for name in (*(("base",) if base else ()), "concise", "friendly")
        ]
        tables += [f"[dimensions.{name}]\nreward = {{ {reward} }}\n" for name in (dimension, "friendly")]
        tables += [f'[pcm]\nbackbone = "{self._nano.folder("base")}"\ndevice = "cpu"\n', TRAIN, more]
        (self.path / "mope.toml").write_text("".join(tables))
        return str(self.path / "mope.toml")

    def content(self) -> dict[str, bytes]:
        """The prompts and every file of `run`."""
        files = [*self.run.rglob("*"), self.path / "prompts.txt"]
        return {str(file.relative_to(self.path)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture
def folder(nano: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """The current directory of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards_of_train", raising=False)
    return Folder(tmp_path, nano)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_and_saves(mope: Run, folder: Folder) -> None:
    """Progress and a summary on standard error, the checkpoint's path alone on standard output."""
    result = mope("train", "-c", folder.config(), "-o", "new", "--max-steps", "3", "--seed", "4")
    assert result.status == 0
    assert result.out == "new/checkpoints/last\n"
    lines = result.err.splitlines()
    assert [line.split(" · ")[0] for line in lines[:-1]] == ["batch 1", "batch 2", "batch 3"]
    assert lines[-1] == "Trained 3 batches; the PCM is in new/checkpoints/last"
    pcm = load_pcm("new/checkpoints/last")
    assert (pcm.rule, pcm.policy_version, pcm.experts) == ("product", 3, ("concise", "friendly"))
    assert [row["step"] for row in rows_of(Path("new"))] == [1, 2, 3]
    assert json.loads(Path("new/run.json").read_text())["train"]["seed"] == 4


@pytest.mark.parametrize(
    ("flags", "more", "rule"),
    [
        ((), '[merge]\nrule = "linear"\n', "linear"),
        (("--merge", "geometric"), '[merge]\nrule = "linear"\n', "geometric"),
    ],
)
def test_who_chooses_the_rule(mope: Run, folder: Folder, flags: tuple[str, ...], more: str, rule: str) -> None:
    """The flag, else the configuration; without both the product, as above."""
    mope("train", "-c", folder.config(more=more), "-o", "new", "--max-steps", "1", *flags)
    assert load_pcm("new/checkpoints/last").rule == rule


def test_flags_keep_the_rest_of_the_preferences(mope: Run, folder: Folder) -> None:
    """--leave-out adds to [train.preferences] and replaces nothing else in it."""
    axes = '[train.preferences]\naxes = [["concise", "friendly"]]\nsizes = [1, 0, 0]\n'
    result = mope("train", "-c", folder.config(more=axes), "-o", "new", "--max-steps", "1", "--leave-out", "friendly")
    assert result.status == 0, result.err
    mix = json.loads(Path("new/run.json").read_text())["train"]["preferences"]
    assert (mix["axes"], mix["leave_out"], mix["sizes"]) == ([["concise", "friendly"]], [["friendly"]], [1, 0, 0])


def test_ctrl_c_saves_what_was_learned(mope: Run, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one of two batches: exit status 130, the path of the checkpoint, and one batch in it."""

    def interrupted(view: View, metrics: Any, share: float) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(View, "show_step", interrupted)
    result = mope("train", "-c", folder.config(), "-o", "new")
    assert (result.status, result.out) == (INTERRUPTED, "")
    assert result.err.strip() == "Stopped; what was learned is saved in new/checkpoints/last. Go on with --resume."
    assert load_pcm("new/checkpoints/last").policy_version == 1
    assert len(rows_of(Path("new"))) == 1


@pytest.mark.slow
def test_ctrl_c_before_anything_was_learned(mope: Run, folder: Folder) -> None:
    """Nothing is saved over what stands in the folder, and nothing is said."""
    before = folder.content()
    result = mope("train", "-c", folder.config(reward=FAIR.replace("fair", "stopped")), "-o", "run")
    assert (result.status, result.out, result.err.strip()) == (INTERRUPTED, "", "")
    assert before.items() <= folder.content().items()
    assert not (folder.run / "checkpoints" / "last").exists()


def test_an_error_saves_what_was_learned(mope: Run, folder: Folder) -> None:
    """A run that cannot go on after its first batch keeps it: a line says where, one says why, one what to do."""
    result = mope("train", "-c", folder.config(reward=FAIR.replace("fair", "tiring")), "-o", "new")
    assert (result.status, result.out) == (FAILED, "")
    progress, empty, saved, error, hint = result.err.splitlines()
    assert progress.startswith("batch 1 ")
    assert (empty, saved) == (
        "",
        "Stopped; what was learned is saved in new/checkpoints/last. Go on with --resume.",
    )
    assert error.startswith("error: none of the 3 pairs of batch 1 could be used")
    assert hint.startswith("hint: ")
    assert load_pcm("new/checkpoints/last").policy_version == 1


@pytest.mark.parametrize("flags", [["-o", "run"], []])
def test_a_run_never_writes_into_another(mope: Run, folder: Folder, flags: list[str]) -> None:
    """A folder that holds a run, whoever names it, is refused before anything is read; nothing in it changes."""
    (folder.run / "metrics.jsonl").write_text("older")
    before = folder.content()
    config = folder.config(more='output_dir = "run"\n')
    mope("train", "-c", config, *flags).assert_refused(CONFIGURATION, "run' holds a run already", "--out")
    assert folder.content() == before


@pytest.mark.parametrize(
    ("flags", "options", "status", "parts"),
    [
        (["--prompts", "absent.txt"], {}, CONFIGURATION, ["no prompt file 'absent.txt'"]),
        (["--prompts", "empty.txt"], {}, CONFIGURATION, ["'empty.txt' holds no prompt"]),
        (["--prompts", "broken.jsonl"], {}, CONFIGURATION, ["'broken.jsonl', line 1: not valid JSON"]),
        (["--max-steps", "0"], {}, CONFIGURATION, ["train.max_steps"]),
        (["--max-minutes", "nan"], {}, CONFIGURATION, ["train.max_minutes"]),
        (["--leave-out", "friendly,concize"], {}, CONFIGURATION, ["'concize'", "Known: concise, friendly"]),
        (["--merge", "median"], {}, CONFIGURATION, ["'median'"]),
        (
            [],
            {"more": '[train.preferences]\naxes = [["concize"]]\n'},
            CONFIGURATION,
            ["'concize', which has no expert", "Known: concise, friendly"],
        ),
        ([], {"dimension": "concize"}, CONFIGURATION, ["'concise' has no reward", "[dimensions.concise]"]),
        (
            [],
            {"reward": FAIR.replace("fair", "fare")},
            CONFIGURATION,
            ["no function 'fare'", "Did you mean 'fair'?"],
        ),
        (
            [],
            {"reward": 'kind = "classifier", path = "three", device = "cpu"'},
            FAILED,
            ["three' has 3 labels, a reward model has 1", "num_labels=1"],
        ),
        (
            [],
            {"reward": FAIR.replace("fair", "broken")},
            FAILED,
            ["none of the 3 pairs of batch 0", "is nan, not a finite number"],
        ),
        ([], {"base": False}, CONFIGURATION, ["'product' needs a base expert", "base = true"]),
        (["--merge", "linear"], {"base": False}, CONFIGURATION, ["no expert is the base", "`reference`"]),
        ([], {"more": 'reference = "bass"\n'}, CONFIGURATION, ["'bass', which is no expert"]),
    ],
    ids=lambda value: None if isinstance(value, int | dict) else "-".join(value[:1]).strip("-"),
)
def test_bad_input_costs_nothing(  # noqa: PLR0917  # two fixtures and four parameters
    mope: Run, folder: Folder, flags: list[str], options: dict[str, Any], status: int, parts: list[str]
) -> None:
    """One line and a hint; what stands in the folder, and the prompts, are as they were."""
    (folder.path / "empty.txt").write_text("\n \n")
    (folder.path / "broken.jsonl").write_text("{\n")
    if "three" in options.get("reward", ""):
        save_llama(folder.path / "three", num_labels=3)
    config = folder.config(**options)
    before = folder.content()
    mope("train", "-c", config, "-o", "run", *flags).assert_refused(status, *parts)
    assert before.items() <= folder.content().items()
    assert not (folder.run / "checkpoints" / "last").exists()


def test_what_cannot_be_opened_is_named(mope: Run, folder: Folder) -> None:
    """A configuration without [pcm], one that is no PCM, and an output folder that is a file are named."""
    config = Path(folder.config())
    text = config.read_text()
    before, _, rest = text.partition("[pcm]")
    config.write_text(before + "[train]" + rest.partition("[train]")[2])
    mope("train", "-c", str(config), "-o", "run").assert_refused(CONFIGURATION, "no PCM to train", "`backbone`")
    config.write_text(text.replace("backbone = ", "path = "))
    mope("train", "-c", str(config), "-o", "run").assert_refused(CONFIGURATION, "no mope.json")
    mope("train", "-c", str(config), "-o", "prompts.txt").assert_refused(CONFIGURATION, "'prompts.txt' cannot be made")


def test_context_free_needs_batches(mope: Run, folder: Folder, nano: Zoo) -> None:
    """The ablation exists for local experts that share the PCM's tokenizer: elsewhere it is refused, not ignored."""
    scripted = "".join(
        f'[[experts]]\nname = "{name}"\nprovider = "scripted"\nscript = [{{"Hi" = 0.6, "Yo" = 0.4}}]\n'
        + ("base = true\n" if name == "base" else f'dimension = "{name}"\n')
        for name in ("base", "concise")
    )
    Path("mope.toml").write_text(
        scripted
        + '[dimensions.concise]\nreward = { kind = "function", function = "my_rewards_of_train:fair" }\n'
        + f'[pcm]\nbackbone = "{nano.folder("base")}"\ndevice = "cpu"\n{TRAIN}'
    )
    result = mope("train", "-c", "mope.toml", "-o", "run", "--ablation", "context-free")
    result.assert_refused(CONFIGURATION, "context-free", "local")
    assert mope("train", "-c", "mope.toml", "-o", "new", "--ablation", "no-features").status == 0
    assert load_pcm("new/checkpoints/last").policy_version == 2


def test_a_long_batch_is_told_about(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line at most every half minute; a quick batch says nothing."""
    clock = iter((0.0, 1.0, 31.0, 31.0, 32.0, 70.0, 70.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    view = View()
    for done in range(1, 5):
        view.show_answers(done, 9)
    assert capsys.readouterr().err.splitlines() == ["sampling: 2 of 9 answers", "sampling: 4 of 9 answers"]


def test_a_dry_run_asks_nobody(mope: Run, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions, tokens and cost of the run, from the configuration alone; nothing is sampled and nothing written."""
    monkeypatch.setattr("mope_bb.pcm.bench.ExpertBench.__init__", lambda *args: pytest.fail("an expert was opened"))
    config = Path(folder.config(more="[train.preferences]\nsentences = 0\nopposites = 0\n"))
    config.write_text(
        config.read_text().replace('name = "base"', 'name = "base"\ninput_price = 2.0\noutput_price = 10.0')
    )
    result = mope("train", str(config), "-o", "new", "--dry-run")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    # 2 batches of 3 pairs: 12 answers, and the reference answers to two prompts.
    assert lines[0].startswith("2 batches of 3 pairs: 12 answers, at most 2 reference answers")
    assert lines[1].startswith("Asked for an answer: base 100%, concise ")
    assert [line.split(":")[0] for line in lines[2:]] == [f"Answers of {n} tokens" for n in (1, 3, 6)]
    assert all("next-token questions" in line and "cost " in line for line in lines[2:])
    assert not Path("new").exists()


def test_the_configuration_is_given_once(mope: Run, folder: Folder) -> None:
    """As an argument or as an option, not both."""
    config = folder.config()
    assert mope("train", config, "-c", config, "-o", "new").status == CONFIGURATION
    assert mope("train", config, "-o", "new", "--max-steps", "1").status == 0


def test_resume_goes_on_or_begins(mope: Run, folder: Folder) -> None:
    """The same command line begins the run and goes on with it; without a folder there is nothing to go on with."""
    command = ("train", folder.config(), "-o", "new", "--resume")
    assert mope(*command, "--max-steps", "1").status == 0
    assert mope(*command).status == 0
    assert [row["step"] for row in rows_of(Path("new"))] == [1, 2]
    assert mope(*command).out == "new/checkpoints/last\n"
    mope("train", folder.config(), "--resume").assert_refused(CONFIGURATION, "--resume needs the folder", "--out")
    config = folder.config(more="seed = 3\n")
    mope("train", config, "-o", "new", "--resume").assert_refused(
        CONFIGURATION, "cannot be resumed", "'train.seed' was 0 when it began and is 3 now"
    )
