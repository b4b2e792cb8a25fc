"""`make evidence`, the part on asking experts ahead: that it samples what lockstep samples.

Results: evidence/speed.json. Each part is kept when it is done, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from mope_bb.pcm import decode as decoding
from tests.evidence import FOLDER, machine_facts, tell
from tests.evidence_training import commit
from tests.speculation.measure import (
    MODES,
    SETUPS,
    THRESHOLD,
    WITHOUT_LISTS,
    Mode,
    Sampled,
    Setup,
    processes,
    sample,
    sample_widely,
)
from tests.speculation.wrong_rules import WRONG

NUM_ANSWERS: Final = 100_000


def main() -> None:
    """Measure, write, and fail if a promise is broken."""
    started = time.monotonic()
    folder = Path(".cache/evidence") / f"speed-{commit()}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = sys.argv[1:] or list(PARTS)
    results: dict[str, Any] = {"command": "make evidence", "machine": machine_facts()}
    for name, part in PARTS.items():
        file = folder / f"{name}.json"
        if name in chosen and not file.exists():
            tell(name)
            began = time.monotonic()
            found = {**part(), "seconds": round(time.monotonic() - began, 1)}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if file.exists():
            results[name] = json.loads(file.read_text(encoding="utf-8"))
    results["seconds"] = round(time.monotonic() - started, 1)
    results["broken"] = broken_promises(results)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tell(f"wrote {FOLDER / 'speed.json'}")
    sys.exit(f"broken: {results['broken']}" if results["broken"] else 0)


def broken_promises(results: dict[str, Any]) -> list[str]:
    """What docs/evidence.md promises and these results do not keep."""
    if missing := [name for name in PARTS if name not in results]:
        return [f"{name}: not measured" for name in missing]
    found = results["distribution"]
    return [
        *(f"distribution: {name}" for name, one in found["exact"].items() if one["p_value"] <= THRESHOLD),
        *(f"not found: {name}" for name, one in found["wrong_rules"].items() if one["p_value"] >= THRESHOLD),
    ]


# ---------------------------------------------------------------------- distribution


def check_distribution() -> dict[str, Any]:
    """Chi-square of whole answers of known experts against their exact distribution; and of wrong rules."""
    with processes() as workers:
        widely = partial(sample_widely, workers)
        exact = {
            f"{setup}; {mode}": tested(f"{setup}; {mode}", widely, SETUPS[setup], MODES[mode])
            for setup in SETUPS
            for mode in MODES
        }
        name = "linear, one expert without lists"
        exact[name] = tested(name, widely, WITHOUT_LISTS, MODES["auto"])
    wrong = {}
    for name, (rule, setup) in WRONG.items():
        with patch.object(decoding, "verify", rule):
            wrong[name] = tested(name, sample, setup, MODES["draft"])
    return {"threshold": THRESHOLD, "exact": exact, "wrong_rules": wrong}


def tested(name: str, take: Callable[[Setup, Mode, int], Sampled], setup: Setup, mode: Mode) -> dict[str, Any]:
    """The test of one way of sampling."""
    sampled = take(setup, mode, NUM_ANSWERS)
    row = {
        "num_answers": NUM_ANSWERS,
        **asdict(sampled.test(setup.exact())),
        "share_of_drafted_kept": round(sampled.share_kept, 3),
    }
    tell(f"{name}: {row}")
    return row


PARTS: Final[dict[str, Callable[[], dict[str, Any]]]] = {"distribution": check_distribution}

if __name__ == "__main__":
    main()
