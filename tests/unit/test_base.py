"""From an endpoint's list to a distribution, and what a distribution knows of what it does not list."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope_bb.errors import LogprobsUnavailableError, MalformedResponseError
from mope_bb.providers.base import SENTINEL_LOGPROB, build_distribution, with_system
from mope_bb.types import END, ROUNDING_MASS, Message, Piece, TokenDistribution

Entries = list[tuple[Piece, float | None]]


def build(
    entries: Entries, *, top_k: int = 100, end_ids: tuple[int, ...] = (), vocab_size: int | None = None
) -> TokenDistribution:
    """`build_distribution` with the usual arguments."""
    return build_distribution(entries, top_k=top_k, end_ids=end_ids, vocab_size=vocab_size, expert="short")


def piece(token_id: int) -> Piece:
    """A piece with bytes that tell its id."""
    return Piece(b"<%d>" % token_id, token_id)


@st.composite
def lists(draw: st.DrawFn) -> Entries:
    """1 to 10 entries with different ids and probabilities that sum to at most 1."""
    ids = draw(st.lists(st.integers(0, 40), min_size=1, max_size=10, unique=True))
    shares = [draw(st.floats(0.001, 1.0)) for _ in ids]
    scale = draw(st.floats(0.01, 1.0)) / sum(shares)
    return [(piece(i), math.log(share * scale)) for i, share in zip(ids, shares, strict=True)]


@given(entries=lists(), top_k=st.integers(1, 12), seed=st.integers(0, 99))
def test_order_on_the_wire_does_not_matter(entries: Entries, top_k: int, seed: int) -> None:
    """Any permutation of the entries, ties included, gives the same distribution."""
    tied = [(p, -9.0 if i % 2 else value) for i, (p, value) in enumerate(entries)]
    shuffled = random.Random(seed).sample(tied, len(tied))
    assert build(shuffled, top_k=top_k, end_ids=(3,)) == build(tied, top_k=top_k, end_ids=(3,))


@given(entries=lists(), top_k=st.integers(1, 12))
def test_sorted_and_cut(entries: Entries, top_k: int) -> None:
    """The list descends, has at most k entries, and they are the most probable ones."""
    found = build(entries, top_k=top_k)
    values = sorted((value for _, value in entries if value is not None), reverse=True)
    assert list(found.logprobs) == values[:top_k]
    assert dict(zip(found.pieces, found.logprobs, strict=True)).items() <= dict(entries).items()


@given(entries=lists(), ends=st.sets(st.integers(0, 40), min_size=1, max_size=5))
def test_probabilities_of_several_end_ids_add_up(entries: Entries, ends: set[int]) -> None:
    """All end ids join in one END with the sum of their probabilities; the tail is what it was."""
    found = build(entries, end_ids=tuple(ends))
    expected = math.fsum(math.exp(v) for p, v in entries if p.token_id in ends and v is not None)
    got = dict(zip(found.pieces, found.logprobs, strict=True))
    assert (END in got) is (expected > 0)
    if END in got:
        assert math.exp(got[END]) == pytest.approx(expected)
    assert not any(p.token_id in ends for p in found.pieces)
    assert found.tail_mass == pytest.approx(build(entries).tail_mass, abs=1e-12)


def test_end_is_joined_before_the_cut() -> None:
    """Two end ids that would each miss the cut stay when their sum is large enough."""
    found = build(
        [(piece(1), math.log(0.4)), (piece(2), math.log(0.3)), (piece(3), math.log(0.3))], top_k=1, end_ids=(2, 3)
    )
    assert found.pieces == (END,)
    assert math.exp(found.logprobs[0]) == pytest.approx(0.6)


def test_end_is_never_above_certainty() -> None:
    """Coarse numbers of several end ids cannot add up to more than 1."""
    assert build([(piece(1), 0.0), (piece(2), -0.1)], end_ids=(1, 2)).logprobs == (0.0,)


@pytest.mark.parametrize("value", [None, -9999.0, SENTINEL_LOGPROB, -3.4e38, -math.inf])
def test_sentinels_are_dropped(value: float | None) -> None:
    """A number that means "no value" takes its piece off the list."""
    assert build([(piece(1), value), (piece(2), -1.0)]).pieces == (piece(2),)


def test_very_improbable_is_not_a_sentinel() -> None:
    """A true small logprob stays."""
    assert build([(piece(1), -100.0), (piece(2), -9000.0)]).logprobs == (-100.0, -9000.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.01, 1.0])
@pytest.mark.parametrize("end_ids", [(), (1,)])
def test_impossible_values_are_malformed(value: float, end_ids: tuple[int, ...]) -> None:
    """NaN, infinity and positive logprobs are errors of the reply, also on an end token, and name the expert."""
    with pytest.raises(MalformedResponseError) as caught:
        build([(piece(2), -1.0), (piece(1), value)], end_ids=end_ids)
    assert caught.value.expert == "short"


def test_slightly_positive_is_rounded_to_certainty() -> None:
    """Coarse numbers just above 0 count as 0."""
    assert build([(piece(1), 0.0009)]).logprobs == (0.0,)


def test_duplicates_are_malformed() -> None:
    """One token that stands twice has two probabilities, so the reply is wrong."""
    with pytest.raises(MalformedResponseError, match="twice"):
        build([(piece(1), -1.0), (piece(1), -2.0)])


def test_duplicate_bytes_without_ids_add_up() -> None:
    """Pieces without ids are told apart by their bytes alone: two tokens of equal bytes are one piece."""
    found = build([(Piece(b"x"), math.log(0.25)), (Piece(b"y"), math.log(0.4)), (Piece(b"x"), math.log(0.25))])
    assert found.pieces == (Piece(b"x"), Piece(b"y"))
    assert found.logprobs == pytest.approx((math.log(0.5), math.log(0.4)))


def test_greedy_probabilities_are_refused() -> None:
    """One certain piece beside sentinels is what a temperature of 0 makes of logprobs, not what a model says."""
    with pytest.raises(LogprobsUnavailableError, match="temperature of 0"):
        build([(piece(1), 0.0), (piece(2), -9999.0), (piece(3), -9999.0)])
    assert build([(piece(1), 0.0)]).logprobs == (0.0,)


def test_equal_bytes_with_different_ids_are_two_pieces() -> None:
    """Tokenizers have several tokens of the same bytes; ids keep them apart."""
    assert len(build([(Piece(b"x", 1), -1.0), (Piece(b"x", 2), -2.0)]).pieces) == 2


@pytest.mark.parametrize("entries", [[], [(piece(1), None)], [(piece(1), -9999.0)]])
def test_a_list_without_values_has_no_logprobs(entries: Entries) -> None:
    """An endpoint that lists nothing cannot be merged, which is another error than a malformed one."""
    with pytest.raises(LogprobsUnavailableError, match="no next-token logprobs"):
        build(entries)


def test_vocabulary_counts_end_once() -> None:
    """Joined end ids shrink the vocabulary, so that a full list is known to be full."""
    found = build([(piece(i), math.log(0.25)) for i in range(4)], end_ids=(2, 3), vocab_size=4)
    assert found.vocab_size == 3
    assert found.floor == -math.inf


@given(entries=lists())
def test_tail_mass_is_the_rest(entries: Entries) -> None:
    """The tail is 1 minus the sum of the list, and within [0, 1]."""
    found = build(entries)
    expected = 1 - math.fsum(math.exp(value) for _, value in entries if value is not None)
    assert found.tail_mass == pytest.approx(max(0.0, expected), abs=1e-12)
    assert 0.0 <= found.tail_mass <= 1.0


def test_tail_mass_of_coarse_numbers_is_clamped() -> None:
    """A list that sums to more than 1 has no tail, not a negative one."""
    assert TokenDistribution((piece(1), piece(2)), (-0.1, -0.2)).tail_mass == 0.0


@given(entries=lists(), vocab_size=st.none() | st.integers(12, 1000))
def test_floor_is_at_most_the_smallest_and_the_tail(entries: Entries, vocab_size: int | None) -> None:
    """A missing piece is no more probable than the last listed one, nor than its share of the tail and of rounding."""
    found = build(entries, vocab_size=vocab_size)
    missing = 1 if vocab_size is None else vocab_size - len(entries)
    shared = max(found.tail_mass, ROUNDING_MASS) / missing
    assert found.floor == pytest.approx(min(found.logprobs[-1], math.log(shared)))


def test_floor_of_a_list_without_tail_is_finite() -> None:
    """A list that sums to 1 by rounding alone leaves out what is improbable, not what is impossible."""
    certain = TokenDistribution((piece(1), piece(2)), (0.0, -20.0))
    assert certain.tail_mass == 0.0
    assert certain.floor == -20.0
    assert TokenDistribution((piece(1),), (0.0,)).floor == pytest.approx(math.log(ROUNDING_MASS))
    assert TokenDistribution((piece(1),), (0.0,), vocab_size=11).floor == pytest.approx(math.log(ROUNDING_MASS / 10))


def test_floor_of_a_whole_vocabulary() -> None:
    """Where everything is listed a missing piece is impossible, whatever the rounding of the sum."""
    assert TokenDistribution((piece(1), piece(2)), (-1.0, -2.0), vocab_size=2).floor == -math.inf


def test_system_prompt_goes_in_front() -> None:
    """An expert's own system prompt comes first, joined with the conversation's."""
    user, own = Message("user", "Hi"), Message("system", "Be short.")
    assert with_system((user,), None) == (user,)
    assert with_system((user,), "Be short.") == (own, user)
    assert with_system((Message("system", "Speak German."), user), "Be short.") == (
        Message("system", "Be short.\n\nSpeak German."),
        user,
    )
    assert with_system((), "Be short.") == (own,)
