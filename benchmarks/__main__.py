"""All benchmarks one after the other, then one table of what they claim: `python -m benchmarks [--table]`.

`--table` prints the table of the committed results and measures nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Final

from benchmarks.claims import Claim, table
from tests.evidence import tell

NAMES: Final = (
    "decoding",
    "rollouts",
    "merge",
    "overlap",
    "context",
    "local",
    "client",
    "async_training",
    "serving",
    "gpu",
)
"""Modules of this package, each with `claims(results)`; its results are the JSON file of the same name."""


def main() -> None:
    """Measure, unless `--table` is given, and print the table."""
    if "--table" not in sys.argv[1:]:
        for name in NAMES:
            tell(f"benchmarks.{name}")
            # A process each: no benchmark inherits another's threads, caches or memory.
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    print(table([claim for name in NAMES for claim in claims_of(name)]))


def claims_of(name: str) -> list[Claim]:
    """What one benchmark's results say; nothing where no machine has run it yet, as that of the GPU."""
    path = Path(__file__).with_name(f"{name}.json")
    if not path.exists():
        return []
    results = json.loads(path.read_text(encoding="utf-8"))
    found: list[Claim] = import_module(f"benchmarks.{name}").claims(results)
    return found


if __name__ == "__main__":
    main()
