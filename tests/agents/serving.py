"""`mope-bb serve` as a process of its own, on a free port of loopback, and configurations for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

ENDS_WITHIN_S: Final = 30.0
"""A deadline against a defect."""


@contextmanager
def serve_mope(config_path: Path) -> Iterator[str]:
    """Serve a configuration until the block is left; gives the address without a path."""
    log_path = config_path.with_suffix(".log")
    command = [sys.executable, "-m", "mope_bb", "serve", "-c", str(config_path), "--port", "0", "--no-log"]
    with log_path.open("wb") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("Page: "), log_path.read_text(encoding="utf-8")
        yield line.removeprefix("Page: ").strip().rstrip("/")
    finally:
        server.terminate()
        try:
            server.wait(ENDS_WITHIN_S)
        finally:
            server.kill()
            server.stdout.close()
    # Whatever was asked, nothing is to go wrong within.
    assert "Traceback" not in (written := log_path.read_text(encoding="utf-8")), written
    assert server.returncode == 0, written


def write_config(path: Path, experts: Sequence[Mapping[str, Any]], **tables: Mapping[str, Any]) -> Path:
    """Write a `mope.toml` of these experts, without a cache, and with more tables."""
    parts = [("[[experts]]", expert) for expert in experts]
    parts += [(f"[{name}]", table) for name, table in {"cache": {"enabled": False}, **tables}.items()]
    lines: list[str] = []
    for header, table in parts:
        lines += [header, *(f"{name} = {_shown(value)}" for name, value in table.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _shown(value: object) -> str:
    # A JSON string, number or boolean is also a TOML one.
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(name)} = {_shown(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return json.dumps(value)
