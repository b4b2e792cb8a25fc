"""`make evidence`, the part on bad days: faults, storms, kills, fuzzing and a soak, larger than tests have time for.

Results: evidence/faults.json. Each part is kept when it is done, so that an interrupted run goes on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from mope_bb.zoo.build import build_zoo
from tests.chaos import soak as soaking
from tests.chaos.cache_kills import measure_kills
from tests.chaos.hostile import TIMEOUT_S, measure_hostile
from tests.chaos.measure import measure_mixed_faults
from tests.chaos.pacing import measure_moving_limit, measure_retry_after
from tests.chaos.server import in_process
from tests.chaos.truth import Truth
from tests.evidence_parts import measure_parts
from tests.fuzz.measure import measure as measure_fuzz

NUM_CALLS: Final = 100_000
FAULT_RATE: Final = 0.1
NUM_INPUTS: Final = 1_000_000
PEAK_MIB: Final = 200.0
SOAK_S: Final = 480.0


def main() -> None:
    """Measure, write, and fail if a promise is broken."""
    measure_parts("faults", {part: partial(wrapped, measure) for part, measure in PARTS.items()}, broken_promises)


def wrapped(measure: Callable[[], Any]) -> dict[str, Any]:
    """Some parts have a list of results."""
    return {"result": measure()}


def broken_promises(results: dict[str, Any]) -> list[str]:
    """What docs/promises.md says and these results do not keep."""
    found = {name: results[name]["result"] for name in PARTS}
    mixed = found["mixed_faults"]
    return [
        *(f"mixed faults, {name}: {mixed[name]}" for name in ("num_wrong", "num_untyped", "num_hangs") if mixed[name]),
        *(["a redirect was followed"] if mixed["num_elsewhere"] else []),
        *(f"asked too early after {name}" for name, one in found["retry_after"].items() if one["too_early"]),
        *(
            f"limit {one['limit']}: {one['share_of_limit']} of it, {one['rejected_share']} rejected"
            for one in found["moving_limit"]
            if one["share_of_limit"] < 0.8 or one["rejected_share"] > 0.05 or one["errors"]
        ),
        *(
            f"{name}: {one}"
            for name, one in found["hostile"].items()
            if one["peak_mib"] > PEAK_MIB or not one["outcome"].endswith("Error") or one["seconds"] > TIMEOUT_S + 1.0
        ),
        *([] if found["cache_kills"]["is_sound"] else ["cache_kills"]),
        *(["fuzzing"] if found["fuzzing"]["failures"] else []),
        *soaking.broken(found["soak"]),
    ]


@contextmanager
def chaos() -> Iterator[tuple[Truth, str]]:
    """A quickly trained model, and the chaos server before it, in a process of its own."""
    home = os.environ.get("MOPE_BB_TEST_HOME")
    model = build_zoo(size="nano", home=Path(home) if home else None).folder("concise")
    with in_process(model) as url:
        yield Truth(model), url


def check_mixed_faults() -> dict[str, Any]:
    """Calls of every kind in every dialect, one request in ten failing in one of all ways."""
    with chaos() as (truth, url):
        return asyncio.run(measure_mixed_faults(truth, url, num_calls=NUM_CALLS, rate=FAULT_RATE))


def check_retry_after() -> dict[str, Any]:
    """When a question comes again, after each form of `Retry-After`."""
    with chaos() as (truth, url):
        return asyncio.run(measure_retry_after(truth, url))


def check_moving_limit() -> list[dict[str, Any]]:
    """A hidden limit that moves: throughput against it, and what is rejected."""
    with chaos() as (truth, url):
        return asyncio.run(measure_moving_limit(truth, url))


def check_hostile() -> dict[str, Any]:
    """Memory and time that hostile replies take."""
    with chaos() as (truth, url):
        return measure_hostile(truth, url)


PARTS: Final[dict[str, Callable[[], Any]]] = {
    "mixed_faults": check_mixed_faults,
    "retry_after": check_retry_after,
    "moving_limit": check_moving_limit,
    "hostile": check_hostile,
    "cache_kills": measure_kills,
    "fuzzing": lambda: measure_fuzz(NUM_INPUTS, 0),
    "soak": lambda: soaking.in_child(SOAK_S),
}

if __name__ == "__main__":
    main()
