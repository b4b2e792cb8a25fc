"""A longer line to real servers: bytes arrive `delay_s` later, each way. It reads nothing of what it carries.

So it costs little of the machine that it shares with what is measured, and replies that stream, stream through it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final
from urllib.parse import urlsplit

from tests.proxy import child

CHUNK: Final = 1 << 16


@contextmanager
def delayed(urls: Mapping[str, str], delay_s: float) -> Iterator[dict[str, str]]:
    """The same servers `delay_s` away, by a relay in a process of its own; name -> address in and out."""
    with child("tests.relay", {"urls": dict(urls), "delay_s": delay_s}) as found:
        yield found


async def relay(urls: Mapping[str, str], delay_s: float) -> None:
    """Print the new addresses as JSON and carry bytes until standard input ends."""
    servers, found = [], {}
    for name, url in urls.items():
        parts = urlsplit(url)

        async def connect(
            reader: asyncio.StreamReader,
            writer: asyncio.StreamWriter,
            host: str | None = parts.hostname,
            port: int | None = parts.port,
        ) -> None:
            with suppress(asyncio.CancelledError):  # the relay ends
                far_reader, far_writer = await asyncio.open_connection(host, port)
                await asyncio.gather(_carry(reader, far_writer, delay_s), _carry(far_reader, writer, delay_s))

        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        servers.append(server)
        found[name] = parts._replace(netloc=f"127.0.0.1:{server.sockets[0].getsockname()[1]}").geturl()
    print(json.dumps(found), flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while data := await reader.read(CHUNK):
            # Equal delays: what came first is written first.
            loop.call_later(delay_s, writer.write, data)
    loop.call_later(delay_s, writer.close)


if __name__ == "__main__":
    asyncio.run(relay(**json.loads(sys.stdin.readline())))
