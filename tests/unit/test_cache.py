"""The cache: what goes in comes out, and a bad day costs no answer."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope_bb import cache_file
from mope_bb.cache import (
    DistributionCache,
    decode_distribution,
    distribution_key,
    encode_distribution,
    open_entry,
    seal_entry,
)
from mope_bb.cache_file import FILE_NAME
from mope_bb.types import END, Piece, TokenDistribution

LIST = TokenDistribution((Piece(b"\xff\xe2", 7), END, Piece(b"x")), (-0.5, -1.25, -3.0), vocab_size=9)
WHOLE = TokenDistribution(
    tuple(Piece(b"%d" % i, i) for i in range(30_000)), tuple(-float(i) for i in range(30_000)), 30_000
)
"""The list of a whole vocabulary, about a megabyte."""
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
    vocab_size = draw(st.none() | st.integers(1, 2**20))
    return TokenDistribution(tuple(pieces), tuple(logprobs), vocab_size, is_guess=draw(st.booleans()))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DistributionCache]:
    """An empty cache."""
    with closing(DistributionCache(tmp_path / "cache", max_bytes=2**30)) as opened:
        yield opened


@pytest.fixture
def database(cache: DistributionCache, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Another process at the file of `cache`, which can lock it or write whatever it likes."""
    with closing(sqlite3.connect(tmp_path / "cache" / FILE_NAME, isolation_level=None)) as connection:
        yield connection


def get(cache: DistributionCache, key: str = KEY) -> TokenDistribution | None:
    """`cache.get` from a synchronous test."""
    return asyncio.run(cache.get(key))


def put(cache: DistributionCache, key: str = KEY, value: TokenDistribution = LIST) -> None:
    """`cache.put` from a synchronous test."""
    asyncio.run(cache.put(key, value))


@given(distribution=distributions())
def test_encoding_round_trip(distribution: TokenDistribution) -> None:
    """Every distribution, guesses too, is the same after encoding and decoding, to the last bit."""
    assert decode_distribution(encode_distribution(distribution)) == distribution
    assert open_entry(KEY, seal_entry(KEY, distribution)) == distribution


def test_logprobs_are_exact() -> None:
    """Numbers survive to the last bit, so that an answer from the cache is the answer of the model."""
    values = (-5e-324, -math.nextafter(1.0, 2.0), math.log(1 / 3))
    exact = TokenDistribution((Piece(b"a", 1), Piece(b"b", 2), Piece(b"c", 3)), values)
    assert decode_distribution(encode_distribution(exact)).logprobs == values


def test_round_trip_through_the_disk(cache: DistributionCache, tmp_path: Path) -> None:
    """What was put is got, also by another opening of the folder; hits and misses are counted."""
    assert get(cache) is None
    put(cache)
    assert get(cache) == LIST
    assert (cache.num_hits, cache.num_misses) == (1, 1)
    with closing(DistributionCache(tmp_path / "cache", max_bytes=2**30)) as again:
        assert get(again) == LIST
        assert get(again, distribution_key(["m"], [1, 2], 4)) is None


def test_many_at_once(cache: DistributionCache) -> None:
    """What was put together or alone is got together, in order, with None for what is not there; all are counted."""
    other = TokenDistribution((END,), (-0.25,))
    asyncio.run(cache.put_many([("a", LIST), ("b", other)]))
    put(cache, "c", LIST)
    assert asyncio.run(cache.get_many(["b", "no", "a", "c"])) == [other, None, LIST, LIST]
    assert (cache.num_hits, cache.num_misses) == (3, 1)
    assert asyncio.run(cache.get_many([])) == []
    assert get(cache, "b") == other


def test_all_stands_in_one_file(cache: DistributionCache, tmp_path: Path) -> None:
    """A whole vocabulary stands in the database too: a kill can leave no file without an entry, nor an entry without
    its file."""
    put(cache, value=WHOLE)
    assert get(cache) == WHOLE
    assert {path.name.removeprefix(FILE_NAME) for path in (tmp_path / "cache").iterdir()} <= {"", "-wal", "-shm"}


def test_a_guess_stays_a_guess(cache: DistributionCache) -> None:
    """What an endpoint said only the best piece of is kept with all its mass unseen."""
    put(cache, value=TokenDistribution((END,), (0.0,), 9, is_guess=True))
    found = get(cache)
    assert found is not None
    assert (found.is_guess, found.tail_mass) == (True, 1.0)


