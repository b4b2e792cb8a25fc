"""What is sampled under a form is the merged distribution restricted to what fits, by chi-square.

The form and the reference are written here, by the words of `mope_bb.pcm.constraint`, and share no code with it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pytest

from mope_bb.config import DecodingConfig
from mope_bb.pcm.constraint import Constraint
from mope_bb.pcm.decode import decode
from mope_bb.pcm.fitting import SLACK, Fitting
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.pacing import Pace
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import END, Piece, SamplingOptions, TokenDistribution
from tests.speculation.experts import (
    PIECES,
    START,
    Array,
    KnownExpert,
    PlaceScorer,
    known_pool,
    make_tables,
    place_scores,
)
from tests.speculation.measure import LAMBDAS, NUM_OPEN, QUESTION, THRESHOLD, chi_square
from tests.speculation.reference import shape, top_k

NUM_ANSWERS: Final = 2000
MAX_TOKENS: Final = 9
PLACE: Final = {letter: place for place, letter in enumerate("abcde")}
END_PLACE: Final = PIECES.index(END)


class Pairs(Constraint):
    """Pairs of letters: none begins with e, after d there is always a, and b is never doubled."""

    def __init__(self) -> None:
        self.written = ""

    @property
    def is_complete(self) -> bool:
        return len(self.written) % 2 == 0

    @property
    def is_over(self) -> bool:
        return False

    def forced(self) -> bytes:
        return b"a" if not self.is_complete and self.written[-1] == "d" else b""

    def allows(self, data: bytes) -> bool:
        return data.decode() in "".join(next_letters(self.written))

    def closing(self) -> bytes | None:
        return b"" if self.is_complete else b"c" if self.written[-1] != "d" else b"a"

    def advance(self, data: bytes) -> None:
        assert self.allows(data)
        self.written += data.decode()

    def restart(self, data: bytes) -> None:
        self.written = data.decode()


def next_letters(written: str) -> list[str]:
    """What may follow; the end is another matter."""
    if len(written) % 2 == 0:
        return list("abcd")
    return {"d": ["a"], "b": list("acde")}.get(written[-1], list("abcde"))


def closing(written: str) -> str:
    """What completes `written`."""
    return "" if len(written) % 2 == 0 else "a" if written[-1] == "d" else "c"


@dataclass(frozen=True)
class Reference:
    """Every answer with its probability."""

    temperature: float
    top_p: float

    def answers(self) -> dict[str, float]:
        """By what was written; all end."""
        found: dict[str, float] = {}
        growing = {"": 1.0}
        while growing:
            longer: dict[str, float] = {}
            for written, probability in growing.items():
                left = MAX_TOKENS - len(written)
                if not self._has_room(written, left - 1):
                    answer = written + closing(written)
                    found[answer] = found.get(answer, 0.0) + probability
                elif len(written) % 2 and written[-1] == "d":
                    longer[written + "a"] = longer.get(written + "a", 0.0) + probability
                else:
                    for letter, share in self._next(written, left).items():
                        target, answer = (found, written) if letter == "." else (longer, written + letter)
                        target[answer] = target.get(answer, 0.0) + probability * share
            growing = longer
        return found

    def _has_room(self, written: str, left: int) -> bool:
        return len(closing(written)) + SLACK < left

    def _next(self, written: str, left: int) -> dict[str, float]:
        last = PLACE[written[-1]] if written else START
        tables = make_tables()
        del tables["base"]
        scores = np.array(place_scores(len(written), last, len(LAMBDAS)))
        alpha = np.array(LAMBDAS) * np.exp(scores)
        alpha /= alpha.sum()
        for cut in (top_k, lambda row: row):  # what fits is on some list, or is asked for by name
            rows = [self._read_end(written, cut(table[last])) for table in tables.values()]
            pi = alpha @ np.array(rows)
            kept = [place for place in range(len(PIECES)) if pi[place] > 0 and self._fits(written, place)]
            while kept:
                masked = np.zeros_like(pi)
                masked[kept] = pi[kept]
                shaped = shape(masked / masked.sum(), self.temperature, self.top_p)
                bad = [p for p in kept if shaped[p] > 0 and p != END_PLACE and not self._stays(written, p, left)]
                if not bad:
                    return {"abcde."[place]: float(shaped[place]) for place in kept if shaped[place] > 0}
                # Drawn and put back one after the other, which comes to the same as never having been there, as long
                # as `shape` has nothing to cut off.
                assert self.top_p == 1.0 or len(bad) == len(kept)
                kept = [place for place in kept if place not in bad]
        raise AssertionError(written)

    def _fits(self, written: str, place: int) -> bool:
        return len(written) % 2 == 0 if place == END_PLACE else "abcde"[place] in next_letters(written)

    def _stays(self, written: str, place: int, left: int) -> bool:
        return self._has_room(written + "abcde"[place], left - 1)

    def _read_end(self, written: str, row: Array) -> Array:
        if len(written) % 2 == 0:
            return row
        moved = row.copy()
        moved[PLACE[closing(written)]] += moved[END_PLACE]
        moved[END_PLACE] = 0.0
        return moved


async def sample(mode: Literal["lockstep", "lookahead"], temperature: float, top_p: float) -> Counter[str]:
    """Answers of the known experts."""
    found: Counter[str] = Counter()
    plan = Plan(MergeRule("linear"), ("red", "green", "blue"), LAMBDAS, base="base", preference_text="")
    pace, scorer = Pace(DecodingConfig(mode=mode, max_ahead=3, max_generated=100.0)), PlaceScorer()
    seeds = iter(range(NUM_ANSWERS))

    async def write(pool: ExpertPool) -> None:
        options = SamplingOptions(temperature, top_p, MAX_TOKENS)
        for seed in seeds:
            steps = decode(QUESTION, plan, pool, scorer, options, seed=seed, pace=pace, constraint=Pairs())
            pieces = [step.piece async for step in steps]
            assert pieces[-1] == END
            assert len(pieces) <= MAX_TOKENS
            found[b"".join(piece.data for piece in pieces).decode()] += 1

    async with known_pool([SpellingExpert(name, table) for name, table in make_tables().items()]) as pool:
        await asyncio.gather(*(write(pool) for _ in range(NUM_OPEN)))
    return found


class SpellingExpert(KnownExpert):
    """Its pieces are letters with ids."""

    async def spell(self, data: bytes) -> tuple[Piece, ...]:
        return tuple(PIECES[PLACE[letter]] for letter in data.decode())


def p_value(mode: Literal["lockstep", "lookahead"], temperature: float) -> float:
    """Of the answers that were sampled, under the reference."""
    exact = Reference(temperature, 1.0).answers()
    assert sum(exact.values()) == pytest.approx(1.0)
    counts = asyncio.run(sample(mode, temperature, 1.0))
    numbers = {answer: (number,) for number, answer in enumerate(sorted({*exact, *counts}))}
    return chi_square(
        {numbers[answer]: count for answer, count in counts.items()},
        {numbers[answer]: share for answer, share in exact.items()},
    ).p_value


@pytest.mark.parametrize(("mode", "temperature"), [("lockstep", 1.0), ("lookahead", 0.7)])
def test_exact(mode: Literal["lockstep", "lookahead"], temperature: float) -> None:
    """Masks, forced letters, the end read as what completes a pair, and the room that is left, all at once."""
    assert p_value(mode, temperature) > THRESHOLD


async def as_they_are(_: Fitting, lists: Sequence[TokenDistribution]) -> list[TokenDistribution]:
    """An END that is not read as anything."""
    return list(lists)


async def one_more(form: Fitting, num_left: int) -> bool:
    """Room that is not there."""
    found = form.constraint.closing()
    return found is None or len(found) + SLACK < num_left + 1


@pytest.mark.parametrize(("name", "wrong"), [("read", as_they_are), ("_has_room", one_more)])
def test_wrong_rules_fail(monkeypatch: pytest.MonkeyPatch, name: str, wrong: object) -> None:
    """The test notices what it is for."""
    monkeypatch.setattr(Fitting, name, wrong)
    assert p_value("lockstep", 1.0) < THRESHOLD
