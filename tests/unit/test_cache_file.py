"""Files that are damaged or made by strangers: nothing in them is run, believed or deleted, and all errors are ours."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import pickle
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from mope_bb.cache import FORMAT, DistributionCache, distribution_key, open_entry, seal_entry
from mope_bb.cache_file import APPLICATION_ID, FILE_NAME, CacheFile
from mope_bb.errors import ConfigError
from mope_bb.types import Piece, TokenDistribution

LIST = TokenDistribution((Piece(b"yes", 1), Piece(b"no", 2)), (-0.25, -1.75), 9)
KEY = distribution_key(["m"], [1, 2], 3)


def fill(folder: Path, num_entries: int = 1) -> list[str]:
    """Make a cache with so many entries, all in the file itself and not in its log; their keys."""
    keys = [distribution_key(["m"], [1, 2 + n], 3) for n in range(num_entries)]
    with closing(DistributionCache(folder, max_bytes=2**30)) as cache:
        asyncio.run(cache.put_many([(key, LIST) for key in keys]))
    return keys


def change(folder: Path, *statements: str, values: tuple[Any, ...] = ()) -> None:
    """Run SQL on the file, as whoever made it might."""
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement, values)


def get(folder: Path, key: str = KEY) -> TokenDistribution | None:
    """What a new opening finds under `key`."""
    with closing(DistributionCache(folder, max_bytes=2**30)) as cache:
        return asyncio.run(cache.get(key))


class Payload:
    """When unpickled it calls `_explode`."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _explode, ()


EXPLODED: list[bool] = []


def _explode() -> str:
    EXPLODED.append(True)
    return "exploded"


def test_the_payload_does_explode() -> None:
    """The trap works: unpickling has the side effect that the next test looks for."""
    EXPLODED.clear()
    assert pickle.loads(pickle.dumps(Payload())) == "exploded"  # noqa: S301  # the trap itself
    assert EXPLODED == [True]
    EXPLODED.clear()


def sealed(data: bytes) -> bytes:
    """`data` with the checksum that a stranger too can compute."""
    return hashlib.blake2b(KEY.encode() + data, digest_size=8).digest() + data


DOCUMENT: dict[str, Any] = orjson.loads(seal_entry(KEY, LIST)[8:])
CHANGED: list[dict[str, Any]] = [
    {"pieces": []},
    {"pieces": [], "logprobs": []},
    {"pieces": 3},
    {"pieces": "ab"},
    {"pieces": [["a"], ["b"]]},
    {"pieces": [[1, 1], ["b", 2]]},
    {"pieces": [["a", "1"], ["b", 2]]},
    {"pieces": [["a", [1]], ["b", 2]]},
    {"pieces": [["a", True], ["b", 2]]},
    {"pieces": [["a", 1], ["a", 1]]},
    {"pieces": [["€", 1], ["b", 2]]},
    {"logprobs": [-0.25]},
    {"logprobs": 3},
    {"logprobs": "ab"},
    {"logprobs": ["x", "y"]},
    {"logprobs": [-1.75, -0.25]},
    {"logprobs": [2.0, -0.25]},
    {"logprobs": [None, -0.25]},
    {"vocab_size": "many"},
    {"is_guess": 1},
]


@pytest.mark.parametrize(
    "value",
    [
        pickle.dumps(Payload()),
        sealed(pickle.dumps(Payload())),
        b"",
        b"short",
        "text",
        17,
        0.5,
        seal_entry("another key", LIST),
        seal_entry(KEY, LIST)[:-1],
        sealed(b"not json"),
        sealed(b"[]"),
        sealed(b"null"),
        sealed(b"{}"),
        sealed(b"[" * 100_000),
        *(sealed(orjson.dumps(DOCUMENT | changed)) for changed in CHANGED),
        *(sealed(orjson.dumps({k: v for k, v in DOCUMENT.items() if k != name})) for name in DOCUMENT),
        sealed(orjson.dumps(DOCUMENT).replace(b"-1.75", b"-1e999")),
        sealed(orjson.dumps(DOCUMENT).replace(b"-1.75", b"NaN")),
    ],
)
def test_a_damaged_entry_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture, value: object) -> None:
    """Whatever stands under a key, pickles among them: "not known", with a warning, and a new put repairs it."""
    EXPLODED.clear()
    fill(tmp_path)
    change(tmp_path, "UPDATE entries SET value = ?", values=(value,))
    with closing(DistributionCache(tmp_path, max_bytes=2**30)) as cache:
        assert asyncio.run(cache.get(KEY)) is None
        assert caplog.text.count("damaged") == 1
        asyncio.run(cache.put(KEY, LIST))
        assert asyncio.run(cache.get(KEY)) == LIST
    assert EXPLODED == []


