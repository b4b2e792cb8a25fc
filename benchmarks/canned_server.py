"""A server that answers every next-token question with one reply in llama.cpp's shape, after a delay.

It is written on asyncio's protocols, and looks into no question, so that it costs little of the machine that it shares
with the client that is measured. Reads its order, a line of JSON with `delay_s`, from standard input.
"""

from __future__ import annotations

import asyncio
import json
import string
import sys
from typing import Any, Final

import orjson

NUM_IDS: Final = 300
"""Length of the prompt that the reply claims to have read."""
END: Final = "</s>"
END_ID: Final = 2


def build_reply() -> bytes:
    """One position with the 20 best tokens."""
    entries: list[dict[str, Any]] = [
        {"id": 100 + rank, "token": f" {letter}", "bytes": list(f" {letter}".encode()), "logprob": -1.5 - 0.31 * rank}
        for rank, letter in enumerate(string.ascii_lowercase[:20])
    ]
    position = {**entries[0], "top_logprobs": entries}
    return orjson.dumps(
        {
            "index": 0,
            "content": " a",
            "tokens": [100],
            "id_slot": 0,
            "stop": True,
            "model": "canned",
            "tokens_predicted": 1,
            "tokens_evaluated": NUM_IDS,
            "truncated": False,
            "stop_type": "limit",
            "completion_probabilities": [position],
        }
    )


def answer(path: bytes, body: bytes, reply: bytes) -> bytes:
    """What a route says; those beside `/completion` are asked when a client sets up."""
    if path == b"/completion":
        return reply
    if path == b"/tokenize":
        asked = orjson.loads(body)
        is_end = asked["content"] == END and asked["parse_special"]
        return orjson.dumps({"tokens": [END_ID] if is_end else [11, 12, 13]})
    if path == b"/props":
        return orjson.dumps({"eos_token": END})
    return orjson.dumps({"data": [{"id": "canned", "meta": {"n_vocab": 32000}}]})


class Connection(asyncio.Protocol):
    """Requests of one client, one after the other."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._reply = build_reply()
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        path = head.split(b" ", 2)[1]
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line[:15].lower() == b"content-length:"),
            0,
        )
        if len(rest) < length:
            return
        self._received = rest[length:]
        content = answer(path, rest[:length], self._reply)
        header = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content)
        asyncio.get_running_loop().call_later(self._delay_s, self._send, header + content)

    def _send(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)


async def serve(delay_s: float) -> None:
    """Print the port as JSON and answer until standard input ends."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(delay_s), "127.0.0.1", 0, backlog=4096)
    print(json.dumps(server.sockets[0].getsockname()[1]), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(**json.loads(sys.stdin.readline())))
