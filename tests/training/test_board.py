"""TensorBoard is used where it is installed, and missed nowhere."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mope_bb.training.board import open_board
from mope_bb.training.metrics import StepMetrics

METRICS = StepMetrics(**{one.name: 1.5 for one in fields(StepMetrics)} | {"step": 3})  # type: ignore[arg-type]


def test_rows_become_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each metric by its name and step, in a folder of the run."""
    written: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            written.append("flush")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    open_board(tmp_path)(METRICS)
    assert written[0] == str(tmp_path / "tensorboard")
    assert ("train/reward", 1.5, 3) in written
    assert len(written) == len(fields(StepMetrics)) - 1 + 2


def test_without_it_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error and no file."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    open_board(tmp_path)(METRICS)
    assert not list(tmp_path.iterdir())
