"""A served nano zoo, and a stand-in for llama.cpp that misbehaves on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mope_bb.zoo.serving import ZooServer
from tests.command_line import Run

__all__ = ["Run"]


@pytest.fixture(scope="session")
def zoo_config(nano_experts: ZooServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a `mope.toml` of the served nano zoo."""
    path = tmp_path_factory.mktemp("config") / "mope.toml"
    nano_experts.write_config(path)
    return str(path)


@dataclass
class StandIn:
    """A server with llama.cpp's routes whose tokens are bytes and whose only answer is "ok."."""

    config: str = ""
    gives_logprobs: bool = True
    hangs: bool = False
    breaks_after: int | None = None
    """How many pieces of an answer it gives before it fails."""
    asked: threading.Event = field(default_factory=threading.Event)
    """Set when a distribution is asked for."""
    released: threading.Event = field(default_factory=threading.Event)

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of one route; None for a failure."""
        if path == "/tokenize":
            is_end = body["parse_special"] and body["content"] == "</s>"
            return {"tokens": [256] if is_end else list(body["content"].encode())}
        if path == "/apply-template":
            return {"prompt": "".join(f"{message['content']}\n" for message in body["messages"])}
        if path != "/completion":
            return {"eos_token": "</s>"}
        self.asked.set()
        if self.hangs:
            self.released.wait()
        return self._complete(body["prompt"])

    def _complete(self, prompt: list[int]) -> Any:
        position = prompt[::-1].index(ord("\n"))
        if position == self.breaks_after:
            return None
        piece = [b"ok."[position]] if position < 3 else []
        entry = {"id": piece[0] if piece else 256, "bytes": piece, "logprob": -0.01}
        found = [{**entry, "top_logprobs": [entry]}] if self.gives_logprobs else []
        return {"content": "", "tokens_evaluated": len(prompt), "completion_probabilities": found}


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    """A stand-in for llama.cpp and the path of a `mope.toml` for it."""
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        wbufsize = -1  # head and body in one packet: two would wait for each other

        def do_GET(self) -> None:
            self._answer(stand_in.reply(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._answer(stand_in.reply(self.path, body))

        def _answer(self, reply: Any) -> None:
            self.send_response(500 if reply is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Nothing."""

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # the client left
                return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        stand_in.config = write_config(tmp_path, port=server.server_port)
        yield stand_in
        stand_in.released.set()
        server.shutdown()
        thread.join()


def write_config(folder: Path, *, port: int) -> str:
    """A `mope.toml` of one expert, "solo", at this port; it is asked once only."""
    path = folder / "mope.toml"
    path.write_text(
        f'[[experts]]\nname = "solo"\ndimension = "concise"\nprovider = "llamacpp"\n'
        f'base_url = "http://127.0.0.1:{port}"\nmax_retries = 0\n[cache]\nenabled = false\n'
    )
    return str(path)


@pytest.fixture
def scripted_config(tmp_path: Path) -> str:
    """A `mope.toml` whose experts need no server."""
    path = tmp_path / "scripted.toml"
    path.write_text(
        '[[experts]]\nname = "left"\ndimension = "concise"\nprovider = "scripted"\n'
        'script = [{"Hi" = 0.9, "Yo" = 0.1}, {" there" = 1.0}]\n'
        '[[experts]]\nname = "right"\ndimension = "friendly"\nprovider = "scripted"\n'
        'script = [{"Hi" = 0.2, "Yo" = 0.8}, {" there" = 1.0}]\n'
        "[cache]\nenabled = false\n"
    )
    return str(path)


@pytest.fixture
def no_server_config(tmp_path: Path) -> str:
    """A `mope.toml` that names a port where nobody listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    return write_config(tmp_path, port=port)
