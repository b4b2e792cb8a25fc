"""The file of the log: chats and their traces in one SQLite database, for many processes at a time.

An answer is written as a whole or not at all: `kill -9` at any moment leaves no half of one. The file and its folder,
where they are made here, can be read by their user alone, and what is deleted is overwritten, in the index of words
too.

A file that somebody else has made is data: it must bear our mark and our tables to the letter and have no triggers,
nothing that stands in it is run, and what is no answer is told as damage.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from mope_bb.cache_file import is_damage, patiently, transaction
from mope_bb.errors import ConfigError

FORMAT: Final = 1
APPLICATION_ID: Final = int.from_bytes(b"mopl", "big")
MAX_VALUE_BYTES: Final = 2**26
WAIT_S: Final = 5.0
"""How long it is tried again while another process writes."""
ROWS_AT_A_TIME: Final = 50
_ANSWERS: Final = """CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation TEXT NOT NULL,
    started_at TEXT NOT NULL,
    ended_at TEXT NOT NULL,
    source TEXT NOT NULL,
    version TEXT NOT NULL,
    model TEXT NOT NULL,
    pcm TEXT,
    messages TEXT NOT NULL,
    question TEXT NOT NULL,
    preference TEXT,
    lambdas TEXT NOT NULL,
    merge TEXT NOT NULL,
    options TEXT NOT NULL,
    seed TEXT,
    answer TEXT NOT NULL,
    tool_calls TEXT NOT NULL,
    finish_reason TEXT,
    error_class TEXT,
    error_message TEXT,
    num_prompt_tokens INTEGER NOT NULL,
    num_completion_tokens INTEGER NOT NULL,
    effort TEXT NOT NULL,
    dropped TEXT NOT NULL,
    cost REAL
)"""
_TRACES: Final = "CREATE TABLE traces (id INTEGER PRIMARY KEY REFERENCES answers (id), data BLOB NOT NULL)"
_BY_TIME: Final = "CREATE INDEX answers_by_time ON answers (started_at)"
_WORDS: Final = (
    "CREATE VIRTUAL TABLE words USING fts5"
    "(question, answer, content='answers', content_rowid='id', tokenize='unicode61 remove_diacritics 2')"
)
_SCHEMA: Final = (_ANSWERS, _TRACES, _BY_TIME, _WORDS)
COLUMNS: Final = tuple(line.split()[0] for line in _ANSWERS.splitlines()[2:-1])
"""What stands in a row of `answers`, but for its id."""
_CONDITION: Final = (
    "(:since IS NULL OR started_at >= :since) AND (:until IS NULL OR started_at < :until)"
    " AND (:source IS NULL OR source = :source)"
)


@dataclass(frozen=True, slots=True)
class Which:
    """Which answers are meant; all by default."""

    since: str | None = None
    """Times as they stand in the file (`logs.utc_text`): begun then or later,"""
    until: str | None = None
    """and begun before."""
    source: str | None = None

    def values(self) -> dict[str, str | None]:
        """For `_CONDITION`."""
        return {"since": self.since, "until": self.until, "source": self.source}


class Brief(NamedTuple):
    """One answer in a list."""

    id: int
    started_at: str
    source: str
    preference: str | None
    question: str
    answer: str
    """Its beginning; of one that is found, what was found."""
    num_tokens: int
    state: str
    """How it ended: the finish reason, or the class of the error."""


_BRIEF: Final = (
    "id, started_at, source, preference, substr(answers.question, 1, 500), {answer}, num_completion_tokens,"
    " coalesce(error_class, finish_reason, '')"
)
_BEGINNING: Final = "substr(answers.answer, 1, 500)"


class LogFile:
    """One connection, for any thread: calls wait for each other."""

    def __init__(self, path: Path, *, creates: bool = False) -> None:
        """Open the file at `path`; `creates` it where it is missing.

        Raises ConfigError for what is no log, is damaged, or is of a newer version; see `explain` for what later calls
        raise (sqlite3.Error).
        """
        self.path = path
        self._lock = threading.RLock()
        try:
            if creates:
                _make_private(path)
            elif not path.exists():
                raise ConfigError(f"there is no log at {str(path)!r}")
            if not path.is_file():
                raise ConfigError(f"{str(path)!r} is not a file, as a log is", hint="Set another [logs] path.")
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw",
                uri=True,
                timeout=WAIT_S,
                isolation_level=None,
                check_same_thread=False,
            )
        except (OSError, sqlite3.Error) as error:
            raise explain(path, error) from None
        try:
            self._set_up(creates=creates)
        except sqlite3.Error as error:
            self.close()
            raise explain(path, error) from None
        except BaseException:
            self.close()
            raise

    def _set_up(self, *, creates: bool) -> None:
        connection = self._connection
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.text_factory = lambda data: data.decode(errors="replace")
        # SQLite's own advice for files of others: sqlite.org/security.html.
        for setting in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "synchronous = NORMAL"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute("PRAGMA secure_delete = ON")
        if creates and self._is_empty():
            self._create()
        self._check()
        if creates:
            patiently(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone())

    def _is_empty(self) -> bool:
        return not self._schema() and self._pragma("application_id") == 0

    def _schema(self) -> list[tuple[str, str]]:
        return patiently(lambda: self._connection.execute("SELECT type, sql FROM sqlite_master").fetchall())

    def _pragma(self, name: str) -> int:
        return int(patiently(lambda: self._connection.execute(f"PRAGMA {name}").fetchone())[0])

    def _create(self) -> None:
        # To be set before the first page is written: what is deleted later makes the file smaller.
        self._connection.execute("PRAGMA auto_vacuum = FULL")
        with transaction(self._connection, "EXCLUSIVE"):
            if self._is_empty():  # still: another process may have been first
                for statement in _SCHEMA:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _check(self) -> None:
        if self._pragma("application_id") != APPLICATION_ID:
            raise ConfigError(f"{str(self.path)!r} is no log of mope-bb", hint="Set another [logs] path.")
        version = self._pragma("user_version")
        if version > FORMAT:
            raise ConfigError(
                f"the log {str(self.path)!r} has format {version}, and this version of mope-bb reads {FORMAT}",
                hint="Update mope-bb, or set another [logs] path; nothing was changed here.",
            )
        schema = self._schema()
        # A user may add tables and views of their own; triggers would run when we write.
        if not {sql for _, sql in schema} >= set(_SCHEMA) or any(kind == "trigger" for kind, _ in schema):
            raise ConfigError(
                f"{str(self.path)!r} is no log of mope-bb: its tables are others", hint="Set another [logs] path."
            )

    def add(self, row: Sequence[Any], trace: bytes | None) -> int:
        """Write one answer, with the values of `COLUMNS`; its id."""
        with self._lock, transaction(self._connection):
            marks = ", ".join("?" * len(COLUMNS))
            insert = f"INSERT INTO answers ({', '.join(COLUMNS)}) VALUES ({marks})"
            answer_id = self._connection.execute(insert, row).lastrowid
            assert answer_id is not None
            self._connection.execute(
                "INSERT INTO words (rowid, question, answer) SELECT id, question, answer FROM answers WHERE id = ?",
                (answer_id,),
            )
            if trace is not None:
                self._connection.execute("INSERT INTO traces VALUES (?, ?)", (answer_id, trace))
            return answer_id

    def newest(self, count: int, which: Which = Which()) -> list[Brief]:
        """The last `count` answers, the newest first."""
        select = _BRIEF.format(answer=_BEGINNING)
        return self._briefs(
            f"SELECT {select} FROM answers WHERE {_CONDITION} ORDER BY id DESC LIMIT :count",
            {**which.values(), "count": count},
        )

    def search(self, words: str, count: int) -> list[Brief]:
        """Answers whose question and text hold every word, or words that begin so, the best first."""
        # A NUL would end SQLite's reading of the question.
        terms = words.replace("\0", " ").split()
        select = _BRIEF.format(answer="snippet(words, -1, '[', ']', '…', 12)")
        found = self._briefs(
            f"SELECT {select} FROM words JOIN answers ON answers.id = words.rowid"
            " WHERE words MATCH :query ORDER BY words.rank, id DESC LIMIT :count",
            # As quoted strings they are words whatever they look like.
            {"query": " ".join('"' + term.replace('"', '""') + '"*' for term in terms), "count": count},
        )
        # The index knows words: not signs, and not what stands inside a run of Chinese.
        return found or self._search_signs(terms, count)

    def _search_signs(self, terms: Sequence[str], count: int) -> list[Brief]:
        condition = " AND ".join(f"(instr(question, :t{n}) OR instr(answer, :t{n}))" for n in range(len(terms)))
        return self._briefs(
            f"SELECT {_BRIEF.format(answer=_BEGINNING)} FROM answers"
            f" WHERE {condition or 'FALSE'} ORDER BY id DESC LIMIT :count",
            {"count": count, **{f"t{n}": term for n, term in enumerate(terms)}},
        )

    def _briefs(self, query: str, values: dict[str, Any]) -> list[Brief]:
        with self._lock:
            return [Brief(*row) for row in self._connection.execute(query, values)]

    def get(self, answer_id: int) -> tuple[dict[str, Any], bytes | None] | None:
        """The columns of one answer by name, and its trace as it was added; None where there is no such answer."""
        with self._lock:
            row = self._connection.execute(
                f"SELECT {', '.join(COLUMNS)}, data FROM answers LEFT JOIN traces USING (id) WHERE id = ?", (answer_id,)
            ).fetchone()
        return None if row is None else (dict(zip(COLUMNS, row[:-1], strict=True)), row[-1])

    def has(self, answer_id: int) -> bool:
        """Whether there is such an answer."""
        with self._lock:
            return self._connection.execute("SELECT 1 FROM answers WHERE id = ?", (answer_id,)).fetchone() is not None

    def ids(self, which: Which = Which()) -> Iterator[int]:
        """The answers that are meant, the oldest first; some at a time, so that nobody who writes has to wait."""
        last = 0
        while True:
            with self._lock:
                found = self._connection.execute(
                    f"SELECT id FROM answers WHERE id > :last AND {_CONDITION} ORDER BY id LIMIT :count",
                    {**which.values(), "last": last, "count": ROWS_AT_A_TIME},
                ).fetchall()
            yield from (answer_id for (answer_id,) in found)
            if not found:
                return
            last = found[-1][0]

    def last_id(self) -> int | None:
        """The newest answer."""
        with self._lock:
            found: int | None = self._connection.execute("SELECT max(id) FROM answers").fetchone()[0]
        return found

    def count(self, which: Which = Which()) -> int:
        """How many answers are meant."""
        with self._lock:
            query = f"SELECT count(*) FROM answers WHERE {_CONDITION}"
            return int(self._connection.execute(query, which.values()).fetchone()[0])

    def totals(self) -> dict[str, Any]:
        """What the file holds: counts, bytes, tokens, and the times of the first and the last answer."""
        with self._lock:
            execute = self._connection.execute
            num_answers, num_conversations, num_tokens, num_errors, first, last = execute(
                "SELECT count(*), count(DISTINCT conversation), coalesce(sum(num_completion_tokens), 0),"
                " count(error_class), min(started_at), max(started_at) FROM answers"
            ).fetchone()
            by_source = dict(execute("SELECT source, count(*) FROM answers GROUP BY source ORDER BY source").fetchall())
            (num_trace_bytes,) = execute("SELECT coalesce(sum(length(data)), 0) FROM traces").fetchone()
        return {
            "path": str(self.path),
            "num_answers": num_answers,
            "num_conversations": num_conversations,
            "by_source": by_source,
            "num_tokens": num_tokens,
            "num_errors": num_errors,
            "first": first,
            "last": last,
            "num_bytes": self._pragma("page_count") * self._pragma("page_size"),
            "num_trace_bytes": num_trace_bytes,
        }

    def delete(self, ids: Sequence[int]) -> int:
        """Delete answers, all that exist of them or none, and overwrite what they held; how many they were."""
        connection = self._connection
        with self._lock:
            with transaction(self._connection):
                connection.executemany(
                    "INSERT INTO words (words, rowid, question, answer)"
                    " SELECT 'delete', id, question, answer FROM answers WHERE id = ?",
                    [(one,) for one in ids],
                )
                connection.executemany("DELETE FROM traces WHERE id = ?", [(one,) for one in ids])
                num_deleted = connection.executemany("DELETE FROM answers WHERE id = ?", [(one,) for one in ids])
                # Until its parts are joined the index keeps the words of what was deleted.
                connection.execute("INSERT INTO words (words) VALUES ('optimize')")
            # The write-ahead log holds them too, unless somebody is reading: then it is emptied later.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return num_deleted.rowcount

    def close(self) -> None:
        """Close the connection."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _make_private(path: Path) -> None:
    """The file and its folder, where they are missing, for nobody but the user."""
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        # SQLite gives the files beside it the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def explain(path: Path, error: sqlite3.Error | OSError) -> ConfigError:
    """What is wrong with the file at `path`, and what to do about it."""
    if is_damage(error):
        return ConfigError(
            f"the log {str(path)!r} is damaged: {error}",
            hint=f"Move it and the files {path.name}-* beside it away, and a new one is begun; or set another [logs]"
            " path.",
        )
    return ConfigError(
        f"the log {str(path)!r} cannot be used: {error}", hint="Set another [logs] path, or enabled = false."
    )
