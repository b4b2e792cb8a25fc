"""What a token may be on the wire: ids, texts and numbers of other kinds are refused, not guessed at."""

from __future__ import annotations

from typing import Any

import pytest

from mope_bb.errors import AlignmentError, MalformedResponseError
from mope_bb.failures import readable, shown
from mope_bb.providers import llamacpp_wire, wire
from mope_bb.providers.drawing import parse_drawn_ids, piece_of_draw
from mope_bb.providers.wire import MAX_PIECE_BYTES, MAX_TOKEN_ID, PieceReader, Reply, checked_id, checked_logprob
from mope_bb.types import END, Piece

READER = PieceReader(None, end_ids=(0,))


@pytest.mark.parametrize("value", [True, False, -1, MAX_TOKEN_ID + 1, 10**400, 1.0, "1", None, [1]])
def test_what_is_no_id(value: Any) -> None:
    """Neither a boolean, which Python takes for a number, nor what no engine counts up to."""
    with pytest.raises(ValueError, match="id "):
        checked_id(value)
    assert [checked_id(one) for one in (0, MAX_TOKEN_ID)] == [0, MAX_TOKEN_ID]


@pytest.mark.parametrize(
    "text", ["token_id:", "token_id:-1", "token_id:x", "token_id:٧", "token_id: 7", f"token_id:{2**31}"]
)
def test_what_is_no_id_as_text(text: str) -> None:
    """Only plain digits count, as vLLM writes them."""
    with pytest.raises(ValueError, match="id "):
        READER.read(text)
    assert READER.read("token_id:7") == Piece(b"token_id:7", 7)


def test_a_drawn_text_is_text() -> None:
    """A model that writes "token_id:0" has not ended its answer, and one that writes "token_id:x" breaks nothing."""
    for text in ("token_id:0", "token_id:x"):
        assert piece_of_draw(Reply((), text=text), None, expert="e") == Piece(text.encode())


def test_drawn_ids() -> None:
    """A negative one would be found from the end of the vocabulary."""
    assert parse_drawn_ids({"token_ids": [5, 6]}, expert="e") == (5, 6)
    assert parse_drawn_ids({}, expert="e") is None
    for ids in ([-1], [True], ["5"], 5, {"a": 1}):
        with pytest.raises(MalformedResponseError, match="token_ids"):
            parse_drawn_ids({"token_ids": ids}, expert="e")


def test_a_piece_that_is_no_token() -> None:
    """Longer than any token of any vocabulary: refused on a list, and not one token where it was drawn."""
    longest = "a" * MAX_PIECE_BYTES
    assert READER.read(longest) == Piece(longest.encode())
    for arguments in (
        {"text": longest + "a"},
        {"text": "a", "data": b"a" * 2000},
        {"text": longest + "a", "token_id": 5},
    ):
        with pytest.raises(ValueError, match="expected at most 1024"):
            READER.read(**arguments)
    with pytest.raises(AlignmentError, match="not one token"):
        piece_of_draw(Reply((), text=longest + "a"), None, expert="e")


def test_whole_numbers_are_floats() -> None:
    """A logprob of -1 is one of -1.0, also in the cache, which takes nothing else."""
    assert [type(checked_logprob(value)) for value in (-1, 0, -0.5)] == [float] * 3
    assert checked_logprob(None) is None
    for value in (True, "-1", 10**400, -(10**400), [-1.0]):
        with pytest.raises(ValueError, match="logprob"):
            checked_logprob(value)


def test_a_boolean_is_not_found_among_known_pieces() -> None:
    """`True` is 1 to a dictionary."""
    reader = PieceReader(None)
    entry = {"id": 1, "bytes": [97], "logprob": -0.5}
    reply = {"completion_probabilities": [{**entry, "top_logprobs": [entry]}]}
    assert llamacpp_wire.parse_reply(reply, reader, num_ids=1, expert="e").positions[0].entries[0][0] == Piece(b"a", 1)
    reply["completion_probabilities"][0]["top_logprobs"] = [{**entry, "id": True}]
    with pytest.raises(MalformedResponseError, match="id True"):
        llamacpp_wire.parse_reply(reply, reader, num_ids=1, expert="e")


@pytest.mark.parametrize(
    "indexes", [(0, 0, 1), (0, True), (0.0, 1), (0, "1"), (0,), (1, 2)], ids=lambda indexes: f"{indexes}"
)
def test_mixed_up_prompts(indexes: tuple[Any, ...]) -> None:
    """Each prompt has one answer, by its number."""
    replies = [{"index": index} for index in indexes]
    with pytest.raises(MalformedResponseError):
        wire.in_order(replies, 2, expert="e")
    with pytest.raises(MalformedResponseError):
        llamacpp_wire.split_response(replies, 2, expert="e")


def test_what_is_shown_of_a_reply() -> None:
    """Short, on one line, also where it is deep, and nothing that a terminal would obey."""
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "a" * 10**6, {"a" * 1000: list(range(1000))}, ValueError("x" * 1000), 10**400):
        assert len(shown(value)) < 500
    assert readable("a\x1b[2J\n b\u202e" + "c" * 500, 20) == "a\ufffd[2J b\ufffd" + "c" * 11
    assert END.key == -1
