"""Serving a zoo with llama.cpp's own server, one child process for all models, on loopback.

The child (`serve_child.py`) lives as long as the pipe to its standard input; leaving the context manager, an exception
or `kill -9` of this process all end it.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mope_bb.config import Config, parse_config
from mope_bb.errors import ConfigError, ProviderConnectionError
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.serve_child import MISSING_WHEEL
from mope_bb.zoo.wording import DIMENSIONS, style_sentences

READY_WITHIN_S = 60.0
"""Deadline for all models to be loaded; the tiny zoo takes a second."""
_STOP_WITHIN_S = 5.0

PRESETS: Mapping[str, Mapping[str, float]] = {
    "executive": {"concise": 0.5, "technical": 0.5},
    "teacher": {"simple": 0.4, "informative": 0.3, "friendly": 0.3},
    "handbook": {"technical": 0.5, "informative": 0.5},
    "curmudgeon": {"grumpy": 0.6, "concise": 0.4},
}


@dataclass(frozen=True)
class ZooServer:
    """A zoo that is being served."""

    zoo: Zoo
    base_urls: Mapping[str, str]
    """Name -> address of its server, without a path."""
    pid: int
    """Process id of the child."""
    log: Path
    """What llama.cpp prints; deleted when the child is stopped."""

    def config_data(self) -> dict[str, Any]:
        """The content of a `mope.toml` for these servers."""
        served = [name for name in DIMENSIONS if name in self.base_urls]
        return {
            "experts": [self._expert(name) for name in self.base_urls],
            "dimensions": dimension_tables(self.zoo, served),
            "pcm": {"path": str(self.zoo.pcm), "device": "cpu"},
            "cache": {"enabled": False},
            "presets": {name: dict(weights) for name, weights in PRESETS.items() if set(weights) <= set(served)},
        }

    def config(self) -> Config:
        """The configuration that uses these servers as experts."""
        return parse_config(self.config_data(), source="the zoo's configuration")

    def write_config(self, path: str | os.PathLike[str]) -> None:
        """Write `config()` as TOML; it holds as long as the servers run."""
        Path(path).write_text(_toml(self.config_data()), encoding="utf-8")

    def _expert(self, name: str) -> dict[str, Any]:
        role: dict[str, Any] = {"base": True} if name == "base" else {"dimension": name}
        return {
            "name": name,
            **role,
            "provider": "llamacpp",
            "base_url": self.base_urls[name],
            "model": name,
            "top_k": 20,
            "identity": f"sha256:{self.zoo.sha256(name)}",
        }


@contextmanager
def serve_zoo(
    zoo: Zoo, *, names: Sequence[str] | None = None, n_ctx_per_slot: int = 1024, parallel: int = 8
) -> Iterator[ZooServer]:
    """Serve the models `names` of `zoo` (default: all) until the block is left.

    Each model has `parallel` slots of `n_ctx_per_slot` tokens and one thread. Raises ConfigError when xllamacpp is
    not installed, ProviderConnectionError when the servers do not come up.
    """
    chosen = tuple(zoo.names if names is None else names)
    models = [{"name": name, "path": str(zoo.gguf(name))} for name in chosen]
    folder = zoo.root if os.access(zoo.root, os.W_OK) else None  # else the system's temporary folder
    descriptor, log = tempfile.mkstemp(prefix="serve-", suffix=".log", dir=folder)
    os.close(descriptor)
    order = {"log": log, "models": models, "n_ctx_per_slot": n_ctx_per_slot, "parallel": parallel}
    child = _spawn()
    try:
        addresses = _start(child, order)
        yield ZooServer(zoo, {name: addresses[name] for name in chosen}, child.pid, Path(log))
    finally:
        _stop(child)
        Path(log).unlink(missing_ok=True)


def dimension_tables(zoo: Zoo, names: Sequence[str]) -> dict[str, Any]:
    """The `[dimensions]` of a zoo: sentences, wordings and reward models."""
    tables: dict[str, Any] = {}
    for name in names:
        wordings = style_sentences(name)
        tables[name] = {"text": wordings[0], "wordings": list(wordings)}
        if name in zoo.rewards:
            tables[name]["reward"] = {"kind": "classifier", "path": str(zoo.reward_model(name)), "device": "cpu"}
    return tables


def _spawn() -> subprocess.Popen[bytes]:
    """Start the child; in a session of its own, so that Ctrl-C reaches us first and we stop it in order."""
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package_parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "mope_bb.zoo.serve_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def _start(child: subprocess.Popen[bytes], order: dict[str, Any]) -> dict[str, str]:
    """Tell the child what to serve and wait for the addresses."""
    assert child.stdin is not None and child.stdout is not None
    with suppress(BrokenPipeError):  # a child that is dead already is explained below
        child.stdin.write(json.dumps(order).encode() + b"\n")
        child.stdin.flush()
    answers: queue.Queue[bytes] = queue.Queue()
    stdout = child.stdout
    threading.Thread(target=lambda: answers.put(stdout.readline()), daemon=True).start()
    try:
        line = answers.get(timeout=READY_WITHIN_S)
    except queue.Empty:
        raise _failure(f"the zoo's servers were not ready within {READY_WITHIN_S:g} s", order["log"]) from None
    if line:
        addresses: dict[str, str] = json.loads(line)
        return addresses
    try:
        status = child.wait(_STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        status = None
    if status == MISSING_WHEEL:
        raise ConfigError("serving the zoo needs 'xllamacpp'", hint="Install the package xllamacpp.")
    raise _failure(f"the zoo's server process ended with status {status}", order["log"])


def _failure(message: str, log: str) -> ProviderConnectionError:
    """The error with the end of the log, because the log is deleted."""
    with suppress(OSError):
        lines = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
        message = "\n  ".join([message + "; its log ends with:", *lines]) if lines else message
    return ProviderConnectionError(message, provider="llamacpp", hint="Is there enough memory for these models?")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Close the pipe, which ends the child; kill it if it does not."""
    assert child.stdin is not None and child.stdout is not None
    with suppress(BrokenPipeError):
        child.stdin.close()
    try:
        child.wait(_STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


def _toml(data: dict[str, Any]) -> str:
    """The configuration as TOML. A JSON string, number or boolean is also a TOML one."""

    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{ " + ", ".join(f"{key} = {shown(inner)}" for key, inner in value.items()) + " }"
        return json.dumps(value, ensure_ascii=False)

    def table(header: str, values: Mapping[str, Any]) -> str:
        lines = (f"{key} = {shown(value)}" for key, value in values.items())
        return "\n".join([header, *lines]) + "\n"

    parts = [table("[[experts]]", expert) for expert in data["experts"]]
    parts += [table(f"[dimensions.{name}]", section) for name, section in data["dimensions"].items()]
    parts += [table(f"[{name}]", data[name]) for name in ("pcm", "cache")]
    parts += [table(f"[presets.{name}]", weights) for name, weights in data["presets"].items()]
    return "\n".join(parts)
