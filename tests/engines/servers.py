"""Real servers as child processes on loopback: vLLM on CPU and `transformers serve`, from the environment `.venv-vllm`.

`make vllm-env` builds that environment; MOPE_BB_VLLM_PYTHON names the interpreter of another one. A server has a
process group of its own and is killed with it when its block is left, by an exception too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_WITHIN_S = 300.0
"""Deadline for a start; half a minute on two quiet cores."""
API_KEY = "sesame"
"""Of the servers that the tests lock."""
_POLL_EVERY_S = 0.25
_LOG_LINES_SHOWN = 60

_ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is half of the machine's memory
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_DROPPED = ("VLLM_API_KEY", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
"""Variables of the caller that would change what the servers do; without bytecode every start takes a minute."""


@dataclass(frozen=True)
class EngineServer:
    """A real server."""

    base_url: str
    """Without a path."""
    name: str
    """What the model is called there."""
    folder: Path
    """The Hugging Face folder that is served."""
    adapters: Mapping[str, Path]
    """LoRA adapters of the model that are served beside it, by name."""


class ServerFailedError(RuntimeError):
    """A server did not come up; the message ends with its log."""


def vllm_python() -> Path:
    """The interpreter of the environment with vLLM."""
    chosen = os.environ.get("MOPE_BB_VLLM_PYTHON")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "python"


@contextmanager
def serve_vllm(
    model_dir: Path,
    *,
    name: str,
    runner: str | None = None,
    lora: Mapping[str, Path] | None = None,
    max_logprobs: int = 100,
    max_model_len: int = 512,
    has_spare_slot: bool = True,
    extra: Sequence[str] = (),
) -> Iterator[str]:
    """Serve a Hugging Face folder as `name` with vLLM and yield the address, without a path.

    runner: "pooling" for a reward model.
    lora: peft folders of adapters of the model, of rank 16 at most, by the names they are served with.
    max_logprobs: the longest list that may be asked for; -1 is the whole vocabulary, vLLM's own default is 20.
    has_spare_slot: on CPU vLLM 0.32 computes requests to the base, where they meet others in a batch, with what is in
        the last slot for adapters (vllm-project/vllm#48421): it must be empty.
    extra: more of vLLM's own flags.
    Raises ServerFailedError.
    """
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir), "--served-model-name", name]
    command += ["--dtype", "float32", "--max-model-len", str(max_model_len), "--max-num-seqs", "16"]
    command += ["--max-logprobs", str(max_logprobs), "--enable-prefix-caching", "--enforce-eager"]
    command += ["--runner", runner] if runner else []
    if lora:
        command += ["--enable-lora", "--max-loras", str(len(lora) + has_spare_slot), "--lora-modules"]
        command += [f"{adapter}={folder}" for adapter, folder in lora.items()]
    with _serve([*command, *extra], what="vLLM") as url:
        yield url


@contextmanager
def serve_transformers(model_dir: Path, *, extra: Sequence[str] = ()) -> Iterator[str]:
    """Serve a Hugging Face folder with `transformers serve` and yield the address, without a path.

    The model's name is the folder. This server gives no logprobs. Raises ServerFailedError.
    """
    command = ["-m", "transformers.cli.transformers", "serve", str(model_dir), "--device", "cpu", "--dtype", "float32"]
    # `/v1/models` lists what is in the hub's cache: an empty one, whatever this machine has downloaded.
    with (
        tempfile.TemporaryDirectory(prefix="mope-hub-") as cache,
        _serve([*command, *extra], what="transformers serve", more={"HF_HUB_CACHE": cache}) as url,
    ):
        yield url


def exchange(url: str, body: Any = None, *, api_key: str | None = None, timeout_s: float = 120.0) -> tuple[int, Any]:
    """Status and decoded answer of one request: GET, or POST when there is a body. Past any proxy."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with _opener().open(request, timeout=timeout_s) as response:
            return response.status, _decoded(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _decoded(error.read())


@contextmanager
def _serve(arguments: Sequence[str], *, what: str, more: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run the interpreter with `arguments`, wait until the server answers, kill all of it at the end.

    more: further environment variables.
    """
    python = vllm_python()
    if not python.exists():
        raise ServerFailedError(f"{what} needs {python}: run `make vllm-env`, or set MOPE_BB_VLLM_PYTHON")
    port = _free_port()
    environment = {key: value for key, value in os.environ.items() if key not in _DROPPED}
    environment |= {**_ENVIRONMENT, **(more or {})}
    with tempfile.NamedTemporaryFile(prefix="mope-engine-", suffix=".log") as log:
        child = subprocess.Popen(
            [str(python), *arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(child, url, what=what, log=Path(log.name))
            yield url
        finally:
            _kill(child)


def _wait_until_ready(child: subprocess.Popen[bytes], url: str, *, what: str, log: Path) -> None:
    """Return when `/health` answers; raise with the log when the child ends or the deadline passes."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise _failure(f"{what} ended with status {child.returncode}", log)
        if is_healthy(url):
            return
        time.sleep(_POLL_EVERY_S)
    raise _failure(f"{what} was not ready within {READY_WITHIN_S:g} s", log)


def is_healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        status, _ = exchange(url + "/health", timeout_s=5.0)
    except OSError:  # nobody listens yet, or it is too busy to answer
        return False
    return status == 200


def _failure(message: str, log: Path) -> ServerFailedError:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
    return ServerFailedError("\n  ".join([message + "; its log ends with:", *lines]))


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the whole group: vLLM's engine is a child of the child. The group outlives a leader that has died."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _decoded(data: bytes) -> Any:
    """JSON, or the text where it is none."""
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
