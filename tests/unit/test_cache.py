"""The cache: what goes in comes out, nothing is ever unpickled, and a bad day costs no answer."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diskcache
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope_bb import cache as cache_module
from mope_bb.cache import (
    BytesDisk,
    DistributionCache,
    decode_distribution,
    distribution_key,
    encode_distribution,
)
from mope_bb.errors import ConfigError
from mope_bb.types import END, Piece, TokenDistribution

LIST = TokenDistribution((Piece(b"\xff\xe2", 7), END, Piece(b"x")), (-0.5, -1.25, -3.0), vocab_size=9)
KEY = distribution_key(["m"], [1, 2], 3)


@st.composite
def distributions(draw: st.DrawFn) -> TokenDistribution:
    """Any list that `build_distribution` makes: any bytes, ids or none, END, each once, logprobs descending."""
    pieces = draw(
        st.lists(
            st.builds(Piece, st.binary(max_size=8), st.none() | st.integers(-1, 2**31)),
            min_size=1,
            max_size=6,
            unique_by=lambda piece: piece.key,
        )
    )
    logprobs = sorted((draw(st.floats(-1e4, 0.0)) for _ in pieces), reverse=True)
    return TokenDistribution(tuple(pieces), tuple(logprobs), draw(st.none() | st.integers(1, 2**20)))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DistributionCache]:
    """An empty cache."""
    opened = DistributionCache(tmp_path / "cache", max_bytes=2**30)
    yield opened
    opened.close()


def get(cache: DistributionCache, key: str = KEY) -> TokenDistribution | None:
    """`cache.get` from a synchronous test."""
    return asyncio.run(cache.get(key))


def put(cache: DistributionCache, key: str = KEY, value: TokenDistribution = LIST) -> None:
    """`cache.put` from a synchronous test."""
    asyncio.run(cache.put(key, value))


@given(distribution=distributions())
def test_encoding_round_trip(distribution: TokenDistribution) -> None:
    """Every distribution is the same after encoding and decoding, to the last bit."""
    assert decode_distribution(encode_distribution(distribution)) == distribution


def test_round_trip_through_the_disk(cache: DistributionCache, tmp_path: Path) -> None:
    """What was put is got, also by another opening of the folder; hits and misses are counted."""
    assert get(cache) is None
    put(cache)
    assert get(cache) == LIST
    assert (cache.num_hits, cache.num_misses) == (1, 1)
    again = DistributionCache(tmp_path / "cache", max_bytes=2**30)
    assert get(again) == LIST
    assert get(again, distribution_key(["m"], [1, 2], 4)) is None
    again.close()


def test_many_at_once(cache: DistributionCache) -> None:
    """What was put together or alone is got together, in order, with None for what is not there; all are counted."""
    other = TokenDistribution((END,), (-0.25,))
    asyncio.run(cache.put_many([("a", LIST), ("b", other)]))
    put(cache, "c", LIST)
    assert asyncio.run(cache.get_many(["b", "no", "a", "c"])) == [other, None, LIST, LIST]
    assert (cache.num_hits, cache.num_misses) == (3, 1)
    assert asyncio.run(cache.get_many([])) == []
    assert get(cache, "b") == other


def test_a_batch_is_written_as_a_whole(cache: DistributionCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails in the middle of it leaves nothing behind, and costs no answer."""
    store = cache._cache.set

    def fail_on_second(key: str, data: bytes) -> None:
        if key == "b":
            raise OSError(28, "No space left on device")
        store(key, data)

    monkeypatch.setattr(cache._cache, "set", fail_on_second)
    asyncio.run(cache.put_many([("a", LIST), ("b", LIST)]))
    assert asyncio.run(cache.get_many(["a", "b"])) == [None, None]


def test_large_entries_go_through_a_file(cache: DistributionCache) -> None:
    """A whole vocabulary is larger than diskcache keeps in its database, and comes back as well."""
    many = TokenDistribution(
        tuple(Piece(b"%d" % i, i) for i in range(30_000)), tuple(-float(i) for i in range(30_000)), 30_000
    )
    put(cache, value=many)
    assert get(cache) == many


