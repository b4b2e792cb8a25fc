"""The server's end of one request: whole replies by ASGI, and the socket itself for what no server would do."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
FULL: Final = 2**18
"""Bytes that wait for a client; then it is waited for."""
JSON: Final[Mapping[str, str]] = {"content-type": "application/json"}


class Line:
    """What a fault may do. After `write` the line must be ended by `hang_up`, `reset` or `silence`."""

    def __init__(self, transport: asyncio.Transport, receive: Receive, send: Send) -> None:
        self._transport = transport
        self._receive = receive
        self._send = send

    @property
    def is_gone(self) -> bool:
        """The client has hung up, or this end has."""
        return self._transport.is_closing()

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """A whole reply; the connection stays open."""
        await self._start(status, {**headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, status: int, headers: Mapping[str, str], parts: AsyncIterable[bytes]) -> None:
        """A reply in parts, as fast as the client reads them. Without a content-length it is sent in chunks."""
        await self._start(status, headers)
        async for part in parts:
            if self.is_gone:
                return
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
            # Sending waits only where the socket is full.
            await asyncio.sleep(0)
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        wired = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": wired})

    def write(self, data: bytes) -> None:
        """Bytes as they are."""
        self._transport.write(data)

    async def flood(self, part: bytes) -> None:
        """The same bytes again and again, as fast as the client takes them."""
        while not self.is_gone:
            is_full = self._transport.get_write_buffer_size() > FULL
            if not is_full:
                self._transport.write(part)
            await asyncio.sleep(0.001 if is_full else 0.0)

    async def hang_up(self) -> None:
        """The end, as the operating system announces it (FIN), after all that was written."""
        self._transport.close()
        await self._until_gone()

    async def reset(self) -> None:
        """The end without a farewell (RST)."""
        connection = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
        await self._until_gone()

    async def silence(self) -> None:
        """Nothing, until the client gives up."""
        await self._until_gone()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def head(status: int, headers: Mapping[str, str]) -> bytes:
    """The head of a reply as bytes, without the empty line at its end."""
    lines = [f"HTTP/1.1 {status} Chaos", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n"


def whole(status: int, headers: Mapping[str, str], body: bytes) -> bytes:
    """A whole reply as bytes."""
    return head(status, {**headers, "content-length": str(len(body))}) + b"\r\n" + body
