"""Checkpoints: PCM folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from mope_bb.errors import TrainingError
from mope_bb.pcm.model import PreferenceControlModel


def save_checkpoint(pcm: PreferenceControlModel, folder: Path, name: str) -> Path:
    """Write `pcm` as `folder/name`, replacing an older one only when the new one is complete. Raises TrainingError."""
    target, temporary = folder / name, folder / f".{name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        pcm.save(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        old = folder / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.replace(old)
        temporary.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"the checkpoint {str(target)!r} cannot be written: {error}", hint="Is there room on the disk?"
        ) from None
    return target


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
