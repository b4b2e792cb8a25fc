"""What is known ahead of an answer is what the experts would say there, whatever way the answer goes."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from mope_bb.providers.lookahead import Lookahead
from mope_bb.types import END, DraftStep, Piece, TokenDistribution

NAMES = ("left", "middle", "right")
PIECES = (Piece(b"a", 0), Piece(b"b", 1), END)
pieces = st.sampled_from(PIECES[:2])


def said(name: str, answer: Sequence[Piece]) -> TokenDistribution:
    """The list of an expert after an answer: no two are equal."""
    mark = name.encode() + b":" + b"".join(piece.data or b"." for piece in answer)
    return TokenDistribution((Piece(mark),), (0.0,))


def written(name: str, answer: Sequence[Piece], path: Sequence[Piece]) -> list[DraftStep]:
    """What an expert writes of its own after an answer."""
    return [DraftStep(said(name, (*answer, *path[:position])), piece, 0, (0.0,)) for position, piece in enumerate(path)]


paths = st.lists(pieces, min_size=1, max_size=5)
moves: st.SearchStrategy[tuple[str, str, list[Piece]]] = st.one_of(
    st.tuples(st.just("learn"), st.sampled_from(NAMES), paths),
    st.tuples(st.just("learn one"), st.sampled_from(NAMES), st.just([])),
    st.tuples(st.just("advance"), st.just(""), st.lists(pieces, min_size=1, max_size=1)),
)


@given(st.lists(moves, max_size=30))
def test_known_lists_are_what_experts_would_say(played: list[tuple[str, str, list[Piece]]]) -> None:
    """After any learning and advancing every list that is given out is that of its expert at that very position."""
    known, answer = Lookahead(NAMES), list[Piece]()
    for kind, name, path in played:
        depths = {one: known.depth(one) for one in NAMES}
        if kind == "learn":
            known.learn(name, written(name, answer, path))
            assert known.depth(name) == len(path)
        elif kind == "learn one":
            known.learn_one(name, said(name, answer))
            assert known.depth(name) == 1
        else:
            known.advance(path[0])
            answer += path
            assert all(known.depth(one) in (0, depths[one] - 1) for one in NAMES)
        lists, expected = known.common()
        assert len(lists) <= min(known.depth(one) for one in NAMES)
        assert len(expected) == max(0, len(lists) - 1)
        for position, column in enumerate(lists):
            assert column == [said(one, (*answer, *expected[:position])) for one in NAMES]


@given(paths, paths)
def test_common_goes_as_far_as_they_agree(one: list[Piece], other: list[Piece]) -> None:
    """Positions are known up to the first one after which the paths differ, or one of them ends."""
    known = Lookahead(NAMES)
    for name, path in zip(NAMES, (one, other, one), strict=True):
        known.learn(name, written(name, (), path))
    shortest = min(len(one), len(other))
    num_alike = next((n for n in range(shortest) if one[n] != other[n]), shortest)
    lists, expected = known.common()
    assert len(lists) == min(num_alike + 1, shortest)
    assert expected == one[: len(lists) - 1]


@given(paths)
def test_advancing_along_the_path_keeps_the_rest(path: list[Piece]) -> None:
    """What was asked once is not asked again while the answer goes the way that was expected."""
    known = Lookahead(("only",))
    known.learn("only", written("only", (), path))
    for position, piece in enumerate(path):
        assert known.depth("only") == len(path) - position
        assert known.common()[0][0] == [said("only", path[:position])]
        known.advance(piece)
    assert known.common() == ([], [])


def test_one_list_leads_nowhere() -> None:
    """From a single list nothing is expected, and it is gone when the answer goes on."""
    known = Lookahead(("left", "right"))
    known.learn("left", written("left", (), PIECES[:2]))
    known.learn_one("right", said("right", ()))
    assert known.common() == ([[said("left", ()), said("right", ())]], [])
    known.advance(PIECES[0])
    assert (known.depth("left"), known.depth("right")) == (1, 0)
    assert known.common() == ([], [])
