"""How far ahead experts are asked: what is measured is found again, and no choice breaks a limit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope_bb.config import DecodingConfig
from mope_bb.pcm.pacing import (
    SHARPNESS,
    UNKNOWN_AGREEMENT,
    WINDOW,
    Agreement,
    AnswerPace,
    Floats,
    Line,
    Move,
    Pace,
    Request,
)
from mope_bb.providers.pool import Seat

Array = npt.NDArray[np.float64]
NAMES = ("left", "middle", "right")
KINDS: tuple[Request, ...] = ("ask", "draft", "score")


# Line


@given(
    st.floats(0.01, 1.0),
    st.floats(0.0, 0.03),
    st.lists(st.integers(1, 64), max_size=10),
    st.lists(st.integers(1, 64), min_size=2, max_size=2, unique=True),
)
def test_line_is_found(fixed: float, share: float, others: list[int], lengths: list[int]) -> None:
    """From measurements on a line its value at each of them; the very first, of a cold start, does not count."""
    line = Line()
    line.add(1, 100.0)
    for length in (*others, *lengths * 5):
        line.add(length, fixed * (1 + share * length))
    for length in (*others, *lengths):
        assert line.seconds(length) == pytest.approx(fixed * (1 + share * length), rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.001, 100.0)), min_size=2, max_size=30))
def test_line_is_sane(measured: list[tuple[int, float]]) -> None:
    """Whatever was measured: positive, and more positions never take less."""
    line = Line()
    for length, seconds in measured:
        line.add(length, seconds)
    found = [line.seconds(length) for length in range(1, 100)]
    assert all(one is not None and one > 0 for one in found)
    assert found == sorted(found, key=float)  # type: ignore[arg-type]  # none is None


def test_line_forgets() -> None:
    """An endpoint that became slow is known as slow after some dozens of requests."""
    line = Line()
    for length in (1, 8) * 50:
        line.add(length, 0.1)
    for length in (1, 8) * 50:
        line.add(length, 1.0 + 0.1 * length)
    assert line.seconds(8) == pytest.approx(1.8, rel=0.05)


def test_outlier_counts_little() -> None:
    """A request that happened to hang does not make an endpoint slow."""
    line = Line()
    for _ in range(20):
        line.add(1, 0.1)
    line.add(1, 50.0)
    found = line.seconds(1)
    assert found is not None
    assert found < 0.15


def test_nothing_measured() -> None:
    """A line without measurements tells nothing; a pace goes by the nearest kind of request, and by other experts."""
    assert Line().seconds(3) is None
    pace = Pace()
    assert pace.seconds("left", "draft", 5) == 0.0
    for _ in range(2):
        pace.observe("left", "ask", 1, 0.2)
    assert pace.seconds("left", "draft", 5) == pace.seconds("left", "score", 5) == pytest.approx(0.2)
    assert pace.seconds("right", "ask", 1) == pytest.approx(0.2)
    for _ in range(2):
        pace.observe("left", "draft", 5, 0.7)
    assert pace.seconds("left", "draft", 5) == pytest.approx(0.7)


# Agreement


agreement_rows = st.lists(st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4), min_size=1, max_size=40)


@given(agreement_rows)
def test_survival_is_a_probability(rows: list[list[float]]) -> None:
    """It begins at 1, is never above it, and a longer way never survives more often."""
    agreement = Agreement(2)
    agreement.add(map(np.array, rows))
    survival = agreement.survival(16)
    assert survival.shape == (17, 4)
    assert (survival[0] == 1.0).all()
    assert (np.diff(survival, axis=0) <= 1e-9).all()


@given(agreement_rows.filter(lambda rows: len(rows) >= 8))
def test_survival_is_the_mean_of_the_ways(rows: list[list[float]]) -> None:
    """For ways of up to half the window: the mean of their products."""
    agreement = Agreement(2)
    agreement.add(map(np.array, rows))
    values = np.clip(np.array(rows), 1e-6, 1.0)
    for ahead in range(1, len(rows) // 2 + 1):
        ways = [values[start : start + ahead].prod(axis=0) for start in range(len(rows) - ahead + 1)]
        np.testing.assert_allclose(agreement.survival(20)[ahead], np.mean(ways, axis=0), rtol=1e-6)


@given(st.floats(0.01, 1.0), st.integers(1, 300))
def test_survival_of_even_agreement(chance: float, num_rows: int) -> None:
    """With one chance at every position it is that chance to the power of the length, also beyond the window."""
    agreement = Agreement(1)
    agreement.add([np.full(3, chance)] * num_rows)
    np.testing.assert_allclose(agreement.survival(64)[:, 0], chance ** np.arange(65), rtol=1e-6)


def test_window() -> None:
    """Unknown at first; then the last positions count; a copy goes its own way."""
    agreement = Agreement(1)
    np.testing.assert_allclose(agreement.survival(3)[:, 0], UNKNOWN_AGREEMENT ** np.arange(4))
    agreement.add([np.zeros(3)] * 50)
    own = agreement.copy()
    agreement.add([np.ones(3)] * WINDOW)
    assert agreement.survival(3).min() == 1.0
    assert own.survival(3)[1:].max() < 1e-5


# AnswerPace


def row_of(chances: list[float]) -> Floats:
    """A row for `Agreement`: alike at every sharpness, and the answer goes on."""
    return np.array([*chances[:-1] * len(SHARPNESS), chances[-1], 1.0])


@dataclass
class Case:
    """A pool with what was measured of it; every expert guesses right with one chance at every position."""

    seats: list[Seat]
    settings: DecodingConfig
    chances: list[float]
    """Of each expert's drafts, and of the common favourite."""
    seconds: dict[tuple[str, Request], tuple[float, float]]
    """Of a request of each kind: for one position, and how much more per position in shares of that."""
    num_context: int = 100

    def took(self, name: str, request: Request, num_positions: int) -> float:
        """What such a request takes."""
        fixed, share = self.seconds[name, request]
        return fixed * (1 + share * num_positions)

    def open(self, *, is_repeatable: bool = False) -> tuple[Pace, AnswerPace]:
        """A pace that has seen enough of everything, and a new answer."""
        pace = Pace(self.settings)
        for length in (1, *(1, 4, 16) * 4):
            for name, request in self.seconds:
                pace.observe(name, request, length, self.took(name, request, length))
        pace.agreement(("key",), len(SHARPNESS) * len(self.seats)).add([row_of(self.chances)] * WINDOW)
        return pace, AnswerPace(pace, self.seats, ("key",), is_repeatable=is_repeatable)

    def kept(self, move: Move) -> float:
        """Tokens to be expected: each position gives one if all before it went as guessed."""
        if move.kind == "lockstep":
            return 1.0
        chance = self._chance(move)
        return sum(chance**position for position in range(move.num_ahead))

    def generated(self, move: Move) -> float:
        """By the expert that generates most. A draft that is begun early and then not used counts as well."""
        lost = 1 - self._chance(move) ** move.num_ahead if move.begins_next else 0.0
        return move.num_ahead * (1 + lost)

    def price(self, move: Move) -> float:
        """Of everything that is asked."""
        if move.kind != "draft":
            return sum(self.num_context * seat.input_price + move.num_ahead * seat.output_price for seat in self.seats)
        price = 0.0
        for seat in self.seats:
            if seat.name == move.drafter:
                price += self.num_context * seat.input_price + move.num_ahead * seat.output_price
            else:
                num_requests = 1 if seat.scores_at_once else move.num_ahead
                price += num_requests * ((self.num_context + move.num_ahead) * seat.input_price + seat.output_price)
        return price

    def tokens_per_second(self, move: Move, pace: Pace) -> float:
        """What the move is worth, by what `pace` found."""
        others = [seat.name for seat in self.seats if seat.name != move.drafter]
        ahead = move.num_ahead
        if move.kind == "draft":
            drafting = pace.seconds(move.drafter or "", "draft", ahead)
            scoring = max([pace.seconds("", "judge", ahead), *(pace.seconds(name, "score", ahead) for name in others)])
            saved = self._chance(move) ** ahead * min(drafting, scoring) if move.begins_next else 0.0
            return self.kept(move) / (drafting + scoring - saved)
        request: Request = "ask" if move.kind == "lockstep" or ahead == 1 else "draft"
        asking = max(pace.seconds("", "judge", 1), *(pace.seconds(name, request, ahead) for name in others))
        return self.kept(move) / (asking + (pace.seconds("", "judge", ahead) if ahead > 1 else 0.0))

    def _chance(self, move: Move) -> float:
        """That one position goes as guessed."""
        if move.drafter is None:
            can_continue = all(seat.can_continue for seat in self.seats)
            return self.chances[-1] if can_continue else 0.0
        return self.chances[[seat.name for seat in self.seats].index(move.drafter)]


