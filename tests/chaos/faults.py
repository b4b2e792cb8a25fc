"""All faults by name: what each does to a request, and what may come of it."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import random
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from tests.chaos.damage import DAMAGES, Damage, ask_for_more, features_of, other_numbers
from tests.chaos.line import JSON, Line, head, whole

Outcome = Literal["retried", "refused", "right", "short"]
"""What becomes of a question: it is asked again, and fails where all tries fail; it fails at once; its answer is the
model's; its answer is the model's as far as it goes, with fewer pieces than were asked for. Errors are typed."""
NUM_MORE: Final = 5
DRIP_S: Final = 0.05
BOMB_BYTES: Final = 256 * 2**20
NUM_BRACKETS: Final = 10**6
HTML: Final = b"<!doctype html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"


@dataclass(frozen=True)
class Exchange:
    """A request with its good reply."""

    target: str
    """The path of the request, with its query."""
    body: Any
    answer: Callable[[Any], bytes]
    """From a body to the JSON of the good reply; a status that is not 200 is no matter for faults."""
    is_shown: bool
    """Whether an id of the good reply was shown to this expert before, with its bytes."""

    @property
    def good(self) -> bytes:
        """The good reply to this request."""
        return self.answer(self.body)

    @property
    def features(self) -> frozenset[str]:
        """See `features_of`."""
        return features_of(json.loads(self.good)) | ({"shown"} if self.is_shown else set())


Act = Callable[[Line, Exchange, random.Random], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """One way in which an endpoint fails."""

    act: Act
    outcomes: frozenset[Outcome]
    """What is acceptable; nothing else is."""
    needs: frozenset[str] = frozenset()
    """What the good reply must have, or this would be no fault."""
    weight: float = 1.0
    """How often it is chosen where faults are mixed."""


# ------------------------------------------------------- status and headers


def replies(status: int, body: bytes = b'{"error": {"message": "busy"}}', **headers: str) -> Act:
    """A whole reply that has nothing to do with the question; `headers` with _ for -."""
    named = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}

    async def act(line: Line, exchange: Exchange, rng: random.Random) -> None:
        await line.answer(status, named, body)

    return act


def asks_to_wait_until(seconds: float) -> Act:
    """429 with a date in so many seconds; dates are whole seconds, so it is up to one second more."""

    async def act(line: Line, exchange: Exchange, rng: random.Random) -> None:
        date = email.utils.formatdate(time.time() + seconds + 1.0, usegmt=True)
        await line.answer(429, {**JSON, "retry-after": date}, b"{}")

    return act


async def asks_to_wait_in_riddles(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """429 with a Retry-After that means nothing."""
    riddles = ["soon", "", "nan", "inf", "1e400", "-", "12;13", "0x10", "Thu, 32 Foo 2026 25:61:61 GMT", "9" * 400]
    await line.answer(429, {**JSON, "retry-after": rng.choice(riddles)}, b"{}")


async def redirects(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """To an address that would answer rightly, and must not be asked."""
    status = rng.choice((301, 302, 303, 307, 308))
    await line.answer(status, {"location": f"/elsewhere{exchange.target}"}, b"")


# --------------------------------------------------------------- connection


async def reset_before_head(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """The request was read, and the connection is reset."""
    await line.reset()


async def reset_before_body(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """A head that promises a body."""
    line.write(head(200, {**JSON, "content-length": str(len(exchange.good))}) + b"\r\n")
    await asyncio.sleep(0.005)
    await line.reset()


async def reset_inside_body(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """A part of the reply."""
    reply = whole(200, JSON, exchange.good)
    line.write(reply[: len(reply) - rng.randint(1, len(exchange.good) - 1)])
    await asyncio.sleep(0.005)
    await line.reset()


async def reset_after_body(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """All of the reply, and then no clean end."""
    line.write(whole(200, JSON, exchange.good))
    await asyncio.sleep(rng.choice((0.0, 0.005)))
    await line.reset()


async def hangs_up_inside_body(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """A clean end of the connection in the middle of the reply."""
    reply = whole(200, JSON, exchange.good)
    line.write(reply[: len(reply) - rng.randint(1, len(exchange.good) - 1)])
    await line.hang_up()


async def black_hole(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """Accepts, never answers."""
    await line.silence()


async def silent_body(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """A head, a part of the body, and nothing more."""
    line.write(head(200, {**JSON, "content-length": str(len(exchange.good))}) + b"\r\n" + exchange.good[:20])
    await line.silence()


async def slow_bytes(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """The good reply, a byte at a time: no deadline on a single read would see it."""

    async def drip() -> AsyncIterator[bytes]:
        for at in range(len(exchange.good)):
            yield exchange.good[at : at + 1]
            await asyncio.sleep(DRIP_S)

    await line.stream(200, {**JSON, "content-length": str(len(exchange.good))}, drip())


async def small_parts(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """The good reply in some pieces, none of them late."""

    async def parts() -> AsyncIterator[bytes]:
        size = len(exchange.good) // 4 + 1
        for at in range(0, len(exchange.good), size):
            yield exchange.good[at : at + size]
            await asyncio.sleep(0.001)

    await line.stream(200, JSON, parts())


async def length_too_long(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """Promises more bytes than come."""
    line.write(head(200, {**JSON, "content-length": str(len(exchange.good) + 10)}) + b"\r\n" + exchange.good)
    await line.hang_up()


async def length_too_short(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """More bytes come than were promised."""
    line.write(head(200, {**JSON, "content-length": str(len(exchange.good) // 2)}) + b"\r\n" + exchange.good)
    await line.hang_up()


async def two_replies(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """The good reply, and at once another one that answers no question."""
    line.write(whole(200, JSON, exchange.good) + _false_reply(exchange, rng))
    await line.hang_up()


async def unasked_reply(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """The good reply, and a moment later the other one, while the connection waits for its next question."""
    await line.answer(200, JSON, exchange.good)
    await asyncio.sleep(0.01)
    if not line.is_gone:
        line.write(_false_reply(exchange, rng))


def _false_reply(exchange: Exchange, rng: random.Random) -> bytes:
    return whole(200, JSON, json.dumps(other_numbers(json.loads(exchange.good), rng)).encode())


# --------------------------------------------------------------------- body


def sends(body: bytes | Callable[[bytes, random.Random], bytes], **headers: str) -> Act:
    """With status 200 `body`, or what it makes of the good one; `headers` with _ for -."""
    named = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}

    async def act(line: Line, exchange: Exchange, rng: random.Random) -> None:
        await line.answer(200, named, body if isinstance(body, bytes) else body(exchange.good, rng))

    return act


def damages(damage: Damage) -> Act:
    """Decoded, damaged and encoded again; what JSON does not have is written as Python writes it."""

    async def act(line: Line, exchange: Exchange, rng: random.Random) -> None:
        await line.answer(200, JSON, json.dumps(damage(json.loads(exchange.good), rng)).encode())

    return act


async def more_entries(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """Longer lists than were asked for."""
    await line.answer(200, JSON, exchange.answer(ask_for_more(exchange.body, NUM_MORE)))


async def endless_stream(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """JSON that never ends."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"["
        while True:
            yield b'"chaos", ' * 8000

    await line.stream(200, JSON, parts())


async def endless_head(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """Header after header."""
    line.write(head(200, JSON))
    await line.flood((b"x-chaos: " + b"y" * 100 + b"\r\n") * 100)


async def endless_interim_replies(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """ "100 Continue", again and again."""
    await line.flood(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


@cache
def bomb() -> bytes:
    """BOMB_BYTES of spaces, packed a thousand times smaller."""
    part = b" " * 2**20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(BOMB_BYTES // len(part)):
        checksum = zlib.crc32(part, checksum)
    # A part that was flushed can stand any number of times. Then come the end, and how gzip lets it be checked.
    end = packer.flush() + struct.pack("<II", checksum, BOMB_BYTES)
    return gzip.compress(b"")[:10] + packed * (BOMB_BYTES // len(part)) + end


async def gzip_bomb(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """A small body that becomes a large one."""
    await line.answer(200, {**JSON, "content-encoding": "gzip"}, bomb())


async def many_objects(line: Line, exchange: Exchange, rng: random.Random) -> None:
    """64 MB of the smallest JSON objects: decoded they take twenty times as much."""
    await line.answer(200, JSON, b'{"choices": [' + b"{}," * (64 * 2**20 // 3) + b"{}]}")


def cut(good: bytes, rng: random.Random) -> bytes:
    """The beginning of a reply, as a whole body."""
    return good[: rng.randrange(1, len(good))]


def nested(good: bytes, rng: random.Random) -> bytes:
    """The good reply with a field that is nested deeply; the parser's own stack shall not end there."""
    depth = rng.choice((2000, NUM_BRACKETS // 10))
    return b'{"x": ' + b'{"a":' * depth + b"1" + b"}" * depth + b', "reply": ' + good + b"}"


def not_text(good: bytes, rng: random.Random) -> bytes:
    """Bytes that are no UTF-8 in the middle of a string."""
    place = good.index(b'"') + 1
    return good[:place] + b"\xff\xfe\xc0" + good[place:]


def overflow(good: bytes, rng: random.Random) -> bytes:
    """A number that no float holds stands in front of all others."""
    place = good.index(b"{") + 1
    return good[:place] + b'"x": [1e999, -1e999], ' + good[place:]


# -------------------------------------------------------------------- table


def _fault(act: Act, outcomes: str, *needs: str, weight: float = 1.0) -> Fault:
    return Fault(act, frozenset(outcomes.split()), frozenset(needs), weight)  # type: ignore[arg-type]


FAULTS: Final[Mapping[str, Fault]] = {
    "429 seconds": _fault(replies(429, retry_after="1"), "retried", weight=0.2),
    "429 fraction": _fault(replies(429, retry_after="0.15"), "retried"),
    "429 zero": _fault(replies(429, retry_after="0"), "retried"),
    "429 negative": _fault(replies(429, retry_after="-5"), "retried"),
    "429 date": _fault(asks_to_wait_until(0.2), "retried", weight=0.2),
    "429 past date": _fault(asks_to_wait_until(-3600.0), "retried"),
    "429 milliseconds": _fault(replies(429, retry_after_ms="150"), "retried"),
    "429 milliseconds first": _fault(replies(429, retry_after_ms="150", retry_after="3600"), "retried"),
    "429 huge": _fault(replies(429, retry_after="86400"), "retried", weight=0.05),
    "429 garbage": _fault(asks_to_wait_in_riddles, "retried"),
    "429 bare": _fault(replies(429), "retried"),
    "500": _fault(replies(500, b"Internal Server Error"), "retried"),
    "502": _fault(replies(502, HTML, content_type="text/html"), "retried"),
    "503": _fault(replies(503, retry_after="0.15"), "retried"),
    "529": _fault(replies(529, b'{"type": "error", "error": {"type": "overloaded_error"}}'), "retried"),
    "204": _fault(replies(204, b""), "refused"),
    "401": _fault(replies(401, b'{"error": "Unauthorized"}'), "refused"),
    "redirect": _fault(redirects, "refused"),
    "reset before head": _fault(reset_before_head, "retried"),
    "reset before body": _fault(reset_before_body, "retried"),
    "reset inside body": _fault(reset_inside_body, "retried"),
    "reset after body": _fault(reset_after_body, "retried right"),
    "hang-up inside body": _fault(hangs_up_inside_body, "retried"),
    "black hole": _fault(black_hole, "retried", weight=0.2),
    "silent body": _fault(silent_body, "retried", weight=0.2),
    "slow bytes": _fault(slow_bytes, "retried", weight=0.2),
    "small parts": _fault(small_parts, "right"),
    "length too long": _fault(length_too_long, "retried"),
    "length too short": _fault(length_too_short, "retried refused"),
    "two replies": _fault(two_replies, "right", "several"),
    # Where the next question has been sent already nobody can tell it from an answer: not mixed with others.
    "unasked reply": _fault(unasked_reply, "right", "several", weight=0.0),
    "endless stream": _fault(endless_stream, "refused", weight=0.05),
    "endless head": _fault(endless_head, "refused", weight=0.05),
    "endless interim replies": _fault(endless_interim_replies, "refused retried", weight=0.05),
    "gzip bomb": _fault(gzip_bomb, "refused", weight=0.05),
    "many objects": _fault(many_objects, "refused", weight=0.0),
    "gzip": _fault(sends(lambda good, rng: gzip.compress(good), content_encoding="gzip"), "right"),
    "gzip that is cut": _fault(
        sends(lambda good, rng: cut(gzip.compress(good), rng), content_encoding="gzip"), "retried refused right"
    ),
    "unknown encoding": _fault(sends(lambda good, rng: good, content_encoding="br"), "right refused"),
    "html": _fault(sends(HTML, content_type="text/html"), "refused"),
    "wrong content type": _fault(sends(lambda good, rng: good, content_type="text/html"), "right refused"),
    "empty body": _fault(sends(b""), "retried"),
    "cut JSON": _fault(sends(cut), "retried"),
    "brackets": _fault(sends(b"[" * NUM_BRACKETS), "retried refused"),
    "nested JSON": _fault(sends(nested), "retried refused"),
    "not text": _fault(sends(not_text), "retried refused"),
    "overflow": _fault(sends(overflow), "right retried refused"),
    "more entries": _fault(more_entries, "right", "lists"),
    **{name: _fault(damages(act), outcomes, *needs) for name, (act, needs, outcomes) in DAMAGES.items()},
}
"""Name -> fault."""
FLOODS: Final = ("endless stream", "endless head", "endless interim replies", "gzip bomb", "many objects")
"""Those that send more than fits."""
SILENT: Final = ("black hole", "silent body", "slow bytes")
"""Those that only a deadline ends."""
HOSTILE: Final = (*FLOODS, "brackets", "slow bytes")
"""All that are after the client's memory and time."""
