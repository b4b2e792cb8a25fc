"""The file of the cache: bytes by key in one SQLite database, for many processes at a time.

A batch is written as a whole or not at all: `kill -9` at any moment leaves no half of one and costs nothing that was
written before it. A power cut may cost the newest batches, since the log is not flushed at each.

A file that somebody else has made is data. It must bear our mark and have our schema to the letter, triggers and views
among what it must not have, before a row of it is read; values are bytes of a bounded size; and nothing that stands in
it is run, unpickled, taken as a path or as a setting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from mope_bb.errors import ConfigError

T = TypeVar("T")
FILE_NAME: Final = "distributions.db"
APPLICATION_ID: Final = int.from_bytes(b"mope", "big")
"""What SQLite calls the mark that tells whose file it is."""
MAX_VALUE_BYTES: Final = 2**26
"""The list of a whole vocabulary takes about 10 MB: what is longer than this is not ours."""
WAIT_S: Final = 5.0
"""How long it is tried again while another process writes."""
_TABLE: Final = "CREATE TABLE entries (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL)"
_SCHEMA: Final = [("index", "sqlite_autoindex_entries_1", None), ("table", "entries", _TABLE)]
_NAMES: Final = frozenset((FILE_NAME, *(f"{FILE_NAME}-{end}" for end in ("wal", "shm", "journal"))))
_ROWS_AT_A_TIME: Final = 1000


class Row(NamedTuple):
    """One entry as it stands in the file."""

    row_id: int
    key: str
    value: bytes | None
    """None: no bytes, or too many."""


class CacheFile:
    """One connection, for the thread that makes it."""

    def __init__(
        self, folder: Path, *, version: int | None, max_bytes: int | None = None, creates: bool = False
    ) -> None:
        """Open the file in `folder`. `creates` it where it is missing, in a folder that only the user can read.

        `version` is the one it must have, None any; `max_bytes` is how far it may grow. Raises ConfigError for what is
        no cache, or one of another version; OSError and sqlite3.Error, which `explain` puts in words.
        """
        self.path = folder / FILE_NAME
        if creates:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(
                f"{str(self.path)!r} is not a file, as a cache is",
                hint="Delete it yourself, or set another [cache] path.",
            )
        self._connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={'rwc' if creates else 'rw'}",
            uri=True,
            timeout=WAIT_S,
            isolation_level=None,
        )
        try:
            self._set_up(version if creates else None)
            self._check(version)
            if max_bytes is not None:
                # At its limit SQLite answers as where the disk is full. It never falls below what is there.
                self._connection.execute(f"PRAGMA max_page_count = {max(1, max_bytes // self._pragma('page_size'))}")
        except BaseException:
            self.close()
            raise

    def _set_up(self, new_version: int | None) -> None:
        connection = self._connection
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.text_factory = lambda data: data.decode(errors="replace")
        # SQLite's own advice for files of others: sqlite.org/security.html.
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "synchronous = NORMAL"):
            connection.execute(f"PRAGMA {setting}")
        if new_version is not None:
            if self._is_empty():
                self._create(new_version)
            patiently(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone())

    def _is_empty(self) -> bool:
        return not self._schema() and self._pragma("application_id") == 0

    def _schema(self) -> list[tuple[str, str, str | None]]:
        return patiently(
            lambda: self._connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()
        )

    def _pragma(self, name: str) -> int:
        return int(patiently(lambda: self._connection.execute(f"PRAGMA {name}").fetchone())[0])

    def _create(self, version: int) -> None:
        """All that a new file holds, in one transaction, whoever of many processes comes first."""
        # To be set before the first page is written: what is removed later makes the file smaller.
        self._connection.execute("PRAGMA auto_vacuum = FULL")
        with transaction(self._connection, "EXCLUSIVE"):
            if self._is_empty():
                self._connection.execute(_TABLE)
                self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {version}")

    def _check(self, version: int | None) -> None:
        if self._pragma("application_id") != APPLICATION_ID or self._schema() != _SCHEMA:
            raise ConfigError(
                f"{str(self.path)!r} is no cache of mope-bb", hint="Set another [cache] path; nothing was changed here."
            )
        if version not in (None, self.version):
            raise ConfigError(
                f"the cache {str(self.path.parent)!r} has format {self.version}, and this version reads {version}",
                hint=f"`{_clear_command(self.path.parent)}` empties it; or set another [cache] path.",
            )

    @property
    def version(self) -> int:
        """What it was created or last cleared as."""
        return self._pragma("user_version")

    @property
    def num_entries(self) -> int:
        """How many entries there are."""
        return int(self._connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0])

    @property
    def num_bytes(self) -> int:
        """What counts against `max_bytes`."""
        return self._pragma("page_count") * self._pragma("page_size")

    def get(self, key: str) -> bytes | None:
        """What is stored under `key`. Raises ValueError where it is nothing that `put_many` stores."""
        try:
            row = self._connection.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        except sqlite3.DataError as error:
            raise ValueError(str(error)) from None
        if row is None:
            return None
        if not isinstance(row[0], bytes):
            raise ValueError(f"{type(row[0]).__name__} in the place of bytes")
        return row[0]

    def put_many(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """Store values under their keys, all of them or none."""
        with transaction(self._connection):
            self._connection.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", entries)

    def rows(self) -> Iterator[Row]:
        """All entries, one after another; of those that are put meanwhile some."""
        select = "SELECT rowid FROM entries WHERE rowid > ? ORDER BY rowid LIMIT ?"
        last = -(2**63)
        while found := self._connection.execute(select, (last, _ROWS_AT_A_TIME)).fetchall():
            for (row_id,) in found:
                row = self._row(row_id)
                if row is not None:
                    yield row
            last = found[-1][0]

    def _row(self, row_id: int) -> Row | None:
        try:
            found = self._connection.execute("SELECT key, value FROM entries WHERE rowid = ?", (row_id,)).fetchone()
        except sqlite3.DataError:
            return Row(row_id, "", None)
        if found is None:  # removed by another process
            return None
        key, value = found
        return Row(row_id, str(key), value if isinstance(value, bytes) else None)

    def remove(self, row: Row) -> None:
        """Remove `row`, unless another process has put a new value in its place."""
        with transaction(self._connection):
            if row.value is None:
                self._connection.execute(
                    "DELETE FROM entries WHERE rowid = ? AND (typeof(value) <> 'blob' OR length(value) > ?)",
                    (row.row_id, MAX_VALUE_BYTES // 2),
                )
            else:
                self._connection.execute("DELETE FROM entries WHERE rowid = ? AND value IS ?", (row.row_id, row.value))

    def clear(self, version: int) -> int:
        """Remove all entries, some at a time, so that nobody has to wait long; how many. Then it has `version`."""
        delete = "DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries WHERE rowid <= ? LIMIT ?)"
        (last,) = self._connection.execute("SELECT MAX(rowid) FROM entries").fetchone()
        num_removed = 0
        while last is not None:
            with transaction(self._connection):
                removed = self._connection.execute(delete, (last, _ROWS_AT_A_TIME)).rowcount
            num_removed += removed
            if removed < _ROWS_AT_A_TIME:
                break
        if self.version != version:
            self._connection.execute(f"PRAGMA user_version = {version}")
        # Gives the space back now, unless somebody is reading: then it happens later.
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return num_removed

    def examine(self) -> None:
        """Let SQLite look at every page. Raises ConfigError where the file as a whole is damaged."""
        (found,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise _damaged(self.path.parent, " ".join(found.split()))

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """All that is done inside, or nothing; waits for other processes as `patiently` does."""
    patiently(lambda: connection.execute(f"BEGIN {kind}"))
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # After a full disk SQLite has rolled back already.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def patiently(action: Callable[[], T]) -> T:
    """`action`, tried again where SQLite says at once that others are busy, though it mostly waits by itself."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() >= deadline:
                raise
            time.sleep(0.005)


