"""`make evidence`: what takes longer than a test run, on the default zoo; results as JSON in `evidence/`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mope_bb.zoo.demo import build_with_bar
from mope_bb.zoo.serving import serve_zoo
from tests.exactness.measure import TOLERANCES, Measurement, kinds_of
from tests.greedy import compare_greedy

FOLDER = Path(__file__).parents[1] / "evidence"
NUM_STEPS = 2000
NUM_PROMPTS = 100


def main() -> None:
    """Measure, write, and fail if a promise is broken."""
    started = time.monotonic()
    built = build_with_bar(home=Path(os.environ["MOPE_BB_TEST_HOME"]) if "MOPE_BB_TEST_HOME" in os.environ else None)
    results: dict[str, Any] = {"command": "make evidence", "machine": machine_facts(), "zoo": built.root.name}
    broken: list[str] = []
    with serve_zoo(built) as server:
        for setup, tolerance in TOLERANCES.items():
            tell(f"exactness, experts {setup}: {NUM_STEPS} steps")
            measurement = Measurement(server, kinds_of(setup), noisy_engine=setup != "local")
            found = asyncio.run(measurement.run(NUM_STEPS, progress=tell))
            results[f"exactness_{setup}"] = {
                **{key: value for key, value in dataclasses.asdict(found).items() if key not in ("missed_mass", "tv")},
                "missed_mass": {k: spread(values) for k, values in found.missed_mass.items()},
                "total_variation": {k: spread(values) for k, values in found.tv.items()},
                "tolerance": dataclasses.asdict(tolerance),
            }
            # The promise is about the distribution. The logprob gap is reported beside it: under the product rule the
            # experts' own rounding is multiplied by up to 2n - 1.
            if found.probability_gap > tolerance.full or found.tv_excess > tolerance.tv_slack:
                broken.append(f"exactness_{setup}")
        for setup in ("local", "llamacpp"):
            tell(f"greedy, experts {setup}: {NUM_PROMPTS} prompts")
            greedy = compare_greedy(server, setup, num_prompts=NUM_PROMPTS)
            results[f"greedy_{setup}"] = dataclasses.asdict(greedy)
            if greedy.num_different:
                broken.append(f"greedy_{setup}")
    results["help_seconds"] = spread([time_help() for _ in range(5)])
    results["seconds"] = round(time.monotonic() - started, 1)
    results["broken"] = broken
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "chat.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    tell(f"wrote {FOLDER / 'chat.json'}")
    sys.exit(f"broken: {broken}" if broken else 0)


def tell(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict[str, float]:
    """Mean, median and largest."""
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "max": max(values)}


def time_help() -> float:
    """Wall seconds of `mope-bb --help`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mope_bb", "--help"], check=True, capture_output=True)
    return time.perf_counter() - started


def machine_facts() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers
    import xllamacpp

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llama.cpp": str(xllamacpp.BUILD_INFO),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
