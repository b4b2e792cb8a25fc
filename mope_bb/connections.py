"""Connections that are kept for the next request, and those that must not be."""

from __future__ import annotations

from typing import Any, Final

import aiohttp
import httpx
from aiohttp import connector

KEEP_ALIVE_S: Final = 4.0
"""Below the 5 s after which uvicorn and llama.cpp close a connection that is not used: we must not write to it then."""


class QuietConnector(aiohttp.TCPConnector):
    """Never reuses a connection on which something came unasked: it would be taken for the answer to the next question.

    aiohttp looks for that when a connection is given back, and not when it is taken (`_get`, which is its own: a test
    in tests/chaos notices if it changes).
    """

    async def _get(self, *args: Any, **options: Any) -> connector.Connection | None:
        while (found := await super()._get(*args, **options)) is not None:
            if found.protocol is not None and not found.protocol.should_close:
                return found
            found.close()
        return None


def open_connector(max_connections: int, *, is_encrypted: bool) -> aiohttp.TCPConnector:
    """For at most `max_connections` at a time; it belongs to the running event loop."""
    return QuietConnector(
        limit=max_connections,
        keepalive_timeout=KEEP_ALIVE_S,
        ssl=httpx.create_ssl_context() if is_encrypted else True,
    )
