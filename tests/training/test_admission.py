"""The bound on staleness, for every order in which pairs can end, fail and be begun again after a resume."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope_bb.training.admission import Staleness


def simulate(staleness: Staleness, rng: random.Random, *, num_steps: int, max_running: int, slow: float) -> list[int]:
    """Run a loop with latencies of its own; return the staleness of every trained pair.

    Fails if the loop comes to a standstill: nothing runs, nothing may begin and no batch may be taken.
    """
    version, now, next_id, num_ended, found = 0, 0.0, 0, 0, []
    running: dict[int, tuple[float, int]] = {}  # id -> when it ends, version begun
    ended: dict[int, int] = {}
    while version < num_steps:
        while (
            len(running) < max_running
            and staleness.room(version=version, num_ended=num_ended, num_running=len(running)) > 0
        ):
            latency = rng.expovariate(1.0) * (20.0 if rng.random() < slow else 1.0)
            running[next_id] = (now + latency, version)
            next_id += 1
        chosen = staleness.choose(
            [(begun, one) for one, begun in ended.items()], [begun for _, begun in running.values()], version=version
        )
        if chosen is not None and (not running or rng.random() < 0.7):
            assert len(chosen) == len(set(chosen)) == staleness.batch_size
            found += [version - ended.pop(one) for one in chosen]
            version += 1
            continue
        assert running, "standstill"
        first = min(running, key=lambda one: running[one])
        now, begun = running.pop(first)
        ended[first] = begun
        num_ended += 1
    # Nothing is thrown away.
    assert next_id == len(found) + len(ended) + len(running)
    return found


@settings(max_examples=150, deadline=None)
@given(
    max_staleness=st.integers(0, 6),
    batch_size=st.integers(1, 6),
    max_running=st.integers(1, 30),
    slow=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_no_pair_is_older_than_the_bound(
    max_staleness: int, batch_size: int, max_running: int, slow: float, seed: int
) -> None:
    """Whatever the latencies; and the loop never stands still."""
    staleness = Staleness(max_staleness, batch_size)
    found = simulate(staleness, random.Random(seed), num_steps=25, max_running=max_running, slow=slow)
    assert min(found) >= 0
    assert max(found) <= max_staleness


def test_admission_alone_does_not_keep_it() -> None:
    """The check can fail: batches that take whatever has ended exceed the bound when some pairs are slow."""

    class Careless(Staleness):
        def choose(self, ended: object, running: object, *, version: int) -> list[int] | None:
            assert isinstance(ended, list)
            order = sorted(ended, reverse=True)
            return [one for _, one in order[: self.batch_size]] if len(order) >= self.batch_size else None

    found = simulate(Careless(2, 4), random.Random(0), num_steps=200, max_running=12, slow=0.05)
    assert max(found) > 2


def test_waiting_for_the_oldest_alone_does_not_keep_it() -> None:
    """Nor does the rule to wait while the oldest running pair is due: several may be due at once."""

    class Hopeful(Staleness):
        def choose(self, ended: object, running: object, *, version: int) -> list[int] | None:
            assert isinstance(ended, list)
            assert isinstance(running, list)
            if len(ended) < self.batch_size or any(version - begun >= self.max_staleness for begun in running):
                return None
            return [one for _, one in sorted(ended)[: self.batch_size]]

    worst = 0
    for seed in range(20):
        worst = max(worst, *simulate(Hopeful(2, 4), random.Random(seed), num_steps=100, max_running=12, slow=0.3))
    assert worst > 2


def test_room() -> None:
    """As many as the batches up to `version + max_staleness` hold; after a resume what was ended counts."""
    staleness = Staleness(2, 10)
    assert staleness.room(version=0, num_ended=0, num_running=0) == 30
    assert staleness.room(version=4, num_ended=55, num_running=7) == 8
    assert staleness.room(version=4, num_ended=90, num_running=0) == -20
    assert Staleness(0, 10).room(version=0, num_ended=0, num_running=0) == 10


@pytest.mark.parametrize(("running", "expected"), [([], [3, 1]), ([1], [3, 1]), ([0], None), ([0, 0, 0], None)])
def test_the_batch_is_what_is_due_first(running: list[int], expected: list[int] | None) -> None:
    """Oldest first, and not before those that are due with it have ended."""
    ended = [(2, 7), (1, 1), (0, 3)]
    assert Staleness(2, 2).choose(ended, running, version=2) == expected