class Payload:
    """When unpickled it calls `_explode`."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _explode, ()


EXPLODED: list[bool] = []


def _explode() -> str:
    EXPLODED.append(True)
    return "exploded"


def plant(folder: Path, key: Any, value: Any) -> None:
    """Store an entry with plain diskcache, which pickles whatever it is given."""
    planted = diskcache.Cache(str(folder), disk=diskcache.Disk)
    planted.set(key, value)
    planted.close()


def check_planted(folder: Path) -> None:
    """The folder does hold a pickled value."""
    database = sqlite3.connect(folder / "cache.db")
    rows = database.execute("SELECT COUNT(*) FROM Cache WHERE mode = 4").fetchone()
    database.close()
    assert rows[0] >= 1, "the planted entry is not a pickle, so the test shows nothing"


def test_the_payload_does_explode() -> None:
    """The trap works: plain unpickling has the side effect that the next test looks for."""
    EXPLODED.clear()
    assert pickle.loads(pickle.dumps(Payload())) == "exploded"  # noqa: S301  # the trap itself
    assert EXPLODED == [True]
    EXPLODED.clear()


@pytest.mark.parametrize("size", [1, 200_000], ids=["in the database", "in a file"])
def test_a_pickled_entry_is_never_unpickled(tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int) -> None:
    """An entry that somebody planted as a pickle is a miss, and its code does not run."""
    EXPLODED.clear()
    folder = tmp_path / "cache"
    DistributionCache(folder, max_bytes=2**30).close()
    plant(folder, KEY, [Payload(), "x" * size])
    check_planted(folder)
    cache = DistributionCache(folder, max_bytes=2**30)
    with caplog.at_level(logging.WARNING):
        assert get(cache) is None
    assert "damaged" in caplog.text
    assert EXPLODED == []
    put(cache)
    assert get(cache) == LIST
    cache.close()


def test_a_pickled_key_is_never_unpickled(tmp_path: Path) -> None:
    """Walking over keys, which unpickles in plain diskcache, is refused for a pickled key."""
    EXPLODED.clear()
    DistributionCache(tmp_path, max_bytes=2**30).close()
    plant(tmp_path, ("a", Payload()), b"1")
    opened = diskcache.Cache(str(tmp_path), disk=BytesDisk)
    with pytest.raises(ValueError, match="pickled key"):
        list(opened)
    opened.close()
    assert EXPLODED == []


@pytest.mark.parametrize(
    ("key", "value"), [(("a", 1), b"x"), (1, b"x"), (b"k", b"x"), ("k", "x"), ("k", 1), ("k", None)]
)
def test_only_str_keys_and_bytes_values_are_written(tmp_path: Path, key: Any, value: Any) -> None:
    """Everything that diskcache might pickle, and all else that is no str or bytes, is refused on writing."""
    opened = diskcache.Cache(str(tmp_path), disk=BytesDisk)
    with pytest.raises(TypeError):
        opened.set(key, value)
    assert len(opened) == 0
    opened.close()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b"{}",
        b'{"pieces": [], "logprobs": [], "vocab_size": null}',
        b'{"pieces": [["a", 1]], "logprobs": [], "vocab_size": null}',
        b'{"pieces": [["a"]], "logprobs": [-1.0], "vocab_size": null}',
        b'{"pieces": [[1, 1]], "logprobs": [-1.0], "vocab_size": null}',
        '{"pieces": [["€", 1]], "logprobs": [-1.0], "vocab_size": null}'.encode(),
        b'{"pieces": [["a", 1]], "logprobs": ["x"], "vocab_size": null}',
        b'{"pieces": [["a", 1]], "logprobs": [-1.0]}',
        b'{"pieces": 3, "logprobs": 3, "vocab_size": null}',
    ],
)
def test_a_damaged_entry_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    """Whatever stands in the folder, the answer is "not known", with a warning, and a new put repairs it."""
    cache = DistributionCache(tmp_path, max_bytes=2**30)
    raw = diskcache.Cache(str(tmp_path), disk=BytesDisk)
    raw.set(KEY, data)
    raw.close()
    with caplog.at_level(logging.WARNING):
        assert get(cache) is None
    assert "damaged" in caplog.text
    put(cache)
    assert get(cache) == LIST
    cache.close()


@pytest.mark.parametrize(
    "data",
    [
        b'{"pieces": [["a", "1"]], "logprobs": [-1.0], "vocab_size": null}',
        b'{"pieces": [["a", 1]], "logprobs": [2.0], "vocab_size": null}',
        b'{"pieces": [["a", 1]], "logprobs": [-1.0], "vocab_size": "many"}',
        b'{"pieces": [["a", 1], ["a", 1]], "logprobs": [-1.0, -2.0], "vocab_size": null}',
        b'{"pieces": [["a", 1], ["b", 2]], "logprobs": [-2.0, -1.0], "vocab_size": null}',
    ],
)
def test_an_entry_that_is_no_distribution_is_a_miss(tmp_path: Path, data: bytes) -> None:
    """An entry of the right shape with impossible content is damaged too."""
    cache = DistributionCache(tmp_path, max_bytes=2**30)
    raw = diskcache.Cache(str(tmp_path), disk=BytesDisk)
    raw.set(KEY, data)
    raw.close()
    try:
        assert get(cache) is None
    finally:
        cache.close()


def test_a_full_cache_stops_writing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its limit the cache says so once, keeps what it has, and writes no more."""
    monkeypatch.setattr(cache_module, "_SIZE_CHECK_INTERVAL", 1)
    cache = DistributionCache(tmp_path, max_bytes=2**20)
    keys = [distribution_key(["m"], [n], 3) for n in range(30)]
    many = TokenDistribution(tuple(Piece(b"%d" % i, i) for i in range(8_000)), (-1.0,) * 8_000)
    with caplog.at_level(logging.WARNING):
        for key in keys:
            put(cache, key, many)
    kept = [get(cache, key) is not None for key in keys]
    assert 0 < sum(kept) < len(keys)
    assert kept == sorted(kept, reverse=True)
    assert caplog.text.count("reached its limit") == 1
    cache.close()
    again = DistributionCache(tmp_path, max_bytes=2**20)
    put(again, "new")
    assert get(again, "new") is None
    assert get(again, keys[0]) == many
    again.close()


