"""An endpoint that repeats what it was sent, keys among it, in every way in which it can fail."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Literal

KEY: Final = "sk-canary-7f3a91c2d4e5b608"
PASSWORD: Final = "pw-canary-1c9e55d0a7b3"
TRACES: Final = (
    "canary",
    KEY[-8:],
    PASSWORD[-8:],
    base64.b64encode(f"me:{PASSWORD}".encode()).decode()[:16],
    base64.b64encode(KEY.encode()).decode()[:16],
)
"""What must stand nowhere: half a key is too much as well."""
Mode = Literal["401", "500", "garbage", "other JSON", "redirect", "reset"]
MODES: Final[tuple[Mode, ...]] = ("401", "500", "garbage", "other JSON", "redirect", "reset")


class EchoServer:
    """Answers every request by `mode`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.mode: Mode = "401"
        self.num_with_key = 0
        """Requests that brought a key or a password."""
        self.redirected = threading.Event()
        """A redirect was followed."""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Reply to one request."""
        sent = dict(handler.headers.items())
        self.num_with_key += any(secret in str(sent) for secret in (KEY, *TRACES[3:]))
        if handler.path.startswith("/elsewhere"):
            self.redirected.set()
        text = f"you sent {sent} to {handler.path}"
        if self.mode == "reset":
            handler.connection.close()
            return
        status = {"401": 401, "500": 500, "redirect": 302}.get(self.mode, 200)
        body = {"garbage": f"<html>{text}", "other JSON": json.dumps({"echo": sent, "choices": text, "content": text})}
        content = body.get(self.mode, json.dumps({"error": {"message": text, "code": sent}})).encode()
        handler.send_response(status)
        for name, value in sent.items():
            handler.send_header(f"x-echo-{name}", value)
        handler.send_header("x-request-id", str(sent))
        handler.send_header("location", f"/elsewhere?key={KEY}")
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def serve_echo() -> Iterator[EchoServer]:
    """Serve it on loopback."""
    echo: EchoServer

    class Handler(BaseHTTPRequestHandler):
        wbufsize = -1

        def do_GET(self) -> None:
            echo.answer(self)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            echo.answer(self)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Nothing."""

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):  # the connection was reset on purpose
                return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        echo = EchoServer(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield echo
        finally:
            server.shutdown()
            thread.join()
