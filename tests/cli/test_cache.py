"""`mope-bb cache`: what it shows, what it deletes, and what it never touches."""

from __future__ import annotations

import asyncio
import os
import pty
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mope_bb.cache import FORMAT, DistributionCache, distribution_key
from mope_bb.cache_file import FILE_NAME
from mope_bb.types import Piece, TokenDistribution
from tests.command_line import Run

LIST = TokenDistribution((Piece(b"yes", 1), Piece(b"no", 2)), (-0.25, -1.75), 9)
KEYS = [distribution_key(["m"], [n], 3) for n in range(1200)]
CONFIGURATION = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a cache of 1,200 entries."""
    with closing(DistributionCache(tmp_path / "cache", max_bytes=2**30)) as cache:
        asyncio.run(cache.put_many([(key, LIST) for key in KEYS]))
    return tmp_path / "cache"


def found_in(folder: Path, keys: list[str] = KEYS) -> int:
    """How many of `keys` the cache answers."""
    with closing(DistributionCache(folder, max_bytes=2**30)) as cache:
        return sum(one == LIST for one in asyncio.run(cache.get_many(keys)))


def change(folder: Path, statement: str, *values: object) -> None:
    """Run SQL on the file."""
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        connection.execute(statement, values)


def test_stats(mope: Run, folder: Path) -> None:
    """Folder, entries, bytes, limit and format."""
    lines = dict(line.split(maxsplit=1) for line in mope("cache", "stats", "--path", str(folder)).out.splitlines())
    size = (folder / FILE_NAME).stat().st_size
    assert lines == {
        "folder": str(folder),
        "entries": "1,200",
        "bytes": f"{size:,}",
        "limit": f"{2 * 2**30:,} bytes",
        "format": str(FORMAT),
    }


def test_the_cache_of_a_configuration(mope: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--config means its folder and its limit; without an option it is the user's own."""
    config = folder.parent / "mope.toml"
    expert = '[[experts]]\nname = "a"\nprovider = "scripted"\nscript = [{"a" = 1.0}]\n'
    config.write_text(f'{expert}[cache]\npath = "cache"\nmax_bytes = 12345678\n')
    assert "entries  1,200\n" in mope("cache", "stats", "-c", str(config)).out
    assert "limit    12,345,678 bytes\n" in mope("cache", "stats", "--config", str(config)).out
    monkeypatch.setenv("MOPE_BB_HOME", str(folder.parent / "home"))
    result = mope("cache", "stats")
    assert (result.status, result.out) == (0, "")
    assert result.err == f"There is no cache in {folder.parent / 'home' / 'distributions'} yet.\n"
    assert not (folder.parent / "home").exists()
    result = mope("cache", "stats", "--config", str(config), "--path", str(folder))
    result.assert_refused(CONFIGURATION, "--config and --path")


def test_clear(mope: Run, folder: Path) -> None:
    """All entries go, and the space with them; those who have the cache open go on with it."""
    size = (folder / FILE_NAME).stat().st_size
    with closing(DistributionCache(folder, max_bytes=2**30)) as cache:
        assert asyncio.run(cache.get(KEYS[0])) == LIST
        result = mope("cache", "clear", "--path", str(folder), "--yes")
        assert (result.status, result.err) == (0, "Deleted 1,200 entries.\n")
        assert asyncio.run(cache.get(KEYS[0])) is None
        asyncio.run(cache.put(KEYS[0], LIST))
    assert (folder / FILE_NAME).stat().st_size < size / 4
    assert found_in(folder) == 1


def test_clear_asks(mope: Run, folder: Path) -> None:
    """Without --yes and without anybody to ask nothing is deleted."""
    mope("cache", "clear", "--path", str(folder)).assert_refused(CONFIGURATION, "--yes")
    assert found_in(folder) == len(KEYS)