@st.composite
def cases(draw: st.DrawFn, mode: str = "auto") -> Case:
    """One to three experts, free or with prices, quick or slow, alike or not."""
    names = NAMES[: draw(st.integers(1, 3))]
    prices = st.sampled_from((0.0, 0.0, 1.0, 5.0))
    seats = []
    for name in names:
        drafts = draw(st.sampled_from(("exact", "lists", "none")))
        seats.append(
            Seat(
                name,
                gives_lists=True,
                can_draft=drafts == "exact",
                can_continue=drafts != "none",
                scores_at_once=draw(st.booleans()),
                input_price=draw(prices),
                output_price=draw(prices),
            )
        )
    settings = DecodingConfig.model_validate(
        {"mode": mode, "max_ahead": draw(st.integers(1, 40)), "max_generated": draw(st.sampled_from((1, 1.5, 2, 5)))}
    )
    chances = draw(st.lists(st.sampled_from((0.1, 0.5, 0.8, 0.95, 1.0)), min_size=4, max_size=4))[-len(names) - 1 :]
    taking = st.tuples(st.sampled_from((0.001, 0.01, 0.1)), st.sampled_from((0.0, 0.01, 0.03)))
    seconds: dict[tuple[str, Request], tuple[float, float]] = {
        (name, request): draw(taking) for name in names for request in KINDS
    }
    seconds["", "judge"] = draw(taking)
    return Case(seats, settings, chances, seconds, draw(st.sampled_from((10, 1000))))


