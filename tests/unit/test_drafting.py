"""From what an endpoint wrote to a draft: exact for every way in which lists come over the wire."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope_bb.errors import LogprobsUnavailableError, MalformedResponseError
from mope_bb.providers.drafting import build_steps, certain_positions
from mope_bb.providers.wire import Entry, Position, Reply
from mope_bb.types import END, DraftStep, Piece

Row = Sequence[tuple[Piece, float]]
"""A whole vocabulary: token by token, the end tokens already END, its logprob at temperature 1."""
Wire = Callable[[Row, int, int], Position]
"""What an endpoint writes of a row, the token drawn (its place in the row) and the number of entries asked for."""


def piece(token_id: int) -> Piece:
    """A piece with bytes that tell its id."""
    return Piece(b"<%d>" % token_id, token_id)


def best(row: Row, k: int) -> list[Entry]:
    """The k most probable tokens; ties by place, as an engine's own order."""
    order = sorted(range(len(row)), key=lambda place: (-row[place][1], place))
    return [row[place] for place in order[:k]]


def as_it_is(row: Row, drawn: int, k: int) -> Position:
    """SGLang, llama.cpp: the k best, whatever was drawn."""
    return Position(tuple(best(row, k)), *row[drawn])


def with_drawn(row: Row, drawn: int, k: int) -> Position:
    """vLLM's completions: a drawn token that is not among them is added in front."""
    order = sorted(range(len(row)), key=lambda place: (-row[place][1], place))[:k]
    entries = [row[place] for place in order]
    return Position(tuple(entries if drawn in order else [row[drawn], *entries]), *row[drawn])


def step_of(position: Position, *, num_asked: int = 100, top_k: int = 100, temperature: float = 1.0) -> DraftStep:
    """The only step of a draft of one position."""
    (step,) = build_steps(
        [position], num_asked=num_asked, top_k=top_k, temperature=temperature, vocab_size=None, expert="short"
    )
    return step


@dataclass(frozen=True)
class Case:
    """A distribution, and how it is asked for."""

    row: Row
    num_ends: int
    top_k: int
    temperature: float

    @property
    def num_asked(self) -> int:
        """As many entries more as there are more end tokens."""
        return self.top_k + max(0, self.num_ends - 1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """2 to 9 tokens, up to 3 of them end tokens; with ties, but not between end tokens, which no wire could tell."""
    values = st.sampled_from([-4.0, -2.5, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0])
    ends = draw(st.lists(values, max_size=3, unique=True))
    others = draw(st.lists(values, min_size=2 if not ends else 1, max_size=6))
    total = math.log(math.fsum(map(math.exp, (*ends, *others))))
    tokens = [*((END, score) for score in ends), *((piece(place), score) for place, score in enumerate(others))]
    row = [(one, score - total) for one, score in draw(st.permutations(tokens))]
    num_ends = len(ends)
    return Case(row, num_ends, draw(st.integers(1, 8)), draw(st.sampled_from([0.3, 0.7, 1.0, 2.0])))


@pytest.mark.parametrize("wire", [as_it_is, with_drawn])
@given(case=cases())
def test_q_is_what_the_drawn_piece_comes_from(wire: Wire, case: Case) -> None:
    """Over all tokens that can be drawn: one list, one q, and q is how often each piece on the list is drawn."""
    powers = [math.exp(logprob / case.temperature) for _, logprob in case.row]
    steps = [
        step_of(
            wire(case.row, drawn, case.num_asked),
            num_asked=case.num_asked,
            top_k=case.top_k,
            temperature=case.temperature,
        )
        for drawn in range(len(case.row))
    ]
    assert len({(step.distribution, step.log_q) for step in steps}) == 1
    shares: dict[int, float] = defaultdict(float)
    for step, power in zip(steps, powers, strict=True):
        if step.index is not None:
            shares[step.index] += power
            assert step.piece == step.distribution.pieces[step.index]
    total = math.fsum(shares.values())
    assert total > 0.0
    for index, log_q in enumerate(steps[0].log_q):
        assert math.exp(log_q) == pytest.approx(shares[index] / total, abs=1e-12)


def test_the_drawn_piece_would_bias_a_list_that_keeps_it() -> None:
    """What the property guards against: with the added entry kept, two draws from one distribution show two lists."""
    row = [(piece(0), math.log(0.5)), (piece(1), math.log(0.3)), (piece(2), math.log(0.2))]
    lists = {step_of(with_drawn(row, drawn, 1), num_asked=2, top_k=2).distribution for drawn in range(3)}
    assert len(lists) == 3


def test_an_end_token_below_the_list_is_not_on_it() -> None:
    """Two end tokens: END is on the list with the mass of one of them, so only that one was drawn from it."""
    row = [(END, math.log(0.6)), (piece(1), math.log(0.35)), (END, math.log(0.05))]
    listed, below = (step_of(as_it_is(row, drawn, 2)) for drawn in (0, 2))
    assert listed.index == 0
    assert below.index is None
    assert below.piece == END
    assert listed.log_q == pytest.approx([math.log(0.6 / 0.95), math.log(0.35 / 0.95)])


def test_a_greedy_draft_is_certain() -> None:
    """At temperature 0 the drawn piece could not have been another."""
    row = [(piece(0), math.log(0.7)), (piece(1), math.log(0.3))]
    assert step_of(as_it_is(row, 0, 2), temperature=0.0).log_q == (0.0, -math.inf)


def test_a_low_temperature_underflows_to_impossible() -> None:
    """A piece that is never drawn has q = 0, and that is no error."""
    row = [(piece(0), -1e-9), (piece(1), -60.0)]
    assert step_of(as_it_is(row, 0, 2), temperature=0.01).log_q == (0.0, -math.inf)


def test_more_entries_than_asked_for_by_ties() -> None:
    """Only the drawn one can be too many: equal values that an endpoint gives on top stay on the list."""
    row = [(piece(0), math.log(0.4)), (piece(1), math.log(0.3)), (piece(2), math.log(0.3))]
    step = step_of(Position(tuple(row), *row[0]), num_asked=2, top_k=3)
    assert step.distribution.pieces == (piece(0), piece(1), piece(2))


def test_sentinels_are_no_part_of_q() -> None:
    """What has no value cannot be drawn."""
    position = Position(((piece(0), math.log(0.5)), (piece(1), -9999.0), (piece(2), None)), piece(0), math.log(0.5))
    assert step_of(position).log_q == (0.0,)


def test_what_is_not_told_has_the_best_piece_in_its_place() -> None:
    """A drawn piece that the wire does not name ends the draft; its list can be used."""
    told = as_it_is([(piece(0), math.log(0.7)), (piece(1), math.log(0.2))], 1, 2)
    untold = Position(told.entries, None, None)
    steps = build_steps([told, untold, told], num_asked=2, top_k=2, temperature=1.0, vocab_size=None, expert="short")
    assert [(step.piece, step.index) for step in steps] == [(piece(1), 1), (piece(0), None)]


def test_nothing_follows_the_end() -> None:
    """An endpoint that goes on after END is not listened to."""
    row = [(piece(0), math.log(0.5)), (END, math.log(0.5))]
    steps = build_steps(
        [as_it_is(row, drawn, 2) for drawn in (0, 1, 0)],
        num_asked=2,
        top_k=2,
        temperature=1.0,
        vocab_size=None,
        expert="short",
    )
    assert [step.piece for step in steps] == [piece(0), END]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [((), LogprobsUnavailableError), (((piece(0), math.nan),), MalformedResponseError)],
)
def test_every_list_is_checked(entries: tuple[Entry, ...], expected: type[Exception]) -> None:
    """A draft's lists are looked at as those of single questions are."""
    with pytest.raises(expected):
        step_of(Position(entries, piece(0), -1.0))