def test_a_batch_is_written_as_a_whole(
    cache: DistributionCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure in the middle of it leaves nothing behind, and costs no answer."""
    monkeypatch.setattr(cache_file, "MAX_VALUE_BYTES", 10_000)
    asyncio.run(cache.put_many([("a", LIST), ("b", WHOLE)]))
    assert asyncio.run(cache.get_many(["a", "b"])) == [None, None]
    assert caplog.text.count("cannot be written") == 1


def test_who_reads_never_waits_for_who_writes(
    cache: DistributionCache,
    database: sqlite3.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another process that does not let go costs a batch, with one warning; then it rests, and then it goes on."""
    monkeypatch.setattr(cache_file, "WAIT_S", 0.05)
    put(cache)
    database.execute("BEGIN IMMEDIATE")

    async def both() -> TokenDistribution | None:
        writing = asyncio.create_task(cache.put("lost", LIST))
        found = await cache.get(KEY)
        await writing
        return found

    assert asyncio.run(both()) == LIST
    put(cache, "lost")
    database.execute("COMMIT")
    put(cache, "not tried")
    assert asyncio.run(cache.get_many(["lost", "not tried"])) == [None, None]
    assert caplog.text.count("cannot be written") == 1
    monkeypatch.setattr(cache._writing, "_rests_until", 0.0)
    put(cache, "kept")
    assert get(cache, "kept") == LIST


def test_a_lock_on_all_costs_no_answer(
    cache: DistributionCache,
    database: sqlite3.Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where nobody may even read, every question is a miss, with one warning, and afterwards a hit again."""
    monkeypatch.setattr(cache_file, "WAIT_S", 0.05)
    put(cache)
    cache.close()
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.execute("BEGIN EXCLUSIVE")
    database.execute("DELETE FROM entries WHERE key = 'no'")
    database.execute("COMMIT")
    with closing(DistributionCache(tmp_path / "cache", max_bytes=2**30)) as late:
        assert [get(late), get(late)] == [None, None]
        put(late, "no")
        database.close()
        monkeypatch.setattr(late._reading, "_rests_until", 0.0)
        assert get(late) == LIST
    assert caplog.text.count("cannot be read: database is locked") == 1


def test_a_full_cache_stops_growing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At its limit it says so once, keeps what it has, and the file is no larger than that."""
    keys = [distribution_key(["m"], [n], 3) for n in range(30)]
    many = TokenDistribution(WHOLE.pieces[:8_000], (-1.0,) * 8_000)
    for _ in range(2):  # the second opening finds it full
        with closing(DistributionCache(tmp_path, max_bytes=2**20)) as cache:
            for key in keys:
                put(cache, key, many)
            kept = [get(cache, key) is not None for key in keys]
        assert 0 < sum(kept) < len(keys)
        assert kept == sorted(kept, reverse=True)
        assert (tmp_path / FILE_NAME).stat().st_size <= 2**20
    assert caplog.text.count("its limit is 1048576 bytes") == 2


@pytest.mark.parametrize("max_bytes", [0, 2**14])
def test_a_limit_deletes_nothing(tmp_path: Path, max_bytes: int) -> None:
    """Nothing is evicted: with a limit below what is there all of it stays, whatever else is put."""
    keys = [distribution_key(["m"], [n], 3) for n in range(200)]
    with closing(DistributionCache(tmp_path, max_bytes=2**30)) as cache:
        asyncio.run(cache.put_many([(key, LIST) for key in keys]))
    with closing(DistributionCache(tmp_path, max_bytes=max_bytes)) as cache:
        for n in range(200):
            asyncio.run(cache.put_many([(distribution_key(["other"], [n], 3), LIST)]))
        assert asyncio.run(cache.get_many(keys)) == [LIST] * len(keys)


FULL_DISK = """
import asyncio, json, pathlib, resource, sys
from tests.unit.test_cache import LIST, WHOLE
from mope_bb import cache as cache_module
from mope_bb.cache import DistributionCache

cache_module.REST_S = 0.0
folder = pathlib.Path(sys.argv[1])
opened = DistributionCache(folder, max_bytes=2**30)
asyncio.run(opened.put("before", LIST))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, resource.RLIM_INFINITY))
for n in range(4):
    asyncio.run(opened.put(f"large {n}", WHOLE))
found = asyncio.run(opened.get_many(["before", "large 0"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
asyncio.run(opened.put("after", LIST))
found += asyncio.run(opened.get_many(["before", "after"]))
opened.close()
print(json.dumps([one == LIST for one in found]))
"""


def test_a_disk_that_fails(tmp_path: Path) -> None:
    """A file that may grow no further: one warning, what is there is read, and later it is written again."""
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout) == [True, False, True, True]
    assert found.stderr.count("cannot be written") == 1


def test_after_closing(cache: DistributionCache) -> None:
    """An answer that is still being given when the session is closed asks and puts in vain, without an error."""
    put(cache)
    cache.close()
    assert get(cache) is None
    put(cache)
    cache.close()


@pytest.mark.parametrize("is_old", [False, True])
def test_the_folder_is_private(tmp_path: Path, is_old: bool) -> None:
    """Only the user can read the folder, also when it was there before with other rights."""
    folder = tmp_path / "a" / "cache"
    if is_old:
        folder.mkdir(parents=True, mode=0o755)
    DistributionCache(folder, max_bytes=1).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