def test_nothing_is_evicted(tmp_path: Path) -> None:
    """diskcache's own limit, which deletes silently, is switched off."""
    cache = DistributionCache(tmp_path, max_bytes=2**30)
    cache.close()
    database = sqlite3.connect(tmp_path / "cache.db")
    settings = dict(database.execute("SELECT key, value FROM Settings").fetchall())
    database.close()
    assert settings["eviction_policy"] == "none"
    assert settings["size_limit"] >= 2**40


@pytest.mark.parametrize("is_old", [False, True])
def test_the_folder_is_private(tmp_path: Path, is_old: bool) -> None:
    """Only the user can read the folder, also when it was there before with other rights."""
    folder = tmp_path / "a" / "cache"
    if is_old:
        folder.mkdir(parents=True, mode=0o755)
    DistributionCache(folder, max_bytes=1).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """A file in place of the folder is an error of the configuration."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        DistributionCache(tmp_path / "file", max_bytes=1)
    assert "[cache] path" in str(caught.value.hint)


def test_a_cache_that_cannot_be_written_costs_no_answer(
    cache: DistributionCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk on writing is a warning, once."""

    def fail(key: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache._cache, "set", fail)
    with caplog.at_level(logging.WARNING):
        put(cache)
        put(cache)
    assert caplog.text.count("cannot be written") == 1


ids_of = st.lists(st.integers(0, 2**31), max_size=6)
questions = st.tuples(st.lists(st.text(max_size=6), min_size=1, max_size=3), ids_of, st.integers(1, 100))


@given(first=questions, second=questions)
def test_the_key_is_equal_exactly_for_equal_questions(
    first: tuple[list[str], list[int], int], second: tuple[list[str], list[int], int]
) -> None:
    """Different identity, prompt or k: another key. The same in tuples or lists: the same key."""
    assert (distribution_key(*first) == distribution_key(*second)) is (first == second)
    assert distribution_key(tuple(first[0]), tuple(first[1]), first[2]) == distribution_key(*first)


@pytest.mark.parametrize(
    "other", [(["m", ""], [1, 2], 3), (["m"], [12], 3), (["m"], [1], 3), (["m"], [2, 1], 3), (["m"], [1, 2], 33)]
)
def test_neighbouring_questions_have_other_keys(other: tuple[list[str], list[int], int]) -> None:
    """No two questions run together in the hashed text."""
    assert distribution_key(*other) != KEY


def test_the_key_depends_on_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new format reads nothing of an old one."""
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert distribution_key(["m"], [1, 2], 3) != KEY


def test_logprobs_are_exact() -> None:
    """Numbers survive to the last bit, so that an answer from the cache is the answer of the model."""
    values = (-5e-324, -math.nextafter(1.0, 2.0), math.log(1 / 3))
    exact = TokenDistribution((Piece(b"a", 1), Piece(b"b", 2), Piece(b"c", 3)), values)
    assert decode_distribution(encode_distribution(exact)).logprobs == values
