"""Joining lists: which pieces are candidates, in which order, and what cannot be joined."""

from __future__ import annotations

import math

import pytest

from mope_bb.errors import AlignmentError
from mope_bb.pcm.alignment import align, align_path
from mope_bb.providers.base import build_distribution
from mope_bb.types import END, Piece, TokenDistribution


def listing(*entries: tuple[Piece, float], vocab_size: int | None = None) -> TokenDistribution:
    """A list with the given probabilities."""
    return TokenDistribution(
        tuple(piece for piece, _ in entries), tuple(math.log(p) for _, p in entries), vocab_size=vocab_size
    )


A, B, C = Piece(b"a", 5), Piece(b"b", 3), Piece(b"c", 9)


def test_align_orders_by_id_and_marks_what_is_missing() -> None:
    """Candidates are the union in the order of ids; -inf stands where an expert did not list one."""
    found = align([listing((A, 0.5), (B, 0.25)), listing((C, 0.5))])
    assert found.pieces == (B, A, C)
    expected = [[math.log(0.25), math.log(0.5), -math.inf], [-math.inf, -math.inf, math.log(0.5)]]
    assert found.logprobs.tolist() == expected
    assert found.tails == pytest.approx((0.25, 0.5))
    assert found.floors == pytest.approx((math.log(0.25), math.log(0.5)))


def test_align_merges_end_of_experts_with_different_end_ids() -> None:
    """END is one candidate, though one expert calls it 1 and another 2."""
    lists = [
        build_distribution([(Piece(b"", 1), -1.0), (A, -2.0)], top_k=5, end_ids=(1,), vocab_size=None, expert="x"),
        build_distribution([(Piece(b"", 2), -0.5), (A, -3.0)], top_k=5, end_ids=(2,), vocab_size=None, expert="y"),
    ]
    found = align(lists)
    assert found.pieces == (END, A)
    assert found.logprobs.tolist() == [[-1.0, -2.0], [-0.5, -3.0]]


def test_align_refuses_other_bytes_for_one_id() -> None:
    """One id with two meanings says that the tokenizers differ."""
    with pytest.raises(AlignmentError, match=r"token 5 is b'a' for one expert.* b'z' for another"):
        align([listing((A, 0.5)), listing((Piece(b"z", 5), 0.5))])


def test_align_refuses_ids_mixed_with_bytes() -> None:
    """Experts that tell ids cannot be merged with experts that only tell bytes."""
    with pytest.raises(AlignmentError, match="ids"):
        align([listing((A, 0.5)), listing((Piece(b"a"), 0.5))])


def test_align_takes_bytes_only() -> None:
    """Experts that all know bytes only merge by bytes."""
    found = align([listing((Piece(b"y"), 0.5), (Piece(b"x"), 0.25)), listing((Piece(b"y"), 0.5))])
    assert found.pieces == (Piece(b"x"), Piece(b"y"))


def test_align_merges_bytes_only_with_an_end() -> None:
    """END stands among bytes-only pieces as it does among ids: a scripted expert can end."""
    found = align([listing((Piece(b"y"), 0.5), (END, 0.25)), listing((END, 0.5))])
    assert set(found.pieces) == {END, Piece(b"y")}


def test_align_refuses_no_lists() -> None:
    """Nothing cannot be merged."""
    with pytest.raises(AlignmentError, match="no distribution"):
        align([])


def test_path_has_padding_behind_its_shorter_positions() -> None:
    """Each position has its own candidates; the tensors are as wide as the widest of them."""
    path = [[listing((A, 0.5)), listing((A, 0.5))], [listing((A, 0.5), (B, 0.25)), listing((C, 0.5))]]
    lists = align_path(path)
    assert lists.candidates == tuple(align(lists_there) for lists_there in path)
    assert lists.logprobs.shape == (2, 2, 3)
    assert lists.logprobs[0, :, 1:].tolist() == [[-math.inf] * 2] * 2
    for position, one in enumerate(lists.candidates):
        assert lists.logprobs[position, :, : len(one.pieces)].tolist() == one.logprobs.tolist()
        assert tuple(lists.floors[position].tolist()) == one.floors
        assert tuple(lists.tails[position].tolist()) == one.tails


def test_path_may_give_ids_at_one_position_and_bytes_at_another() -> None:
    """Only pieces of one position are joined with each other."""
    path = [[listing((B, 0.5), (A, 0.25))], [listing((Piece(b"y"), 0.5), (Piece(b"x"), 0.25))]]
    assert [one.pieces for one in align_path(path).candidates] == [(B, A), (Piece(b"x"), Piece(b"y"))]


def test_one_id_may_stand_for_other_bytes_at_another_position() -> None:
    """Some tokenizers drop a leading space at the beginning of a text: no sign of two tokenizers."""
    path = [[listing((A, 0.5))], [listing((Piece(b" a", 5), 0.5))]]
    assert [one.pieces for one in align_path(path).candidates] == [(A,), (Piece(b" a", 5),)]


def test_path_is_refused_where_one_position_is() -> None:
    """The error names the token, wherever it stands."""
    good, bad = [listing((A, 0.5)), listing((B, 0.5))], [listing((C, 0.5)), listing((Piece(b"z", 9), 0.5))]
    with pytest.raises(AlignmentError, match=r"token 9 is b'c' for one expert.* b'z' for another"):
        align_path([good, bad, good])
    with pytest.raises(AlignmentError, match="no distribution"):
        align_path([good, []])


def test_candidates_are_equal_where_all_they_hold_is() -> None:
    """Equal lists give equal candidates with equal hashes; another logprob or list makes them differ."""
    first = align([listing((A, 0.5), (B, 0.25)), listing((A, 0.5))])
    again = align([listing((A, 0.5), (B, 0.25)), listing((A, 0.5))])
    assert first == again
    assert hash(first) == hash(again)
    assert first != align([listing((A, 0.4), (B, 0.25)), listing((A, 0.5))])
    assert first != align([listing((A, 0.5), (B, 0.25)), listing((A, 0.5), (B, 0.25))])
    assert first != align([listing((A, 0.5), (B, 0.25))])
