"""The figures that users read are those of the committed evidence."""

from __future__ import annotations

import json
from pathlib import Path

from tests.evidence_training import readme_table

ROOT = Path(__file__).parents[1]


def test_readme_shows_the_evidence() -> None:
    """The README's table is made from evidence/training.json."""
    results = json.loads((ROOT / "evidence" / "training.json").read_text(encoding="utf-8"))
    assert readme_table(results) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_promise_is_broken() -> None:
    """What `make evidence` found broken is not committed as if it were kept."""
    for name in ("chat", "training", "async", "speed", "faults"):
        results = json.loads((ROOT / "evidence" / f"{name}.json").read_text(encoding="utf-8"))
        assert results["broken"] == [], name
