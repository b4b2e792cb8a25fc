"""The folder of a training run, for the page: its metrics, and the report of its evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from mope_bb.errors import ConfigError

METRICS: Final = "metrics.jsonl"
REPORT: Final = "report.html"
MAX_ROWS: Final = 500


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Files that a run may still be writing."""

    path: Path

    def check(self) -> None:
        """Raise ConfigError where there is no run."""
        if not (self.path / METRICS).is_file() and not (self.path / REPORT).is_file():
            raise ConfigError(
                f"{str(self.path)!r} holds neither {METRICS} nor {REPORT}",
                hint="Give the folder that `mope-bb train` or `mope-bb eval` wrote.",
            )

    @property
    def report(self) -> Path | None:
        """The evaluation's page, if there is one."""
        found = self.path / REPORT
        return found if found.is_file() else None

    def describe(self) -> dict[str, Any]:
        """Name, metrics and whether there is a report."""
        return {
            "name": self.path.resolve().name,
            "metrics": _thinned(_read_rows(self.path / METRICS)),
            "has_report": self.report is not None,
        }


def _read_rows(path: Path) -> list[dict[str, float]]:
    """The finite numbers of each row; a row that is being written, or torn, is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append({name: value for name, value in row.items() if _is_number(value)})
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """At most MAX_ROWS, evenly, the last one among them."""
    stride = math.ceil(len(rows) / MAX_ROWS)
    return list(rows[::-1][:: stride or 1][::-1])
