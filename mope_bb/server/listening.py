"""Listening on a socket until somebody says stop; what is being answered then may end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mope_bb.errors import ConfigError
from mope_bb.server.answers import OpenAnswers

_TO_TELL_S: Final = 5.0
"""After the time for open answers: for telling them that it is over."""
HEAD_WITHIN_S: Final = 60.0
"""How long a request's head may take to come: a connection is not held for ever by one that says nothing."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port`; port 0 takes a free one. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"there is no address {host!r} here: {error}", hint="Check --host.") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"port {port} at {host!r} cannot be listened on: {error.strerror}",
            hint="Another server may be there: choose another --port, or 0 for a free one.",
        ) from None
    return found


def address_of(listener: socket.socket) -> str:
    """The address of a bound socket as clients write it."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


async def listen(
    app: ASGIApp,
    listener: socket.socket,
    open_answers: OpenAnswers,
    *,
    shutdown_timeout_s: float,
    on_ready: Callable[[Callable[[], None]], None],
) -> None:
    """Serve until SIGINT or SIGTERM; then take nothing new, and return when the open answers have ended.

    After `shutdown_timeout_s`, or a second signal, they end with an error. `on_ready` gets what a signal calls.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(shutdown_timeout_s + _TO_TELL_S),
        http=_Protocol,
        ws="none",
        # Longer than clients keep an idle connection: else they would send into one that is being closed.
        timeout_keep_alive=75,
        # Nobody may say of himself where he comes from.
        proxy_headers=False,
    )
    server = _Server(config, lambda: on_ready(stop))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if server.should_exit:
            open_answers.end()
        server.should_exit = True
        loop.call_later(shutdown_timeout_s, open_answers.end)

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: a test's
                loop.add_signal_handler(number, stop)
                stack.callback(loop.remove_signal_handler, number)
        await server.serve(sockets=[listener])


class _Protocol(H11Protocol):
    """uvicorn's, which waits for ever for the end of a head."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A request is expected."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """A part of a request, or of several."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._end_watch()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        # Idle is who has not sent a whole head. Between two requests, before a byte of the next one, uvicorn watches.
        if self.conn.their_state is not h11.IDLE:
            self._end_watch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_WITHIN_S, self.transport.close)

    def _end_watch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then it can be reached."""
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours: uvicorn's own would raise the signal again at the end, and so end in something else than status 0."""
        yield
