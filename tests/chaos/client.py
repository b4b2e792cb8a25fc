"""A client in a process of its own, which asks what it is told to ask: its peak of memory is its own."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mope_bb.config import parse_config
from mope_bb.errors import MopeError
from mope_bb.providers.registry import open_expert
from mope_bb.types import Context, Message

CONTEXT: Final = Context((Message("user", "How do I fix a bike?"),))
TOP_K: Final = 20
MIB: Final = 2**20


async def ask_all(good: Mapping[str, Any], bad: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Ask an expert that answers, so that all is loaded, then those of `bad`, one after another; settings by name."""
    baseline = 0.0
    results: dict[str, Any] = {}
    for name, settings in {"": good, **bad}.items():
        expert = open_expert(parse_config({"experts": [settings]}).experts[0], None)
        began = time.monotonic()
        try:
            await expert.next_tokens(CONTEXT, top_k=TOP_K)
            outcome = "answer"
        except MopeError as error:
            outcome = type(error).__name__
        except Exception as error:  # noqa: BLE001  # told as it is
            outcome = f"untyped: {error!r}"
        seconds = time.monotonic() - began
        await expert.aclose()
        if not name:
            assert outcome == "answer", outcome
            baseline = forget_peak()
        else:
            peak = round(peak_mib() - baseline, 1)
            results[name] = {"outcome": outcome, "seconds": round(seconds, 2), "peak_mib": peak}
    return results


def forget_peak() -> float:
    """The present size; what loading the libraries has taken for a moment would hide later peaks below it."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> float:
    """The largest size that this process had since `forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / MIB


def main() -> None:
    """Ask, and tell, as JSON."""
    print(json.dumps(asyncio.run(ask_all(**json.loads(sys.stdin.readline())))), flush=True)


if __name__ == "__main__":
    main()
