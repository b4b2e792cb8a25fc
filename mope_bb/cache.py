"""Next-token distributions on disk, for many processes at a time.

What identifies a distribution, so that a change of it is another key:

- the model: its expert's `identity`, else `base_url` and `model`; the `provider`, since adapters read lists in their
  own ways; of a chat API also `extra_body`;
- the tokenizer, with its chat template and end tokens, where it is known here;
- the prompt with the answer so far: token ids, or messages and text where the endpoint takes those. The expert's system
  prompt is a part of it;
- `top_k`;
- `FORMAT`: how entries are written, and what adapters ask and make of a reply. Who changes either raises it.

What does not: deadlines, retries, limits of requests in flight and of prompts in one, the variable with the key,
prices, an expert's name, dimension and place among the others, preference, merge rule, PCM, temperature. What nobody
can see from here is that other weights are served at the same address under the same name: that is what `identity` is
for.

What is kept is a distribution that an endpoint gave: never an error, and never a sampled piece, so that two answers
drawn from one cache stay independent. One with `is_guess` is kept as such: it says which piece the endpoint calls its
most probable one, which asking again would say again, and its unseen mass stays 1.

No bad day costs an answer, and nothing is deleted unless `mope-bb cache` is told to:

- another process writes: tried again for `cache_file.WAIT_S` seconds, then that batch is not kept;
- the disk is full, or the cache is at its limit: what is there is read, and nothing more is written;
- the file breaks while it is used: answers go on without it;
- an entry is damaged: it is asked for again, and written anew.

The first three are told once each, and it is tried again after `REST_S` seconds. A file that is found broken when it is
opened, or is no cache of this format, is a ConfigError that says what to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import orjson

from mope_bb.cache_file import CacheFile, explain, is_passing
from mope_bb.config import CacheConfig, resolve_home
from mope_bb.errors import ConfigError
from mope_bb.types import Piece, TokenDistribution

T = TypeVar("T")
FORMAT: Final = 3
REST_S: Final = 60.0
"""How long nothing is tried after a failure, so that a cache that cannot be used costs no time either."""
CHECKSUM_BYTES: Final = 8
_log = logging.getLogger(__name__)


class DistributionCache:
    """Distributions by key, in a folder. See the module's first lines for what may go wrong."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Open the cache in the folder `path`, made if need be, which grows up to `max_bytes`. Raises ConfigError."""

        def connect() -> CacheFile:
            return CacheFile(path, version=FORMAT, max_bytes=max_bytes, creates=True)

        try:
            connect().close()
        except (OSError, sqlite3.Error) as error:
            if not is_passing(error):
                raise explain(path, error) from None
        # Who reads never waits for who writes.
        self._reading = _Access(connect, f"the cache {path} cannot be read")
        self._writing = _Access(connect, f"the cache {path} cannot be written (its limit is {max_bytes} bytes)")
        self._num_damaged = 0
        self.num_hits = 0
        self.num_misses = 0

    async def get(self, key: str) -> TokenDistribution | None:
        """The distribution stored under `key`, or None."""
        return (await self.get_many([key]))[0]

    async def get_many(self, keys: Sequence[str]) -> list[TokenDistribution | None]:
        """What is stored under each of `keys`, in one go."""
        nothing: list[TokenDistribution | None] = [None] * len(keys)
        found = await self._reading.use(lambda file: [self._read(file, key) for key in keys], nothing)
        num_known = sum(one is not None for one in found)
        self.num_hits += num_known
        self.num_misses += len(keys) - num_known
        return found

    async def put(self, key: str, distribution: TokenDistribution) -> None:
        """Store `distribution`; when this returns it is committed, or a warning says why not."""
        await self.put_many([(key, distribution)])

    async def put_many(self, entries: Sequence[tuple[str, TokenDistribution]]) -> None:
        """Store distributions under their keys, all or none of them."""

        def write(file: CacheFile) -> None:
            file.put_many([(key, seal_entry(key, distribution)) for key, distribution in entries])

        await self._writing.use(write, None)

    def _read(self, file: CacheFile, key: str) -> TokenDistribution | None:
        try:
            sealed = file.get(key)
            return None if sealed is None else open_entry(key, sealed)
        except ValueError as error:
            self._num_damaged += 1
            _log.log(
                logging.WARNING if self._num_damaged == 1 else logging.DEBUG,
                "cache entry %s is damaged and will be asked for again, as all such: %s",
                key[:12],
                error,
            )
            return None

    def close(self) -> None:
        """Close the connections of this process; what is asked or put later is a miss, or not kept."""
        self._reading.close()
        self._writing.close()