def reply(*drawn: str | bytes | Piece | None, text: str | None) -> Reply:
    """A reply with these drawn pieces, each on a list of its own."""
    positions = []
    for one in drawn:
        found = one if one is None or isinstance(one, Piece) else Piece(one.encode() if isinstance(one, str) else one)
        positions.append(Position(((found or Piece(b"?"), -0.1),), found))
    return Reply(tuple(positions), text=text)


@pytest.mark.parametrize(
    ("wired", "num_certain"),
    [
        (reply("Use", " it", text="Use it"), 2),
        # A face between them left no trace, or the bytes that end it.
        (reply("Use", " it", text="Use \U0001f612 it"), 1),
        (reply("Use", b"\x92", " it", text="Use \U0001f612 it"), 1),
        (reply(" it", text="\U0001f612 it"), 0),
        # Half characters that are listed spell the text as well.
        (reply("Use", b" \xf0\x9f\x98", b"\x92", text="Use \U0001f612"), 3),
        # The end is in its place only after all of the text.
        (reply("Use", END, text="Use"), 2),
        (reply("Use", END, text="Use\ufffd"), 1),
        (reply("Use", None, " it", text="Use it"), 1),
        (reply("Use", " it", text=None), 2),
        (reply(b"\xed\xa0\x80", text="\ud800"), 1),
    ],
)
def test_positions_count_as_long_as_they_spell_the_text(wired: Reply, num_certain: int) -> None:
    """After a piece that the endpoint left out every list would be taken for that of another place."""
    assert len(certain_positions(wired, whole_characters=False)) == num_certain


def test_lists_of_an_endpoint_that_takes_text_hold_whole_characters() -> None:
    """What it could not continue leaves the list, and a position without a list ends the draft."""
    mixed = Position(((Piece(b"a"), -1.0), (Piece(b"\xf0"), -1.0), (END, -2.0)), Piece(b"a"), -1.0)
    halves = Position(((Piece(b"\xf0"), -0.1),), Piece(b"\xf0"), -0.1)
    found = certain_positions(Reply((mixed, halves, mixed)), whole_characters=True)
    assert [position.entries for position in found] == [((Piece(b"a"), -1.0), (END, -2.0))]
    assert found[0].num_unreadable == 1
