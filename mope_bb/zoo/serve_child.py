"""The process that hosts llama.cpp's servers: `python -m mope_bb.zoo.serve_child`, started by `serving.py`.

It reads one JSON line (what to serve), answers with one JSON line (the addresses, or an error) and lives until its
standard input ends. The parent holds the other end of that pipe: however the parent dies, the kernel closes it, so no
orphan stays.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

MISSING_WHEEL = 3
"""Exit status when xllamacpp cannot be imported."""


def main() -> None:
    """Serve until standard input ends."""
    order = json.loads(sys.stdin.buffer.readline() or b"{}")
    if not order:  # the parent died before it said what to serve
        return
    answers = _redirect_output(order["log"])
    # Watch from here on: loading a model blocks, and the parent may die meanwhile.
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        import xllamacpp
    except ImportError as error:
        print(f"xllamacpp cannot be imported: {error}", file=sys.stderr, flush=True)
        os._exit(MISSING_WHEEL)
    servers = {model["name"]: _start(xllamacpp, model, order) for model in order["models"]}
    with os.fdopen(answers, "w", encoding="utf-8") as stream:
        stream.write(json.dumps({name: server.listening_address for name, server in servers.items()}) + "\n")
    threading.Event().wait()


def _redirect_output(log: str) -> int:
    """Send what C++ and Python print to the log file; return a descriptor of the true standard output."""
    answers = os.dup(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    return answers


def _leave_with_parent() -> None:
    """End the process at once when standard input ends; llama.cpp has nothing to save.

    A process that the parent forked holds the pipe open after the parent's death, so the parent's id is watched too.
    """
    parent = os.getppid()
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    while os.read(0, 4096):
        pass
    os._exit(0)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def _start(xllamacpp: Any, model: dict[str, str], order: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = model["path"]
    params.model_alias = {model["name"]}
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # the system gives a free one, which `listening_address` tells
    params.n_parallel = order["parallel"]
    params.n_ctx = order["n_ctx_per_slot"] * order["parallel"]
    params.kv_unified = False  # every slot has its own context, so one long prompt cannot take the others' room
    params.ctx_shift = False  # too long a prompt is an error, never silently cut
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = 1
        threads.poll = 0  # no busy waiting: seven servers share few cores
    params.n_threads_http = max(4, order["parallel"])
    params.endpoint_slots = True
    params.use_jinja = True
    params.fit_params = False
    params.cache_ram_mib = 0
    params.n_gpu_layers = 0
    params.verbosity = 2  # warnings and errors: a line per request would fill the disk
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
