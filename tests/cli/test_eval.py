"""`mope-bb eval`: what it refuses, before anything is asked and without touching an older evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mope_bb.pcm.model import load_pcm

if TYPE_CHECKING:
    from mope_bb.zoo import Zoo
    from tests.command_line import Run

CONFIGURATION = 2


@pytest.fixture
def here(nano: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a configuration, prompts, an older evaluation, and PCMs of three kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mope.toml").write_text(
        "".join(
            f'[[experts]]\nname = "{name}"\nprovider = "local"\nmodel = "{nano.folder(name)}"\ndevice = "cpu"\n{role}\n'
            for name, role in (("base", "base = true"), ("concise", 'dimension = "concise"'))
        )
    )
    (tmp_path / "prompts.txt").write_text("How do I fix a bike?\nHello\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "untrained").symlink_to(nano.pcm)
    (tmp_path / "no-base.toml").write_text((tmp_path / "mope.toml").read_text().replace("base = true", ""))
    for name, rule in (("one", "linear"), ("two", "linear"), ("product", "product")):
        pcm = load_pcm(str(nano.pcm))
        pcm.policy_version, pcm.rule = 1, rule
        (tmp_path / name).mkdir()
        pcm.save(tmp_path / name)
    (tmp_path / "older").mkdir()
    for name in ("evaluation.json", "report.html"):
        (tmp_path / "older" / name).write_text("older")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--pcm", "untrained"], ["the PCM 'untrained' is not trained", "mope-bb train"]),
        (["--pcm", "one", "--pcm", "two"], ["two PCMs were trained for the rule 'linear'", "one per rule"]),
        (["--pcm", "one", "--pcm", "untrained"], ["the PCM 'untrained' is not trained"]),
        (["-c", "no-base.toml", "--pcm", "product"], ["trained for the rule 'product'", "base = true"]),
        (["--ceilings"], ["--ceilings needs the zoo"]),
        (["--pcm", "absent"], ["'absent' is not a PCM folder"]),
        (["--prompts", "absent.txt"], ["no prompt file 'absent.txt'"]),
        (["--prompts", "empty.txt"], ["'empty.txt' holds no prompt"]),
        (["--num-prompts", "1"], ["--num-prompts", "1"]),
        (["--prompts", "prompts.txt"], ["'concise' has no reward", "[dimensions.concise]"]),
        ([], ["there are no prompts to ask", "--prompts"]),
    ],
    ids=lambda value: " ".join(value).replace("--", "") if value and value[0].startswith("-") else "",
)
def test_bad_input_costs_nothing(mope: Run, here: Path, flags: list[str], parts: list[str]) -> None:
    """One line and a hint; what stands in the output folder stays as it was."""
    mope("eval", "-c", "mope.toml", "-o", "older", *flags).assert_refused(CONFIGURATION, *parts)
    assert {path.name: path.read_text() for path in (here / "older").iterdir()} == {
        "evaluation.json": "older",
        "report.html": "older",
    }


def test_an_output_that_is_a_file_is_named(mope: Run, here: Path) -> None:
    """A file in the place of the folder is refused and kept."""
    mope("eval", "-c", "mope.toml", "-o", "empty.txt").assert_refused(CONFIGURATION, "'empty.txt' cannot be made")
    assert (here / "empty.txt").read_text() == "\n"
