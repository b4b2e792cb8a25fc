"""Next-token distributions on disk: diskcache without pickle, without eviction.

What identifies a distribution: the model (its `identity`, else provider, address and served name), the prompt's ids
(or its text), the length of the list, and the version of this format. What does not: deadlines, retries, keys, who
asked. Only distributions are kept, never sampled pieces, so that two answers drawn from one cache stay independent.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import diskcache
import orjson

from mope_bb.config import CacheConfig, resolve_home
from mope_bb.errors import ConfigError
from mope_bb.types import Piece, TokenDistribution

FORMAT: Final = 2
_SIZE_CHECK_INTERVAL: Final = 256
_log = logging.getLogger(__name__)


class BytesDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """A `Disk` that stores `str` keys and `bytes` values only: it neither pickles nor unpickles (CVE-2025-69872)."""

    def put(self, key: Any) -> Any:
        if not isinstance(key, str):
            raise TypeError(f"the cache takes str keys, got {type(key).__name__}")
        return super().put(key)

    def get(self, key: Any, raw: Any) -> Any:
        if not raw:
            raise ValueError("the cache holds a pickled key, which is not read")
        return super().get(key, raw)

    def store(self, value: Any, read: Any, key: Any = diskcache.UNKNOWN) -> Any:
        if read or not isinstance(value, bytes):
            raise TypeError(f"the cache takes bytes values, got {type(value).__name__}")
        return super().store(value, read, key=key)

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
        if mode not in (diskcache.core.MODE_RAW, diskcache.core.MODE_BINARY) or read:
            raise ValueError(f"the cache holds a value of mode {mode!r}, which is not read")
        return super().fetch(mode, filename, value, read)


class DistributionCache:
    """Distributions by key. A damaged entry is a miss; a full cache stops growing and says so once."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            self._cache = diskcache.Cache(str(path), disk=BytesDisk, eviction_policy="none", size_limit=2**62)
        except (OSError, sqlite3.Error, ValueError) as error:
            raise ConfigError(
                f"the cache {str(path)!r} cannot be opened: {error}", hint="Set [cache] path, or enabled = false."
            ) from None
        self._path = path
        self._max_bytes = max_bytes
        self._full = self._cache.volume() >= max_bytes
        self._num_unchecked = 0
        self.num_hits = 0
        self.num_misses = 0

    async def get(self, key: str) -> TokenDistribution | None:
        """The distribution stored under `key`, or None."""
        return (await self.get_many([key]))[0]

    async def get_many(self, keys: Sequence[str]) -> list[TokenDistribution | None]:
        """What is stored under each of `keys`, in one go."""
        found = await asyncio.to_thread(lambda: [self._read(key) for key in keys])
        num_known = sum(one is not None for one in found)
        self.num_hits += num_known
        self.num_misses += len(keys) - num_known
        return found

    async def put(self, key: str, distribution: TokenDistribution) -> None:
        """Store `distribution` unless the cache is full."""
        await self.put_many([(key, distribution)])

    async def put_many(self, entries: Sequence[tuple[str, TokenDistribution]]) -> None:
        """Store distributions under their keys, in one go, unless the cache is full."""
        if not self._full:
            await asyncio.to_thread(
                self._write, [(key, encode_distribution(distribution)) for key, distribution in entries]
            )

    def _read(self, key: str) -> TokenDistribution | None:
        try:
            data = self._cache.get(key)
            return None if data is None else decode_distribution(data)
        except (ValueError, OSError, sqlite3.Error) as error:
            _log.warning("cache entry %s is damaged and will be asked for again: %s", key[:12], error)
            return None

    def _write(self, entries: Sequence[tuple[str, bytes]]) -> None:
        try:
            with self._cache.transact():
                for key, data in entries:
                    self._cache.set(key, data)
            self._num_unchecked += len(entries)
            if self._num_unchecked >= _SIZE_CHECK_INTERVAL:
                self._num_unchecked = 0
                self._check_size()
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            # A cache that cannot be written must not cost the answer.
            self._full = True
            _log.warning("the cache %s cannot be written, no more is tried: %s", self._path, error)

    def _check_size(self) -> None:
        if not self._full and self._cache.volume() >= self._max_bytes:
            self._full = True
            _log.warning(
                "the cache %s has reached its limit of %d bytes: no more is written", self._path, self._max_bytes
            )

    def close(self) -> None:
        """Close the database of this process."""
        self._cache.close()


def open_cache(config: CacheConfig) -> DistributionCache | None:
    """The cache that `config` describes; None where it is switched off. Raises ConfigError."""
    if not config.enabled:
        return None
    path = Path(config.path) if config.path else resolve_home() / "distributions"
    return DistributionCache(path, max_bytes=config.max_bytes)


def distribution_key(identity: Sequence[str], prompt: Sequence[int] | str, top_k: int) -> str:
    """The cache key of one next-token question; see the module's first lines."""
    document = orjson.dumps([FORMAT, list(identity), prompt if isinstance(prompt, str) else list(prompt), top_k])
    return hashlib.sha256(document).hexdigest()


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
        0 < len(pieces) == len(logprobs) == len({piece.key for piece in pieces})
        and all(piece.token_id is None or type(piece.token_id) is int for piece in pieces)
        and all(type(value) is float and value <= 0.0 for value in logprobs)
        and list(logprobs) == sorted(logprobs, reverse=True)
        and (vocab_size is None or type(vocab_size) is int)
        and type(is_guess) is bool
    )
    if not sound:
        raise ValueError("not a stored distribution: pieces, logprobs or vocabulary size are not as written")
    return TokenDistribution(pieces, logprobs, vocab_size, is_guess)