def test_many_damaged_entries_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file full of them must not fill the screen."""
    keys = fill(tmp_path, 50)
    change(tmp_path, "UPDATE entries SET value = x'00'")
    with closing(DistributionCache(tmp_path, max_bytes=2**30)) as cache, caplog.at_level(logging.WARNING):
        assert asyncio.run(cache.get_many(keys)) == [None] * 50
    assert caplog.text.count("damaged") == 1


def test_a_value_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself refuses to load more than a list can be."""
    fill(tmp_path)
    change(tmp_path, "UPDATE entries SET value = zeroblob(100000)")
    monkeypatch.setattr("mope_bb.cache_file.MAX_VALUE_BYTES", 50_000)
    with closing(CacheFile(tmp_path, version=FORMAT)) as file:
        with pytest.raises(ValueError, match="too big"):
            file.get(KEY)
        (row,) = file.rows()
        assert row.value is None
        file.remove(row)
        assert file.num_entries == 0


FOREIGN = {
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END",
    "a view": "CREATE VIEW v AS SELECT * FROM entries",
    "an index": "CREATE INDEX i ON entries (value)",
    "one more table": "CREATE TABLE more (x)",
    "one more column": "ALTER TABLE entries ADD COLUMN more",
    "other names": "ALTER TABLE entries RENAME TO others",
    "no table": "DROP TABLE entries",
    "somebody else's mark": "PRAGMA application_id = 1",
    "no mark": "PRAGMA application_id = 0",
}


