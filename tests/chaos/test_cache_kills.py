"""Processes that share a cache, and are killed; the large version is run by `make evidence`."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

from mope_bb.cache import DistributionCache
from tests.chaos.cache_kills import key_of, measure_kills, open_together, truth


def test_eight_processes_open_a_new_folder_at_one_moment(tmp_path: Path) -> None:
    """All of them can, without a word, and what each puts is there."""
    folders = [tmp_path / str(n) / "cache" for n in range(10)]
    assert open_together(folders, num_processes=8) == []
    for folder in folders:
        with closing(DistributionCache(folder, max_bytes=2**30)) as cache:
            assert asyncio.run(cache.get_many([key_of(n) for n in range(8)])) == [truth(n) for n in range(8)]


def test_kills() -> None:
    """Nothing that was committed is lost, wrong, or paid for again; nothing is left over."""
    found = measure_kills(4, 6, num_questions=3_000, mean_wait_s=0.3)
    assert found["is_sound"], found
    assert found["num_committed"] > 0


def test_a_cache_that_writes_late_is_noticed() -> None:
    """The measurement sees entries that are called committed before they are."""
    found = measure_kills(3, 4, num_questions=500, mean_wait_s=0.3, writes_late=True)
    assert found["num_lost"] + found["num_paid_twice"] > 0
    assert not found["is_sound"]
