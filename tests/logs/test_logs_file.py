"""The file: what comes back, who writes at the same time, kills, damage, and what deleting leaves."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mope_bb.errors import ConfigError
from mope_bb.keys import HIDDEN, Key
from mope_bb.logs import LogEntry, open_log, open_trace, opened_entry, seal_trace
from mope_bb.logs_file import LogFile
from tests.logs.entries import FULL, ROOT, TOKENS, asking
from tests.security.echo import KEY


def read(path: Path, answer_id: int | None) -> LogEntry:
    """The entry that was recorded as `answer_id`."""
    assert answer_id is not None
    with LogFile(path) as file:
        found = file.get(answer_id)
    assert found is not None
    return opened_entry(*found)


def start_writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    """A process that records `count` answers and prints their ids."""
    arguments = [sys.executable, "-m", "tests.logs.entries", str(path), name, str(count)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("entry", [FULL, replace(FULL, trace=None, seed=None, cost=None, pcm=None, preference=None)])
def test_what_is_recorded_comes_back(home: Path, entry: LogEntry) -> None:
    """Every field, and numbers that no column of SQLite holds."""
    log = open_log()
    assert read(log.path, log.record(entry)) == entry


def test_only_the_user_can_read_it(home: Path) -> None:
    """The folder that is made, the file, and those that SQLite puts beside it."""
    with closing(open_log()) as log:
        log.record(FULL)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (home, *home.iterdir())}
    assert modes == {"home": 0o700, "logs.db": 0o600, "logs.db-wal": 0o600, "logs.db-shm": 0o600}


def test_two_processes_write_at_once(home: Path) -> None:
    """Both begin the file, and nothing is lost."""
    writers = [start_writer(home / "logs.db", name, 200) for name in ("one", "two")]
    told = [writer.communicate(timeout=120) for writer in writers]
    assert [err for _, err in told] == ["", ""]
    ids = [int(line) for out, _ in told for line in out.split()]
    assert len(set(ids)) == 400
    with LogFile(home / "logs.db") as file:
        assert sorted(file.ids()) == sorted(ids)
        questions = {brief.question for brief in file.newest(1000)}
    assert questions == {f"{name} {number}" for name in ("one", "two") for number in range(200)}


def test_kills(home: Path) -> None:
    """Whatever a killed process has called recorded is there, whole, and the next one goes on."""
    told = list[int]()
    for name in ("one", "two", "three"):
        with start_writer(home / "logs.db", name, 10**6) as writer:
            assert writer.stdout is not None
            told += [int(writer.stdout.readline()) for _ in range(20)]
            writer.kill()
            told += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    with closing(sqlite3.connect(home / "logs.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with LogFile(home / "logs.db") as file:
        assert set(told) <= set(file.ids())
        assert all(opened_entry(*found).trace == TOKENS for found in map(file.get, file.ids()) if found is not None)


def test_deleting_leaves_nothing(home: Path) -> None:
    """Neither the text nor its words can be found in any file any more; other answers can."""
    log = open_log()
    secret, kept = (log.record(asking(f"{word} is my illness", f"{word}!")) for word in ("zyxwvut", "harmless"))
    assert secret is not None
    log.close()

    def left() -> bytes:
        return b"".join(path.read_bytes() for path in home.iterdir())

    assert b"zyxwvut" in left()
    with LogFile(log.path) as file:
        assert file.delete([secret, 77]) == 1
        assert list(file.ids()) == [kept]
        assert file.search("zyxwvut", 9) == []
        assert [brief.id for brief in file.search("harmless", 9)] == [kept]
        assert b"zyxwvut" not in left()
    assert log.record(FULL) == 3  # an id is never given again


def test_keys_are_not_kept(home: Path) -> None:
    """A key that a person pasted, a model repeated or an error quotes; nor does the trace spell it."""
    Key(KEY)
    log = open_log()
    entry = asking(f"my key is {KEY}", f"your key is {KEY}", error_class="E", error_message=KEY, preference=KEY)
    found = read(log.path, log.record(replace(entry, options={"user": KEY}, trace=TOKENS)))
    assert (found.answer, found.error_message, found.preference) == (f"your key is {HIDDEN}", HIDDEN, HIDDEN)
    assert found.trace is None
    log.close()
    assert all(KEY.encode() not in path.read_bytes() for path in home.iterdir())


def test_half_of_a_surrogate_pair(home: Path) -> None:
    """It is no text, and costs nobody the record."""
    log = open_log()
    assert read(log.path, log.record(asking("\ud800?", "\udfff"))).answer == "?"


def break_file(path: Path, how: str) -> None:
    """Make something else of a log."""
    with closing(open_log(path)) as log:
        assert log.record(FULL) == 1
    if how == "garbage":
        path.write_bytes(b"garbage" * 1000)
    elif how == "torn":
        path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 8192)
    else:
        with closing(sqlite3.connect(path)) as database:
            database.executescript(how)


BROKEN = {
    "garbage": "is damaged",
    "torn": "is damaged",
    "PRAGMA user_version = 99": "has format 99",
    "PRAGMA application_id = 7": "is no log of mope-bb",
    "CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM traces; END": "its tables are others",
    "ALTER TABLE answers ADD COLUMN more TEXT": "its tables are others",
}


@pytest.mark.parametrize(("how", "message"), BROKEN.items())
def test_broken_files(how: str, message: str, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are told once, with what to do, not touched, and nobody who records has an error of it."""
    path = home / "logs.db"
    break_file(path, how)
    before = path.read_bytes()
    log = open_log(path)
    assert (log.record(FULL), log.record(FULL)) == (None, None)
    [warning] = caplog.records
    assert message in warning.getMessage() and "[logs] path" in warning.getMessage()
    with pytest.raises(ConfigError, match=message):
        LogFile(path)
    assert path.read_bytes() == before


def test_tables_of_the_user_do_no_harm(home: Path) -> None:
    """Who looks at the file with other programs may add views and tables."""
    break_file(home / "logs.db", "CREATE VIEW mine AS SELECT answer FROM answers; CREATE TABLE own (x)")
    assert open_log().record(FULL) == 2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE answers SET messages = '{'",
        "UPDATE answers SET messages = '[1]'",
        "UPDATE answers SET lambdas = '[]'",
        'UPDATE answers SET lambdas = \'{"a": "b"}\'',
        "UPDATE answers SET answer = x'ff'",
        "UPDATE answers SET tool_calls = '[1]'",
        "UPDATE traces SET data = x'00'",
        "UPDATE traces SET data = 'text'",
    ],
)
def test_a_damaged_answer(change: str, home: Path) -> None:
    """It is an error of that answer alone."""
    break_file(home / "logs.db", change)
    with pytest.raises(ValueError, match="damaged"):
        read(home / "logs.db", 1)


def test_traces() -> None:
    """They come back; a cut one is no trace."""
    sealed = seal_trace(TOKENS)
    assert open_trace(sealed) == TOKENS
    with pytest.raises(ValueError, match="cut off"):
        open_trace(sealed[:-5])
