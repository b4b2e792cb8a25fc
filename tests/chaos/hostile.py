"""Replies that are after the client's memory and time: what each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tests.chaos.faults import HOSTILE
from tests.chaos.server import Plan, make_plan
from tests.chaos.truth import Truth
from tests.proxy import child

DIALECTS: Final = ("vllm", "openai")
"""Our own client, and OpenAI's."""
TIMEOUT_S: Final = 3.0


def measure_hostile(
    truth: Truth,
    url: str,
    *,
    names: Sequence[str] = HOSTILE,
    dialects: Sequence[str] = DIALECTS,
    together: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """For each dialect and fault: the outcome, how long it took, and the client's peak of memory above its baseline.

    Each has a client of its own, so that peaks do not hide each other; `together` they have one for each dialect, and
    the last peak is that of all.
    """
    settings = {"timeout_s": timeout_s, "attempt_timeout_s": timeout_s, "max_retries": 1}
    lives = {name.replace(" ", "-"): name for name in names}
    make_plan(url, Plan(fault_of_life=lives))
    found: dict[str, Any] = {}
    for dialect in dialects:
        good = truth.config(dialect, url, "good", **settings).model_dump(exclude_defaults=True)
        bad = {
            name: truth.config(dialect, url, life, **settings).model_dump(exclude_defaults=True)
            for life, name in lives.items()
        }
        for asked in [bad] if together else [{name: one} for name, one in bad.items()]:
            with child("tests.chaos.client", {"good": good, "bad": asked}) as results:
                found |= {f"{dialect}: {name}": result for name, result in results.items()}
    return found
