"""Every fault does what its name says, as a client sees it that knows nothing but sockets."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import pytest

from mope_bb.providers.llamacpp_wire import build_request
from mope_bb.zoo.build import Zoo
from tests.chaos.damage import find_lists, logprob_of
from tests.chaos.faults import FAULTS, HTML, NUM_BRACKETS, NUM_MORE
from tests.chaos.server import ChaosServer, Plan, make_plan, running, what_was_seen

LASTING: Final = frozenset(("black hole", "silent body", "slow bytes", "unasked reply"))
"""They do not end in a time that a test has."""
PATIENCE_S: Final = 0.3
"""So long they are looked at; what comes late is not missed, since all of them begin at once."""
ENOUGH: Final = 2**20
"""Who sends so much sends without end."""
TOP_K: Final = 6


@dataclass
class Seen:
    """What came over one connection."""

    data: bytes
    end: Literal["reset", "closed", "open"]
    good: bytes
    """The body of the reply without a fault."""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    after: bytes = b""
    """What came after the body."""

    def __post_init__(self) -> None:
        top, _, rest = self.data.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        if not first:
            return
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if self.headers.get("transfer-encoding") == "chunked":
            self.body = _unchunked(rest)
        else:
            length = int(self.headers.get("content-length", len(rest)))
            self.body, self.after = rest[:length], rest[length:]

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)

    @property
    def numbers(self) -> list[Any]:
        """The logprobs of the first list."""
        (entries, *_) = find_lists(self.json)
        return [logprob_of(entries, place) for place in range(len(entries))]

    @property
    def ids(self) -> list[int]:
        """The ids of the first list."""
        return _ids(self.json)

    @property
    def good_ids(self) -> list[int]:
        """The same without a fault."""
        return _ids(json.loads(self.good))

    @property
    def indices(self) -> list[int]:
        """Of the replies to several prompts."""
        return [reply["index"] for reply in self.json]

    @property
    def retry_after_s(self) -> float:
        """In how many seconds its date is."""
        return email.utils.parsedate_to_datetime(self.headers["retry-after"]).timestamp() - time.time()


def _ids(data: Any) -> list[int]:
    (entries, *_) = find_lists(data)
    assert isinstance(entries, list)
    return [entry["id"] for entry in entries]


def _unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        found += data[: int(size or b"0", 16)]
        data = data[int(size or b"0", 16) + 2 :]
    return found


def _is_head(part: bytes, whole: bytes) -> bool:
    return 0 < len(part) < len(whole) and whole.startswith(part)


def _is_status(status: int, **headers: str) -> Callable[[Seen], bool]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda seen: seen.status == status and named.items() <= seen.headers.items()


def _unzipped(data: bytes) -> bytes:
    return zlib.decompressobj(31).decompress(data)


CHECKS: Final[Mapping[str, Callable[[Seen], bool]]] = {
    "429 seconds": _is_status(429, retry_after="1"),
    "429 fraction": _is_status(429, retry_after="0.15"),
    "429 zero": _is_status(429, retry_after="0"),
    "429 negative": _is_status(429, retry_after="-5"),
    "429 date": lambda seen: seen.status == 429 and -0.5 < seen.retry_after_s <= 1.2,
    "429 past date": lambda seen: seen.status == 429 and seen.retry_after_s < -3000,
    "429 milliseconds": _is_status(429, retry_after_ms="150"),
    "429 milliseconds first": _is_status(429, retry_after_ms="150", retry_after="3600"),
    "429 huge": _is_status(429, retry_after="86400"),
    "429 garbage": lambda seen: seen.status == 429 and "retry-after" in seen.headers,
    "429 bare": lambda seen: seen.status == 429 and not {"retry-after", "retry-after-ms"} & seen.headers.keys(),
    "500": _is_status(500),
    "502": _is_status(502, content_type="text/html"),
    "503": _is_status(503, retry_after="0.15"),
    "529": _is_status(529),
    "204": _is_status(204),
    "401": _is_status(401),
    "redirect": lambda seen: 300 < seen.status < 309 and seen.headers["location"].startswith("/elsewhere/llamacpp/"),
    "reset before head": lambda seen: seen.data == b"" and seen.end == "reset",
    "reset before body": lambda seen: seen.status == 200 and seen.body == b"" and seen.end == "reset",
    "reset inside body": lambda seen: _is_head(seen.body, seen.good) and seen.end == "reset",
    "reset after body": lambda seen: seen.body == seen.good and seen.end == "reset",
    "hang-up inside body": lambda seen: _is_head(seen.body, seen.good) and seen.end == "closed",
    "black hole": lambda seen: seen.data == b"" and seen.end == "open",
    "silent body": lambda seen: _is_head(seen.body, seen.good) and seen.end == "open",
    "slow bytes": lambda seen: _is_head(seen.body, seen.good),
    "small parts": lambda seen: seen.body == seen.good and "transfer-encoding" in seen.headers,
    "length too long": lambda seen: seen.body == seen.good and int(seen.headers["content-length"]) > len(seen.good),
    "length too short": lambda seen: _is_head(seen.body, seen.good) and seen.body + seen.after == seen.good,
    "two replies": lambda seen: seen.body == seen.good and seen.after.startswith(b"HTTP/1.1 200"),
    "unasked reply": lambda seen: seen.body == seen.good and seen.after.startswith(b"HTTP/1.1 200"),
    "endless stream": lambda seen: (
        len(seen.data) >= ENOUGH and len(_unchunked(seen.data[:ENOUGH].partition(b"\r\n\r\n")[2])) > 0
    ),
    "endless head": lambda seen: len(seen.data) >= ENOUGH and b"\r\n\r\n" not in seen.data,
    "endless interim replies": lambda seen: len(seen.data) >= ENOUGH and seen.status == 100,
    "gzip bomb": lambda seen: len(_unzipped(seen.body)) > 100 * len(seen.body),
    "many objects": lambda seen: len(seen.data) >= ENOUGH and int(seen.headers["content-length"]) > 64 * 2**20,
    "gzip": lambda seen: seen.headers["content-encoding"] == "gzip" and gzip.decompress(seen.body) == seen.good,
    "gzip that is cut": lambda seen: seen.end == "closed" and len(_unzipped(seen.body)) < len(seen.good),
    "unknown encoding": _is_status(200, content_encoding="br"),
    "html": lambda seen: seen.status == 200 and seen.body == HTML,
    "wrong content type": lambda seen: seen.headers["content-type"] == "text/html" and seen.body == seen.good,
    "empty body": lambda seen: seen.status == 200 and seen.body == b"",
    "cut JSON": lambda seen: seen.status == 200 and _is_head(seen.body, seen.good),
    "brackets": lambda seen: seen.body == b"[" * NUM_BRACKETS,
    "nested JSON": lambda seen: seen.body.count(b'{"a":') >= 2000 and seen.good in seen.body,
    "not text": lambda seen: "\ufffd" in seen.body.decode(errors="replace"),
    "overflow": lambda seen: math.isinf(seen.json["x"][0]),
    "more entries": lambda seen: seen.ids[:TOP_K] == seen.good_ids and len(seen.ids) == TOP_K + NUM_MORE,
    "fewer entries": lambda seen: 0 < len(seen.ids) < TOP_K and seen.ids == seen.good_ids[: len(seen.ids)],
    "no entries": lambda seen: seen.json["completion_probabilities"][0]["top_logprobs"] == [],
    "missing token": lambda seen: len(seen.ids) == TOP_K - 1 and set(seen.ids) < set(seen.good_ids),
    "duplicate token": lambda seen: len(seen.ids) == TOP_K and len(set(seen.ids)) == TOP_K - 1,
    "nan": lambda seen: any(math.isnan(value) for value in seen.numbers),
    "infinite": lambda seen: any(math.isinf(value) for value in seen.numbers),
    "positive": lambda seen: max(seen.numbers) > 0,
    "sentinel": lambda seen: sum(value is None or value <= -9999.0 for value in seen.numbers) == 1,
    "nothing but sentinels": lambda seen: all(value is None or value <= -9999.0 for value in seen.numbers),
    "numbers as text": lambda seen: all(isinstance(value, str) for value in seen.numbers),
    "no lists": lambda seen: seen.json["completion_probabilities"] is None,
    "other length": lambda seen: seen.json["tokens_evaluated"] == json.loads(seen.good)["tokens_evaluated"] - 1,
    "tokenizer changes": lambda seen: seen.ids == seen.good_ids and seen.body != seen.good,
    "another shape": lambda seen: not (isinstance(seen.json, dict) and "tokens" in seen.json),
    "shuffled batch": lambda seen: seen.indices == [2, 1, 0],
    "missing index": lambda seen: len(seen.json) == 2,
    "doubled index": lambda seen: len(seen.json) == 3 and len(set(seen.indices)) == 2,
    "one reply more": lambda seen: len(seen.json) == 4 and len(set(seen.indices)) == 3,
}


@pytest.fixture(scope="module")
def url(nano: Zoo) -> Iterator[str]:
    """A chaos server."""
    with running(ChaosServer(nano.folder("concise"))) as found:
        yield found


async def ask(url: str, life: str, *, is_batch: bool, lasts: bool) -> tuple[bytes, Literal["reset", "closed", "open"]]:
    """Everything that comes back, and how it ends."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = json.dumps(build_request([[5, 6, 7], [8, 9], [10]] if is_batch else [[5, 6, 7]], top_k=TOP_K, forced_id=70))
    writer.write(
        f"POST /llamacpp/{life}/completion HTTP/1.1\r\nhost: chaos\r\ncontent-length: {len(body)}\r\n"
        f"connection: {'keep-alive' if lasts else 'close'}\r\n\r\n{body}".encode()
    )
    data = b""
    try:
        async with asyncio.timeout(PATIENCE_S if lasts else 20.0):
            while len(data) < ENOUGH + 1000:
                part = await reader.read(1 << 16)
                if not part:
                    return data, "closed"
                data += part
        return data, "open"
    except TimeoutError:
        return data, "open"
    except ConnectionResetError:
        return data, "reset"
    finally:
        writer.close()


def test_each_fault_is_looked_at() -> None:
    """None is left out below."""
    assert CHECKS.keys() == FAULTS.keys()


@pytest.mark.parametrize("name", FAULTS)
def test_fault_does_what_its_name_says(url: str, name: str) -> None:
    """It is on the wire, and the good reply is not."""
    is_batch = "batch" in FAULTS[name].needs
    make_plan(url, Plan())
    good = Seen(*asyncio.run(ask(url, "bad", is_batch=is_batch, lasts=False)), good=b"")
    assert (good.status, good.end) == (200, "closed")
    make_plan(url, Plan(fault_of_life={"bad": name}))
    found = asyncio.run(ask(url, "bad", is_batch=is_batch, lasts=name in LASTING))
    assert what_was_seen(url).served == {name: 1}
    seen = Seen(*found, good=good.body)
    assert CHECKS[name](seen), f"{seen.status} {seen.headers} {seen.data[:500]!r}, {seen.end}"
    # The check can fail: it does for the good reply.
    with suppress(KeyError, ValueError, zlib.error):
        assert not CHECKS[name](Seen(good.data, "closed", good=good.body))