MODES = ("auto", "lockstep", "lookahead", "draft")
any_case = st.sampled_from(MODES).flatmap(cases)


@given(any_case, st.integers(1, 100), st.booleans())
def test_no_choice_breaks_a_limit(case: Case, num_left: int, is_repeatable: bool) -> None:
    """A move is not longer than what is wanted, and needs nothing that an expert cannot do; a repeatable answer never
    takes a draft."""
    _, answer = case.open(is_repeatable=is_repeatable)
    move = answer.choose(num_left=num_left, num_context=case.num_context)
    assert 1 <= move.num_ahead <= min(num_left, case.settings.max_ahead)
    assert (move.drafter is not None) == (move.kind == "draft")
    assert move.kind in ("lockstep", case.settings.mode) or case.settings.mode == "auto"
    if move.kind == "lockstep":
        assert move.num_ahead == 1
    if move.kind == "draft":
        assert not is_repeatable
        assert next(seat for seat in case.seats if seat.name == move.drafter).can_draft


@given(any_case)
def test_nothing_is_wasted(case: Case) -> None:
    """For each token that is probably kept a move generates at most what is allowed, and pays at most what lockstep
    pays."""
    _, answer = case.open()
    move = answer.choose(num_left=1000, num_context=case.num_context)
    if move.kind != "lockstep":
        assert case.generated(move) / case.kept(move) <= case.settings.max_generated + 1e-6
    assert case.price(move) / case.kept(move) <= case.price(Move("lockstep")) * (1 + 1e-6)


@given(cases())
def test_auto_is_not_slower_than_lockstep(case: Case) -> None:
    """By what was measured: at least as many tokens per second, but for the little that fewer requests are worth."""
    pace, answer = case.open()
    move = answer.choose(num_left=1000, num_context=case.num_context)
    assert case.tokens_per_second(move, pace) >= 0.95 * case.tokens_per_second(Move("lockstep"), pace) * (1 - 1e-6)


@given(cases(), st.integers(1, 100))
def test_lockstep_where_nobody_goes_on(case: Case, num_left: int) -> None:
    """Where no expert gives lists along a path of its own there is nothing to look at ahead."""
    case.seats = [replace(seat, can_draft=False, can_continue=False) for seat in case.seats]
    _, answer = case.open()
    assert answer.choose(num_left=num_left, num_context=case.num_context).kind == "lockstep"


@given(any_case, st.integers(0, 2**32 - 1))
def test_generated_stays_in_the_budget(case: Case, seed: int) -> None:
    """However badly the guesses turn out: at no time more than what is allowed for each token, and three drafts."""
    rng, (_, answer) = random.Random(seed), case.open()
    num_kept = 0
    while num_kept < 60:
        move = answer.choose(num_left=100 - num_kept, num_context=case.num_context)
        for seat in case.seats:
            if move.drafter in (None, seat.name):
                answer.num_generated[seat.name] += move.num_ahead * (2 if move.begins_next else 1)
        num_new = rng.choice((1, rng.randint(1, move.num_ahead)))
        answer.learn([row_of(case.chances)] * num_new)
        num_kept += num_new
        limit = case.settings.max_generated * num_kept + 3 * case.settings.max_ahead
        assert max(answer.num_generated.values()) <= limit


def make_case(chance: float, *, asking_s: float = 0.1) -> Case:
    """Three experts that can do everything, a tenth of a second away."""
    seats = [Seat(name, gives_lists=True, can_draft=True, can_continue=True, scores_at_once=True) for name in NAMES]
    seconds: dict[tuple[str, Request], tuple[float, float]] = {
        (name, request): (asking_s, 0.01) for name in NAMES for request in KINDS
    }
    seconds["", "judge"] = (0.001, 0.0)
    return Case(seats, DecodingConfig(), [chance] * 4, seconds)


def test_agreement_decides() -> None:
    """Experts that guess well are asked far ahead, those that guess badly token by token."""
    _, alike = make_case(0.95).open()
    _, apart = make_case(0.1).open()
    assert alike.choose(num_left=100, num_context=100).num_ahead >= 8
    assert apart.choose(num_left=100, num_context=100).num_ahead <= 2


def test_own_answer_counts() -> None:
    """In an answer on which the experts turn out to differ they are not asked far ahead, whatever was before."""
    _, answer = make_case(0.95).open()
    assert answer.choose(num_left=500, num_context=100).num_ahead >= 8
    answer.learn([row_of([0.05] * 4)] * WINDOW)
    assert answer.choose(num_left=500, num_context=100).num_ahead <= 2


def test_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Who refuses to score must draft itself, who refuses drafts does not; it is said once."""
    case = make_case(0.95)
    case.settings = DecodingConfig(mode="draft")
    pace, answer = case.open()
    for _ in range(2):
        pace.give_up("right", "score", "404")
    assert len(caplog.records) == 1
    assert answer.choose(num_left=100, num_context=100).drafter == "right"
    pace.give_up("right", "draft", "404")
    assert answer.choose(num_left=100, num_context=100) == Move("lockstep")
