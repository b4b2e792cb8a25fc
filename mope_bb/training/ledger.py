"""The ledger: what a run has asked for, got and learned from, in SQLite. A kill at any moment loses nothing finished.

    pairs       dispatched -> complete | failed; `step` = the batch that took it, empty while it waits
    rollouts    an answer each, as soon as it is whole; the bytes go when no resume can need them, the text stays
    reference_answers   one per prompt, with its raw scores
    usage       what was asked of endpoints, by expert or reward model; what a kill interrupts is not counted

A pair is *trained* if a checkpoint holds its step: resuming from the checkpoint of step k frees the pairs of later
steps, whose lessons are not in those weights, to be trained again. So no pair counts twice in any weights that exist,
and ledger and checkpoint need no common transaction.

Write-ahead log, `synchronous = NORMAL`: what was committed survives the death of the process; after the death of the
machine the last moments may be missing, never damaged.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mope_bb.errors import ConfigError, TrainingError
from mope_bb.usage import Usage

FORMAT: Final = 1
SCHEMA: Final = """
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('dispatched', 'complete', 'failed')),
    version INTEGER NOT NULL,
    step INTEGER,
    preference TEXT NOT NULL,
    prompt TEXT NOT NULL,
    first_reward REAL,
    second_reward REAL,
    error TEXT,
    num_dispatches INTEGER NOT NULL DEFAULT 1,
    dispatched_at REAL NOT NULL,
    ended_at REAL
);
CREATE TABLE rollouts (
    pair INTEGER NOT NULL REFERENCES pairs (id),
    place INTEGER NOT NULL,
    text TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    data BLOB,
    PRIMARY KEY (pair, place)
) WITHOUT ROWID;
CREATE TABLE reference_answers (
    prompt TEXT PRIMARY KEY,
    text TEXT NOT NULL,
    scores TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX pairs_by_step ON pairs (step);
"""


USAGE: Final = """CREATE TABLE IF NOT EXISTS usage (
    name TEXT PRIMARY KEY,
    num_calls INTEGER NOT NULL,
    num_told INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    cost REAL NOT NULL
)"""
"""Came later, and takes nothing from ledgers that lack it."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A pair that is about to be sampled."""

    pair_id: int
    version: int
    """Of the policy, counted in the run's own steps."""
    preference: str
    prompt: str
    """For people: JSON of the messages."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A pair that waits to be learned from, or that failed."""

    pair_id: int
    version: int
    rewards: tuple[float, float] | None
    """None for a pair that failed."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Restored:
    """What an earlier process left."""

    ended: tuple[Ended, ...] = ()
    """By id."""
    unfinished: Mapping[int, int] = field(default_factory=dict)
    """Pairs that were under way: id -> version."""
    num_dispatched: int = 0
    num_trained: int = 0
    """Pairs, the failed ones among them, that a checkpoint holds."""


class Ledger:
    """One run's ledger. One process at a time holds it."""

    def __init__(self, folder: Path) -> None:
        """Open `folder/ledger.sqlite3`, or create it. Raises ConfigError, also where another process trains here."""
        self._path = folder / "ledger.sqlite3"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(
                f"another process trains in {str(folder)!r}", hint="Wait for it, stop it, or pass another --out."
            ) from None
        except OSError as error:
            raise ConfigError(f"the run's folder {str(folder)!r} cannot be used: {error}") from None
        try:
            # Every transaction is begun and ended here, in words.
            self._database = sqlite3.connect(self._path, isolation_level=None, timeout=30.0)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._create()
        except sqlite3.Error as error:
            self.close()
            raise self._broken(error) from None
        except ConfigError:
            self.close()
            raise

    def _create(self) -> None:
        found = self._database.execute("PRAGMA user_version").fetchone()[0]
        if found == 0:
            with self._transaction():
                for statement in SCHEMA.split(";\n"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {FORMAT}")
        elif found != FORMAT:
            raise ConfigError(
                f"the ledger {str(self._path)!r} has format {found}, expected {FORMAT}",
                hint="It was written by another version of mope-bb.",
            )
        self._database.execute(USAGE)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing. Raises TrainingError."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._broken(error) from None

    def _broken(self, error: sqlite3.Error) -> TrainingError:
        return TrainingError(
            f"the ledger {str(self._path)!r} cannot be read or written: {error}",
            hint="Is there room on the disk? Nothing that was finished is lost; go on with --resume.",
        )

    def _strange(self, error: Exception) -> TrainingError:
        return TrainingError(f"the ledger {str(self._path)!r} holds what mope-bb does not write: {error}")

    def dispatch(self, pairs: Sequence[Dispatch]) -> None:
        """Before they are sampled. A pair that an earlier process left unfinished is counted again."""
        with self._transaction() as database:
            database.executemany(
                "INSERT INTO pairs (id, state, version, preference, prompt, dispatched_at)"
                " VALUES (?, 'dispatched', ?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET version = excluded.version, num_dispatches = num_dispatches + 1",
                [(one.pair_id, one.version, one.preference, one.prompt, time.time()) for one in pairs],
            )

    def add_rollouts(self, rollouts: Sequence[tuple[int, int, str, int, bytes]]) -> None:
        """Answers as they become whole: (pair, place in it, text, number of tokens, `records.encode_rollout`)."""
        with self._transaction() as database:
            database.executemany("INSERT OR REPLACE INTO rollouts VALUES (?, ?, ?, ?, ?)", rollouts)

    def end(self, pairs: Sequence[Ended], reference_scores: Mapping[str, Mapping[str, float]]) -> None:
        """Pairs with their rewards, or why they failed; and what was learned of references: prompt -> scores."""
        now = time.time()
        with self._transaction() as database:
            for one in pairs:
                rewards = one.rewards or (None, None)
                database.execute(
                    "UPDATE pairs SET state = ?, version = ?, first_reward = ?, second_reward = ?, error = ?,"
                    " ended_at = ? WHERE id = ?",
                    (
                        "failed" if one.rewards is None else "complete",
                        one.version,
                        *rewards,
                        one.error,
                        now,
                        one.pair_id,
                    ),
                )
            for prompt, scores in reference_scores.items():
                row = database.execute("SELECT scores FROM reference_answers WHERE prompt = ?", (prompt,)).fetchone()
                known = json.loads(row[0]) if row else {}
                database.execute(
                    "UPDATE reference_answers SET scores = ? WHERE prompt = ?",
                    (json.dumps(known | dict(scores)), prompt),
                )

    def lease(self, pair_ids: Collection[int], step: int) -> None:
        """These pairs belong to batch `step`, from 1. Raises TrainingError for one that has a batch already."""
        with self._transaction() as database:
            changed = sum(
                database.execute("UPDATE pairs SET step = ? WHERE id = ? AND step IS NULL", (step, one)).rowcount
                for one in pair_ids
            )
            if changed != len(pair_ids):
                raise TrainingError(f"{len(pair_ids) - changed} pairs of batch {step} were trained before")

    def rollouts(self, pair_id: int) -> dict[int, bytes]:
        """Place -> `records.encode_rollout` of the answers of a pair that are there."""
        rows = self._database.execute("SELECT place, data FROM rollouts WHERE pair = ? AND data NOT NULL", (pair_id,))
        return dict(rows.fetchall())

    def pairs_of_step(self, step: int) -> list[Ended]:
        """What batch `step` was made of, by id."""
        return self._ended("step = ?", step)

    def restore(self, num_steps: int, *, group_size: int) -> Restored:
        """Continue from the checkpoint of step `num_steps`: later steps never happened.

        Pairs that failed and were not trained are tried again, since what failed may work by now; with them the whole
        group of `group_size` that they were sampled and scored in, of which the answers that are there are kept.
        """
        with self._transaction() as database:
            database.execute("UPDATE pairs SET step = NULL WHERE step > ?", (num_steps,))
            database.execute(
                "UPDATE pairs SET state = 'dispatched', error = NULL WHERE step IS NULL AND id / ? IN"
                " (SELECT id / ? FROM pairs WHERE state = 'failed' AND step IS NULL)",
                (group_size, group_size),
            )
        unfinished = self._database.execute("SELECT id, version FROM pairs WHERE state = 'dispatched'").fetchall()
        num_dispatched, num_trained = self._database.execute("SELECT COUNT(*), COUNT(step) FROM pairs").fetchone()
        return Restored(tuple(self._ended("step IS NULL")), dict(unfinished), num_dispatched, num_trained)

    def _ended(self, condition: str, *values: int) -> list[Ended]:
        rows = self._database.execute(
            "SELECT id, version, first_reward, second_reward, error FROM pairs"
            f" WHERE state != 'dispatched' AND {condition} ORDER BY id",  # conditions are written here
            values,
        )
        try:
            return [
                # SQLite keeps what it is given, whatever the column says: a ledger may come from a stranger.
                Ended(
                    int(pair_id),
                    int(version),
                    None if first is None or second is None else (float(first), float(second)),
                    None if error is None else str(error),
                )
                for pair_id, version, first, second, error in rows
            ]
        except (TypeError, ValueError, OverflowError) as error:
            raise self._strange(error) from None

    def forget_rollouts(self, num_steps: int) -> None:
        """Free the bytes of answers up to step `num_steps`, which no resume can need any more."""
        with self._transaction() as database:
            database.execute(
                "UPDATE rollouts SET data = NULL WHERE data NOT NULL"
                " AND pair IN (SELECT id FROM pairs WHERE step <= ?)",
                (num_steps,),
            )

    def references(self) -> dict[str, tuple[str, dict[str, float]]]:
        """Prompt -> reference answer and its scores by dimension."""
        rows = self._database.execute("SELECT prompt, text, scores FROM reference_answers")
        try:
            return {
                str(prompt): (str(text), {str(name): float(score) for name, score in json.loads(scores).items()})
                for prompt, text, scores in rows
            }
        except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise self._strange(error) from None

    def put_references(self, texts: Mapping[str, str]) -> None:
        """Keep reference answers; the first of a prompt counts."""
        with self._transaction() as database:
            database.executemany(
                "INSERT OR IGNORE INTO reference_answers (prompt, text) VALUES (?, ?)", list(texts.items())
            )

    def usage(self) -> dict[str, Usage]:
        """What the run has asked of endpoints so far, by `usage.Account`'s names."""
        rows = self._database.execute(
            "SELECT name, num_calls, num_told, input_tokens, output_tokens, cost FROM usage"
        ).fetchall()
        return {name: Usage(*numbers) for name, *numbers in rows}

    def put_usage(self, by_name: Mapping[str, Usage]) -> None:
        """Keep what the run has asked of endpoints so far, in all its processes."""
        with self._transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?, ?, ?)",
                [(name, *astuple(usage)) for name, usage in by_name.items()],
            )

    def close(self) -> None:
        """Let another process have it. A second call does nothing."""
        if self._lock >= 0:
            self._database.close()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