class _Access:
    """A thread with a connection of its own. What goes wrong is told once and is no error of the caller."""

    def __init__(self, connect: Callable[[], CacheFile], complaint: str) -> None:
        self._connect = connect
        self._complaint = complaint
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._file: CacheFile | None = None
        self._rests_until = -math.inf
        self._is_closed = False
        self._told: set[str] = set()

    async def use(self, action: Callable[[CacheFile], T], otherwise: T) -> T:
        """What `action` makes of the file; `otherwise` where the file cannot be used."""
        if self._is_closed or self._rests():
            return otherwise
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._use, action, otherwise)

    def _rests(self) -> bool:
        return time.monotonic() < self._rests_until

    def _use(self, action: Callable[[CacheFile], T], otherwise: T) -> T:
        if self._rests():  # since what stood before this in the queue
            return otherwise
        try:
            if self._file is None:
                self._file = self._connect()
            return action(self._file)
        except (OSError, sqlite3.Error, ConfigError) as error:
            self._disconnect()
            self._rests_until = time.monotonic() + REST_S
            if str(error) not in self._told:
                self._told.add(str(error))
                _log.warning("%s: %s. Answers go on without it.", self._complaint, error)
            return otherwise

    def _disconnect(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._thread.submit(self._disconnect)
            self._thread.shutdown()


def cache_folder(config: CacheConfig) -> Path:
    """Where the cache is that `config` describes."""
    return Path(config.path).expanduser() if config.path else resolve_home() / "distributions"


def open_cache(config: CacheConfig) -> DistributionCache | None:
    """The cache that `config` describes; None where it is switched off. Raises ConfigError."""
    return DistributionCache(cache_folder(config), max_bytes=config.max_bytes) if config.enabled else None


def distribution_key(identity: Sequence[str], prompt: Sequence[int] | str, top_k: int) -> str:
    """The cache key of one next-token question; see the module's first lines."""
    document = orjson.dumps([FORMAT, list(identity), prompt if isinstance(prompt, str) else list(prompt), top_k])
    return hashlib.sha256(document).hexdigest()


def seal_entry(key: str, distribution: TokenDistribution) -> bytes:
    """What is stored under `key`: a checksum of key and content, which a disk's bit or a row's wrong key breaks."""
    data = encode_distribution(distribution)
    return _checksum(key, data) + data


def open_entry(key: str, sealed: bytes) -> TokenDistribution:
    """The inverse of `seal_entry`. Raises ValueError for anything that it would not have written under `key`."""
    data = sealed[CHECKSUM_BYTES:]
    if sealed[:CHECKSUM_BYTES] != _checksum(key, data):
        raise ValueError("the checksum does not fit")
    return decode_distribution(data)


def _checksum(key: str, data: bytes) -> bytes:
    return hashlib.blake2b(key.encode() + data, digest_size=CHECKSUM_BYTES).digest()


def encode_distribution(distribution: TokenDistribution) -> bytes:
    """JSON; bytes as latin-1, which maps every byte to one character and back."""
    pieces = [[piece.data.decode("latin-1"), piece.token_id] for piece in distribution.pieces]
    return orjson.dumps(
        {
            "pieces": pieces,
            "logprobs": distribution.logprobs,
            "vocab_size": distribution.vocab_size,
            "is_guess": distribution.is_guess,
        }
    )


def decode_distribution(data: bytes) -> TokenDistribution:
    """The inverse of `encode_distribution`. Raises ValueError for anything that it would not have written."""
    try:
        document = orjson.loads(data)
        pieces = tuple(Piece(text.encode("latin-1"), token_id) for text, token_id in document["pieces"])
        logprobs, vocab_size = tuple(document["logprobs"]), document["vocab_size"]
        is_guess = document["is_guess"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a stored distribution: {error!r}") from None
    sound = (
        all(
            piece.token_id is None or (type(piece.token_id) is int and -1 <= piece.token_id < 2**63)  # -1: END
            for piece in pieces
        )
        and 0 < len(pieces) == len(logprobs) == len({piece.key for piece in pieces})
        and all(type(value) is float and -math.inf < value <= 0.0 for value in logprobs)
        and list(logprobs) == sorted(logprobs, reverse=True)
        and (vocab_size is None or type(vocab_size) is int)
        and type(is_guess) is bool
    )
    if not sound:
        raise ValueError("not a stored distribution: pieces, logprobs or vocabulary size are not as written")
    return TokenDistribution(pieces, logprobs, vocab_size, is_guess)