@pytest.mark.parametrize(("answer", "status", "num_left"), [(b"n\n", 130, 1200), (b"y\n", 0, 0)])
def test_clear_in_a_terminal(folder: Path, answer: bytes, status: int, num_left: int) -> None:
    """It says what would be deleted, and does what is answered."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "mope_bb", "cache", "clear", "--path", str(folder)]
    os.write(ours, answer)
    found = subprocess.run(arguments, stdin=theirs, capture_output=True, text=True, check=False)
    os.close(theirs)
    os.close(ours)
    assert "Delete 1,200 entries (" in found.stdout
    assert found.returncode == status, found.stderr
    assert found_in(folder) == num_left


def test_another_format_is_cleared(mope: Run, folder: Path) -> None:
    """Where the error of an opening says so, it helps."""
    change(folder, f"PRAGMA user_version = {FORMAT - 1}")
    mope("cache", "stats", "--path", str(folder)).assert_refused(CONFIGURATION, "format", "mope-bb cache clear")
    mope("cache", "verify", "--path", str(folder)).assert_refused(CONFIGURATION, "format", "mope-bb cache clear")
    assert mope("cache", "clear", "--yes", "--path", str(folder)).status == 0
    assert "entries  0\n" in mope("cache", "stats", "--path", str(folder)).out


def test_a_damaged_file_is_cleared(mope: Run, folder: Path) -> None:
    """The same for a file that is no database any more."""
    (folder / FILE_NAME).write_bytes(b"garbage" * 1000)
    for command in ("stats", "verify"):
        mope("cache", command, "--path", str(folder)).assert_refused(CONFIGURATION, "is damaged", "mope-bb cache clear")
    mope("cache", "clear", "--path", str(folder)).assert_refused(CONFIGURATION, "--yes")
    assert (folder / FILE_NAME).exists()
    result = mope("cache", "clear", "--path", str(folder), "--yes")
    assert (result.status, result.err) == (0, "Deleted the damaged cache.\n")
    assert list(folder.parent.iterdir()) == []
    assert found_in(folder) == 0


@pytest.mark.parametrize("command", [["stats"], ["verify", "--repair"], ["clear", "--yes"]])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.txt", b"ten years of work"),
        (FILE_NAME, "another program's"),
        (FILE_NAME, b"garbage" * 1000),
    ],
    ids=["no cache", "another program's database", "a damaged file beside another file"],
)
def test_nothing_else_is_touched(
    mope: Run, tmp_path: Path, command: list[str], name: str, content: bytes | str
) -> None:
    """A folder that is no cache of ours, or holds more, is refused and stays as it is."""
    folder = tmp_path / "mine"
    folder.mkdir()
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
        (folder / "photo.jpg").write_bytes(b"me")
    else:
        change(folder, "CREATE TABLE entries (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL)")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    mope("cache", *command, "--path", str(folder)).assert_refused(CONFIGURATION, str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_in_the_place_of_the_folder(mope: Run, tmp_path: Path) -> None:
    """A path that is no folder."""
    (tmp_path / "file").write_text("x")
    mope("cache", "clear", "--yes", "--path", str(tmp_path / "file")).assert_refused(CONFIGURATION, "cannot be read")


def test_verify(mope: Run, folder: Path) -> None:
    """A sound cache has status 0; damaged entries are named, and stay until --repair."""
    result = mope("cache", "verify", "--path", str(folder))
    assert (result.status, result.out) == (0, "")
    assert "1,200 entries are sound." in result.err
    change(folder, "UPDATE entries SET value = x'00' WHERE key = ?", KEYS[3])
    change(folder, "UPDATE entries SET value = 'text' WHERE key = ?", KEYS[5])
    change(folder, "UPDATE entries SET key = '\x1b[2Jnasty' WHERE key = ?", KEYS[7])
    change(folder, "UPDATE entries SET key = CAST(x'ff41' AS TEXT) WHERE key = ?", KEYS[9])
    damaged = {KEYS[3][:12], KEYS[5][:12], "??2Jnasty", "?A"}
    result = mope("cache", "verify", "--path", str(folder))
    assert result.status == 1
    assert {line.split(": ")[1] for line in result.out.splitlines()} == damaged
    assert all(line.startswith("damaged: ") for line in result.out.splitlines())
    assert "1,196 entries are sound, 4 damaged." in result.err
    result = mope("cache", "verify", "--repair", "--path", str(folder))
    assert result.status == 0
    assert {line.split(": ")[1] for line in result.out.splitlines()} == damaged
    assert "4 damaged and removed." in result.err
    assert mope("cache", "verify", "--path", str(folder)).status == 0
    assert found_in(folder) == 1196


def test_verify_of_a_broken_file(mope: Run, folder: Path) -> None:
    """What is wrong with the file as a whole, not with an entry, is the error of a damaged cache."""
    path = folder / FILE_NAME
    data = path.read_bytes()
    path.write_bytes(data[: 5 * 4096] + b"\xff" * (len(data) - 5 * 4096))
    result = mope("cache", "verify", "--path", str(folder))
    result.assert_refused(CONFIGURATION, "is damaged", "mope-bb cache clear")