def _code(error: Exception) -> int | None:
    """SQLite's number of `error`, without what it adds in the higher bits."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def is_damage(error: Exception) -> bool:
    """The file is broken: no time and no other try will mend it."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_passing(error: Exception) -> bool:
    """The file may be as it should, and what is wrong may pass: others are busy, the disk is full or fails."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def explain(folder: Path, error: sqlite3.Error | OSError) -> ConfigError:
    """What is wrong with the file in `folder`, and what to do about it."""
    if is_damage(error):
        return _damaged(folder, error)
    return ConfigError(
        f"the cache {str(folder)!r} cannot be opened: {error}", hint="Set another [cache] path, or enabled = false."
    )


def _damaged(folder: Path, reason: object) -> ConfigError:
    return ConfigError(
        f"the cache {str(folder)!r} is damaged: {reason}",
        hint=f"`{_clear_command(folder)}` deletes it; or set another [cache] path, or enabled = false.",
    )


def _clear_command(folder: Path) -> str:
    return f"mope-bb cache clear --path {shlex.quote(str(folder))}"


def delete_damaged(folder: Path) -> None:
    """Delete `folder` with the damaged file in it. Raises ConfigError where it holds anything else, and OSError."""
    folder = folder.resolve()
    with os.scandir(folder) as found:
        others = [one.name for one in found if one.name not in _NAMES or not one.is_file(follow_symlinks=False)]
    if others:
        raise ConfigError(
            f"{str(folder)!r} holds {min(others)!r} beside a damaged cache, so it is not deleted",
            hint=f"Delete {FILE_NAME}* in it yourself.",
        )
    # All at once: the log of a damaged file must never stand beside a new one, which another process may make.
    moved = Path(tempfile.mkdtemp(prefix=f"{folder.name}-damaged-", dir=folder.parent))
    folder.rename(moved)
    for name in _NAMES:
        (moved / name).unlink(missing_ok=True)
    moved.rmdir()
