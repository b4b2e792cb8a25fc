"""Checkpoints: PCM folders that appear whole or not at all, with what a resumed run needs beside the weights.

    checkpoints/step-40/       a Hugging Face folder with mope.json; plain transformers loads it
    checkpoints/step-40/trainer.safetensors, trainer.json
    checkpoints/last           a link to the newest whole one

A checkpoint is written under another name, synced to the disk, renamed, and only then linked to: a kill or a full disk
at any moment leaves `last` pointing at a whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mope_bb.errors import CheckpointError, TrainingError
from mope_bb.pcm.model import PreferenceControlModel

LAST: Final = "last"


@dataclass(frozen=True, eq=False)
class TrainerState:
    """What a run needs beside the PCM to go on as if nothing had happened."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """Numbers and names, as JSON holds them."""


def save_checkpoint(
    pcm: PreferenceControlModel, folder: Path, *, step: int, state: TrainerState | None = None, num_kept: int = 1
) -> Path:
    """Write `pcm` (and `state`) as `folder/step-N`, let `folder/last` point to it, and return `folder/last`.

    The newest `num_kept` stay. Raises TrainingError; the older ones are then as they were.
    """
    last = folder / LAST
    name, folder = f"step-{step}", folder.absolute()
    target, temporary = folder / name, folder / f".{name}.tmp"
    with _explained(target):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        pcm.save(temporary)
        if state is not None:
            save_file(dict(state.tensors), temporary / "trainer.safetensors")
            (temporary / "trainer.json").write_text(json.dumps(state.facts, indent=1) + "\n", encoding="utf-8")
        for file in (*temporary.rglob("*"), temporary):
            _sync(file)
        if target.exists():
            # A process was killed before it could link to it. The one that `last` points to is never touched.
            if target == (folder / LAST).resolve():
                raise TrainingError(f"there is a checkpoint {str(target)!r} already")
            shutil.rmtree(target)
        temporary.replace(target)
        _link(folder, name)
    _remove_older(folder, num_kept)
    return last


def load_state(checkpoint: Path) -> TrainerState:
    """What `save_checkpoint` wrote beside the PCM. Raises CheckpointError."""
    try:
        facts = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError(f"trainer.json holds {type(facts).__name__}, expected an object")
        return TrainerState(load_file(checkpoint / "trainer.safetensors"), facts)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"the run cannot go on from {str(checkpoint)!r}: {error}",
            hint="Start a new run with this folder as `path` in [pcm]: the weights themselves may be whole.",
        ) from None


def _link(folder: Path, name: str) -> None:
    new = folder / f".{LAST}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(name, target_is_directory=True)
    new.replace(folder / LAST)
    _sync(folder)


def _remove_older(folder: Path, num_kept: int) -> None:
    """Older checkpoints, and what killed processes left half written."""
    steps = sorted(folder.glob("step-*"), key=lambda path: path.stat().st_mtime_ns)
    kept = {*steps[-num_kept:], (folder / LAST).resolve()}
    for path in (*(path for path in steps if path not in kept), *folder.glob(".step-*")):
        # What cannot be removed costs room, nothing else.
        with suppress(OSError):
            shutil.rmtree(path)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"the checkpoint {str(target)!r} cannot be written: {error}", hint="Is there room on the disk?"
        ) from None


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
