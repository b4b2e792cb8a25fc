"""The ledger: what was finished stays, whatever happens to the process; nothing is taken twice."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from mope_bb.errors import ConfigError, TrainingError
from mope_bb.training.ledger import Dispatch, Ended, Ledger, Restored


def dispatched(*ids: int, version: int = 0) -> list[Dispatch]:
    """Pairs about to be sampled."""
    return [Dispatch(one, version, "concise", "[]") for one in ids]


def filled(folder: Path) -> Ledger:
    """Six pairs: two trained in step 1, one in step 2, one failed and waiting, two under way, one of them half done."""
    ledger = Ledger(folder)
    ledger.dispatch(dispatched(0, 1, 2, 3))
    ledger.dispatch(dispatched(4, 5, version=1))
    ledger.add_rollouts([(one, place, f"{one} {place}", 3, b"x") for one in range(3) for place in (0, 1)])
    ledger.add_rollouts([(5, 1, "half", 1, b"half")])
    ledger.end([Ended(0, 0, (0.25, 0.5)), Ended(1, 0, (0.1, 0.2)), Ended(2, 0, (0.0, 1.0))], {})
    ledger.end([Ended(3, 0, None, "no answer")], {})
    ledger.lease([0, 1], 1)
    ledger.lease([2], 2)
    return ledger


def test_a_resume_finds_what_there_is(tmp_path: Path) -> None:
    """From the checkpoint of step 1: its pairs stay trained, that of step 2 is free again, answers are kept.

    What failed is tried again: the server may be back.
    """
    with filled(tmp_path):
        pass
    with Ledger(tmp_path) as ledger:
        assert ledger.restore(1, group_size=1) == Restored(
            ended=(Ended(2, 0, (0.0, 1.0)),),
            unfinished={3: 0, 4: 1, 5: 1},
            num_dispatched=6,
            num_trained=2,
        )
        assert ledger.rollouts(2) == {0: b"x", 1: b"x"}
        assert ledger.rollouts(5) == {1: b"half"}
        assert ledger.pairs_of_step(1) == [Ended(0, 0, (0.25, 0.5)), Ended(1, 0, (0.1, 0.2))]
        assert ledger.pairs_of_step(2) == []


def test_no_pair_belongs_to_two_batches(tmp_path: Path) -> None:
    """A batch that holds a trained pair is refused as a whole."""
    with filled(tmp_path) as ledger:
        with pytest.raises(TrainingError, match="1 pairs of batch 3 were trained before"):
            ledger.lease([3, 0], 3)
        ledger.lease([3], 3)
        restored = ledger.restore(3, group_size=1)
        assert (restored.ended, set(restored.unfinished), restored.num_trained) == ((), {4, 5}, 4)


def test_what_failed_is_tried_again_with_its_group(tmp_path: Path) -> None:
    """Groups of two: pair 3 failed, so pair 2, which was scored with it, is scored again; its answers are there."""
    with filled(tmp_path) as ledger:
        restored = ledger.restore(1, group_size=2)
        assert (restored.ended, set(restored.unfinished)) == ((), {2, 3, 4, 5})
        assert ledger.rollouts(2) == {0: b"x", 1: b"x"}


def test_bytes_go_when_no_resume_needs_them(tmp_path: Path) -> None:
    """Texts and rewards stay: the ledger is the record of the run."""
    with filled(tmp_path) as ledger:
        ledger.forget_rollouts(1)
        assert ledger.rollouts(0) == {}
        assert ledger.rollouts(2) == {0: b"x", 1: b"x"}
    with sqlite3.connect(tmp_path / "ledger.sqlite3") as database:
        rows = database.execute("SELECT text, data FROM rollouts WHERE pair = 0 ORDER BY place").fetchall()
    assert rows == [("0 0", None), ("0 1", None)]


def test_references_and_their_scores(tmp_path: Path) -> None:
    """The first answer of a prompt counts; scores of later dimensions join those of earlier ones."""
    with Ledger(tmp_path) as ledger:
        ledger.put_references({"q": "one", "r": "two"})
        ledger.put_references({"q": "other"})
        ledger.end([], {"q": {"concise": 0.1}})
        ledger.end([], {"q": {"friendly": 1 / 3}})
    with Ledger(tmp_path) as ledger:
        assert ledger.references() == {"q": ("one", {"concise": 0.1, "friendly": 1 / 3}), "r": ("two", {})}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """A second run in the same folder is refused while the first one lives."""
    with Ledger(tmp_path), pytest.raises(ConfigError, match="another process trains in"):
        Ledger(tmp_path)
    Ledger(tmp_path).close()


def test_a_strange_file_is_refused(tmp_path: Path) -> None:
    """Neither garbage nor another version's ledger is read or overwritten."""
    file = tmp_path / "ledger.sqlite3"
    file.write_bytes(b"garbage " * 1000)
    with pytest.raises(TrainingError, match="cannot be read or written"):
        Ledger(tmp_path)
    assert file.read_bytes().startswith(b"garbage")
    file.unlink()
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="format 99, expected 1"):
        Ledger(tmp_path)
