"""`make evidence`, the part on asking experts ahead: that it samples what lockstep samples.

Results: evidence/speed.json. Each part is kept when it is done, so that an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Final
from unittest.mock import patch

from mope_bb.pcm import drafting
from tests.evidence import tell
from tests.evidence_parts import measure_parts
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
    measure_parts("speed", PARTS, broken_promises)


def broken_promises(results: dict[str, Any]) -> list[str]:
    """What docs/evidence.md promises and these results do not keep."""
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
        with patch.object(drafting, "verify", rule):
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
