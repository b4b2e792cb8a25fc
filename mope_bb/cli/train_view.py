"""Live progress of `mope-bb train`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.progress import Progress

    from mope_bb.training.metrics import StepMetrics
    from mope_bb.training.runs import TrainingSetup

SILENCE_S: Final = 30.0


class View:
    """Progress as lines on standard error: one for each tenth of the run, and for each half minute of a long batch."""

    def __init__(self) -> None:
        self._tenth = -1
        self._last_line = time.monotonic()

    def show_step(self, metrics: StepMetrics, share: float) -> None:
        """A batch was learned from."""
        if int(share * 10) > self._tenth:
            self._tenth = int(share * 10)
            left = metrics.seconds * (1 - share) / share if share > 0 else math.inf
            self._print(describe(metrics) + (f", {left:.0f} s left" if 0 < left < math.inf else ""))

    def show_answers(self, num_done: int, num_answers: int) -> None:
        """A batch is being sampled."""
        if time.monotonic() - self._last_line > SILENCE_S:
            self._print(f"sampling: {num_done} of {num_answers} answers")

    def _print(self, line: str) -> None:
        self._last_line = time.monotonic()
        print(line, file=sys.stderr, flush=True)


class BarView(View):
    """Progress as a bar on a terminal."""

    def __init__(self, bar: Progress, rule: str) -> None:
        super().__init__()
        self._bar = bar
        self._task = bar.add_task(f"training ({rule}) ...", total=1.0)

    def show_step(self, metrics: StepMetrics, share: float) -> None:
        self._bar.update(self._task, description=describe(metrics), completed=min(share, 1.0))

    def show_answers(self, num_done: int, num_answers: int) -> None:
        if num_done < num_answers:
            self._bar.update(self._task, description=f"sampling: {num_done} of {num_answers} answers")


@contextmanager
def live(setup: TrainingSetup) -> Iterator[View]:
    """Progress on standard error, by what it is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield View()
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield BarView(bar, setup.rule.name)


def describe(metrics: StepMetrics) -> str:
    """One step in one line."""
    align = "" if math.isnan(metrics.sign_align) else f" · sign align {metrics.sign_align:.2f}"
    stale = f" · staleness {metrics.staleness_mean:.1f}" if metrics.staleness_max else ""
    dropped = f" · {metrics.num_dropped} dropped" if metrics.num_dropped else ""
    calls = f" · {metrics.requests_per_s:.0f} calls/s" if metrics.num_requests else ""
    hits = f" · {metrics.cache_hits} cache hits" if metrics.cache_hits else ""
    reward = f"{metrics.reward:.3f} ± {1.96 * metrics.reward_sem:.3f}"
    return (
        f"batch {metrics.step} · reward {reward} · loss {metrics.loss:.4f}{align}"
        f" · weights' entropy {metrics.weights_entropy:.2f}{stale}{calls}{hits}{dropped} · {metrics.seconds:.0f} s"
    )