@pytest.mark.parametrize("statement", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_not_ours(tmp_path: Path, statement: str) -> None:
    """It is refused before a row is read, with what to do, and stays as it is."""
    fill(tmp_path)
    change(tmp_path, statement)
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(ConfigError, match="is no cache of mope-bb") as caught:
        DistributionCache(tmp_path, max_bytes=2**30)
    assert "another [cache] path" in str(caught.value.hint)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_another_format(tmp_path: Path) -> None:
    """Entries of another format are neither read nor thrown away: the error names the command that does."""
    fill(tmp_path)
    change(tmp_path, f"PRAGMA user_version = {FORMAT + 1}")
    with pytest.raises(ConfigError, match=f"format {FORMAT + 1}, and this version reads {FORMAT}") as caught:
        DistributionCache(tmp_path, max_bytes=2**30)
    assert f"mope-bb cache clear --path {tmp_path}" in str(caught.value.hint)
    with closing(CacheFile(tmp_path, version=None)) as file:
        assert file.num_entries == 1


def _garbage(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_schema(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:4096] = random.Random(0).randbytes(3996)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_garbage, _cut, _without_schema])
def test_a_damaged_file(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """When it is opened: an error that names the command that deletes it, and until then it stays."""
    fill(tmp_path, 200)
    path = tmp_path / FILE_NAME
    damage(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is damaged") as caught:
        DistributionCache(tmp_path, max_bytes=2**30)
    assert f"mope-bb cache clear --path {tmp_path}" in str(caught.value.hint)
    assert path.read_bytes() == before


def test_a_file_that_breaks_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Answers go on without it: a warning each for reading and writing, and no more of either."""
    keys = fill(tmp_path, 200)
    path = tmp_path / FILE_NAME
    with closing(DistributionCache(tmp_path, max_bytes=2**30)) as cache:
        data = path.read_bytes()
        path.write_bytes(data[:4096] + random.Random(0).randbytes(len(data) - 4096))
        for _ in range(2):
            assert asyncio.run(cache.get_many(keys[:20])) == [None] * 20
            asyncio.run(cache.put("new", LIST))
    assert caplog.text.count("cannot be read") == 1
    assert caplog.text.count("cannot be written") <= 1


def test_a_file_that_is_cut_in_use(tmp_path: Path) -> None:
    """It is no crash either, and nothing wrong is read."""
    keys = fill(tmp_path, 2000)
    path = tmp_path / FILE_NAME
    with closing(DistributionCache(tmp_path, max_bytes=2**30)) as cache:
        assert asyncio.run(cache.get(keys[0])) == LIST
        with path.open("r+b") as file:
            file.truncate(3 * 4096)
        found = asyncio.run(cache.get_many(keys))
        assert set(found) <= {LIST, None}
        assert None in found


@pytest.mark.parametrize("seed", range(20))
def test_no_flipped_bit_changes_an_answer(tmp_path: Path, seed: int) -> None:
    """What comes out is what went in, or nothing, or an error of ours."""
    keys = fill(tmp_path, 60)
    path, chance = tmp_path / FILE_NAME, random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(30):
        data[chance.randrange(100, len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    try:
        with closing(DistributionCache(tmp_path, max_bytes=2**30)) as cache:
            assert set(asyncio.run(cache.get_many(keys))) <= {LIST, None}
            asyncio.run(cache.put_many([(key, LIST) for key in keys]))
    except ConfigError:
        pass


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    """An error of the configuration."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        DistributionCache(tmp_path / "file", max_bytes=1)
    assert "[cache] path" in str(caught.value.hint)


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    """The same, and it stays."""
    (tmp_path / FILE_NAME / "precious").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not a file"):
        DistributionCache(tmp_path, max_bytes=1)
    assert (tmp_path / FILE_NAME / "precious").exists()


@pytest.mark.parametrize("statements", [(), ("PRAGMA journal_mode = WAL",), ("PRAGMA auto_vacuum = FULL",)])
def test_what_a_kill_leaves_of_a_new_file(tmp_path: Path, statements: tuple[str, ...]) -> None:
    """A process killed while it made the file leaves an empty one, which the next one fills."""
    (tmp_path / FILE_NAME).touch()
    change(tmp_path, *statements)
    fill(tmp_path)
    assert get(tmp_path) == LIST


def test_the_space_is_given_back(tmp_path: Path) -> None:
    """Clearing makes the file small, gives it the format that is asked for, and those who use it go on."""
    fill(tmp_path, 3000)
    with closing(DistributionCache(tmp_path, max_bytes=2**30)) as cache:
        assert asyncio.run(cache.get(KEY)) == LIST
        with closing(CacheFile(tmp_path, version=None)) as file:
            before = file.num_bytes
            assert file.clear(FORMAT + 1) == 3000
            assert (file.version, file.num_entries) == (FORMAT + 1, 0)
            assert file.num_bytes < before / 10
            file.clear(FORMAT)
        assert asyncio.run(cache.get(KEY)) is None
        asyncio.run(cache.put(KEY, LIST))
    assert get(tmp_path) == LIST


def test_a_row_that_was_replaced_is_not_removed(tmp_path: Path) -> None:
    """What another process has put in the place of a damaged row stays."""
    fill(tmp_path)
    change(tmp_path, "UPDATE entries SET value = x'00'")
    with closing(CacheFile(tmp_path, version=FORMAT)) as file:
        (row,) = file.rows()
        change(tmp_path, "UPDATE entries SET value = ?", values=(seal_entry(KEY, LIST),))
        file.remove(row)
        (row,) = file.rows()
        assert open_entry(row.key, row.value or b"") == LIST


def test_the_mark_is_readable(tmp_path: Path) -> None:
    """`file` and others see whose it is: SQLite keeps the mark at byte 68."""
    fill(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes()[68:72] == b"mope" == APPLICATION_ID.to_bytes(4, "big")
