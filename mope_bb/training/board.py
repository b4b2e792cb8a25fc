"""Metrics for TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mope_bb.training.metrics import StepMetrics


def open_board(folder: Path) -> Callable[[StepMetrics], None]:
    """A function that writes a row of metrics to `folder/tensorboard`; it does nothing without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda metrics: None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(metrics: StepMetrics) -> None:
        for name, value in asdict(metrics).items():
            if name != "step":
                writer.add_scalar(f"train/{name}", value, metrics.step)
        writer.flush()

    return write
