"""What the parts of `make evidence` share that are measured piece by piece: an interrupted run goes on where it was."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.evidence import FOLDER, machine_facts, tell
from tests.evidence_training import commit

Part = Callable[[], dict[str, Any]]


def measure_parts(name: str, parts: Mapping[str, Part], broken: Callable[[dict[str, Any]], list[str]]) -> None:
    """Measure the parts that the command line names, all by default; write evidence/NAME.json; fail if one is broken.

    What this version of the code has measured before is taken as it is.
    """
    folder = Path(".cache/evidence") / f"{name}-{commit()}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = sys.argv[1:] or list(parts)
    results: dict[str, Any] = {"command": "make evidence", "machine": machine_facts()}
    for part, measure in parts.items():
        file = folder / f"{part}.json"
        if part in chosen and not file.exists():
            tell(part)
            began = time.monotonic()
            found = {**measure(), "seconds": round(time.monotonic() - began, 1)}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if file.exists():
            results[part] = json.loads(file.read_text(encoding="utf-8"))
    missing = [f"{part}: not measured" for part in parts if part not in results]
    results["broken"] = missing or broken(results)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tell(f"wrote {FOLDER / name}.json")
    sys.exit(f"broken: {results['broken']}" if results["broken"] else 0)
