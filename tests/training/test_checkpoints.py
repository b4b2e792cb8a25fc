"""Checkpoints appear whole or not at all."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mope_bb.errors import TrainingError
from mope_bb.pcm.model import PreferenceControlModel, load_pcm
from mope_bb.training.checkpoints import save_checkpoint
from mope_bb.zoo.build import Zoo


@pytest.fixture
def pcm(nano: Zoo) -> PreferenceControlModel:
    """A PCM with weights of its own."""
    pcm = load_pcm(str(nano.pcm))
    pcm.model.score.weight.data.fill_(1.0)
    pcm.feature_weights = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    pcm.policy_version, pcm.rule = 5, "product"
    return pcm


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can be written beyond 20 kB, as on a disk that becomes full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_is_the_whole_pcm(pcm: PreferenceControlModel, tmp_path: Path) -> None:
    """Weights, features, version and rule come back; the folder is made where it is missing."""
    folder = save_checkpoint(pcm, tmp_path / "run" / "checkpoints", step=5)
    again = load_pcm(str(folder))
    assert folder == tmp_path / "run" / "checkpoints" / "last"
    for one, other in zip(pcm.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.feature_weights.tolist() == [0.5, -1.0, 2.0]
    assert (again.policy_version, again.rule, again.experts) == (5, "product", pcm.experts)


def test_a_newer_one_replaces_it(pcm: PreferenceControlModel, tmp_path: Path) -> None:
    """`last` is the newest; as many older ones stay as are wanted, and nothing temporary."""
    for step in (5, 6, 7):
        pcm.policy_version = step
        assert load_pcm(str(save_checkpoint(pcm, tmp_path, step=step, num_kept=2))).policy_version == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-6", "step-7"]
    assert (tmp_path / "last").resolve() == tmp_path / "step-7"


def test_what_a_killed_process_left_is_replaced(pcm: PreferenceControlModel, tmp_path: Path) -> None:
    """A whole one that nothing points to, and a half written one, are in nobody's way; the last one is not touched."""
    save_checkpoint(pcm, tmp_path, step=5)
    (tmp_path / "step-6").mkdir()
    (tmp_path / "step-6" / "stray").write_text("old")
    (tmp_path / ".step-7.tmp").mkdir()
    pcm.policy_version = 6
    assert load_pcm(str(save_checkpoint(pcm, tmp_path, step=6))).policy_version == 6
    assert not (tmp_path / "last" / "stray").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-6"]
    with pytest.raises(TrainingError, match="step-6' already"):
        save_checkpoint(pcm, tmp_path, step=6)


def test_a_full_disk_keeps_the_older_one(pcm: PreferenceControlModel, tmp_path: Path) -> None:
    """A checkpoint that cannot be written is a TrainingError; what was there stays, and the next attempt succeeds."""
    folder = save_checkpoint(pcm, tmp_path, step=5)
    pcm.policy_version = 6
    with full_disk(), pytest.raises(TrainingError, match=r"step-6' cannot be written: .*File too large") as caught:
        save_checkpoint(pcm, tmp_path, step=6)
    assert "room on the disk" in str(caught.value.hint)
    assert load_pcm(str(folder)).policy_version == 5
    assert load_pcm(str(save_checkpoint(pcm, tmp_path, step=6))).policy_version == 6


def test_a_file_in_the_way_is_an_error(pcm: PreferenceControlModel, tmp_path: Path) -> None:
    """A folder that cannot be made is a TrainingError that names the checkpoint."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file/step-5' cannot be written"):
        save_checkpoint(pcm, tmp_path / "file", step=5)
