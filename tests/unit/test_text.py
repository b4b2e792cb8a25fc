"""Pieces to text: whole characters, nothing of a stop string, and cuts that stay where they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope_bb.pcm.runner import complete_texts
from mope_bb.text import TextAssembler
from mope_bb.types import END, Piece

texts = st.text(alphabet=st.one_of(st.sampled_from("ab<|>é€🙂\u0301"), st.characters(codec="utf-8")), max_size=30)


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """`data` cut at the given places; empty parts are kept, for pieces may be empty."""
    places = [0, *sorted(place % (len(data) + 1) for place in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def assemble(parts: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], TextAssembler]:
    """Feed parts until the answer stops; what each gave, with the flush last."""
    assembler = TextAssembler(stop)
    given_out = []
    for part in parts:
        given_out.append(assembler.feed(Piece(part)))
        if assembler.is_stopped:
            break
    return [*given_out, assembler.flush()], assembler


@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=40))
def test_any_split_gives_the_same_text(text: str, cuts: list[int]) -> None:
    """However the UTF-8 bytes are cut into pieces, the text is the same, and every part is whole characters."""
    parts, assembler = assemble(cut(text.encode(), cuts))
    assert "".join(parts) == text
    assert not assembler.is_stopped
    assert parts[-1] == ""


@given(data=st.binary(max_size=30), cuts=st.lists(st.integers(0, 200), max_size=40))
def test_any_bytes_give_the_text_of_the_whole(data: bytes, cuts: list[int]) -> None:
    """Bytes that are no UTF-8 become U+FFFD as they would in one piece."""
    parts, _ = assemble(cut(data, cuts))
    assert "".join(parts) == data.decode("utf-8", "replace")


@given(
    text=st.text(alphabet="ab|é", max_size=20),
    stops=st.lists(st.text(alphabet="ab|é", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 60), max_size=30),
)
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    """What is given out never holds a stop string, however the pieces lie, and nothing before one is lost."""
    parts, assembler = assemble(cut(text.encode(), cuts), stops)
    found = "".join(parts)
    assert not any(stop in found for stop in stops)
    assert text.startswith(found)
    assert assembler.is_stopped is any(stop in text for stop in stops)
    if assembler.is_stopped:
        assert any(text[len(found) :].startswith(stop) for stop in stops)
    else:
        assert found == text


@given(text=st.text(alphabet="ab|", max_size=20), stop=st.text(alphabet="ab|", min_size=1, max_size=4))
def test_byte_by_byte_cuts_at_the_first_place(text: str, stop: str) -> None:
    """With one stop string the answer is what stands before its first occurrence."""
    parts, _ = assemble([bytes([byte]) for byte in text.encode()], [stop])
    assert "".join(parts) == text.split(stop, maxsplit=1)[0]


def test_partial_stop_string_is_held_until_it_is_decided() -> None:
    """The beginning of a stop string waits, and comes out when it turns out to be something else."""
    assembler = TextAssembler(["###"])
    assert [assembler.feed(Piece(part)) for part in (b"a#", b"#", b"b", b"#")] == ["a", "", "##b", ""]
    assert assembler.flush() == "#"
    assert not assembler.is_stopped


def test_stop_string_across_pieces() -> None:
    """A stop string in three pieces is cut off whole."""
    assembler = TextAssembler(["\nUser:"])
    assert [assembler.feed(Piece(part)) for part in (b"Hi\nU", b"se", b"r: x")] == ["Hi", "", ""]
    assert assembler.is_stopped
    assert assembler.flush() == ""


def test_self_overlapping_stop_string() -> None:
    """ "aab" is found in "aaab": a mismatch does not skip a later beginning."""
    assembler = TextAssembler(["aab"])
    assert "".join(assembler.feed(Piece(bytes([byte]))) for byte in b"aaab") == "a"
    assert assembler.is_stopped


def test_the_earliest_of_several_stop_strings_counts() -> None:
    """Of two stop strings in one piece the earlier one cuts."""
    assembler = TextAssembler(["yy", "x"])
    assert assembler.feed(Piece(b"abxcyy")) == "ab"


def test_end_stops_and_flush_gives_what_was_held() -> None:
    """END ends the answer; a held beginning of a stop string was text after all."""
    assembler = TextAssembler(["###"])
    assert assembler.feed(Piece(b"a##")) == "a"
    assert assembler.feed(END) == ""
    assert assembler.is_stopped
    assert assembler.flush() == "##"


def test_incomplete_character_at_the_end_is_replaced() -> None:
    """Half a character waits for its rest, and becomes U+FFFD when none comes."""
    assembler = TextAssembler()
    assert assembler.feed(Piece("é".encode()[:1])) == ""
    assert assembler.flush() == "\ufffd"


def test_a_control_token_without_bytes_is_not_the_end() -> None:
    """An empty piece with an id is a silent token, not END."""
    assembler = TextAssembler()
    assert assembler.feed(Piece(b"", 7)) == ""
    assert not assembler.is_stopped


@given(data=st.one_of(texts.map(str.encode), st.binary(max_size=40)), cuts=st.lists(st.integers(0, 200), max_size=40))
def test_complete_texts_are_append_only(data: bytes, cuts: list[int]) -> None:
    """The texts of a longer answer begin with the texts of every shorter one."""
    pieces = [Piece(part) for part in cut(data, cuts)]
    whole = complete_texts(pieces)
    for n in range(len(pieces)):
        shorter = complete_texts(pieces[:n])
        assert whole[: len(shorter)] == shorter


@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=40))
def test_complete_texts_join_to_the_text(text: str, cuts: list[int]) -> None:
    """For valid UTF-8 nothing is lost, replaced or empty."""
    found = complete_texts([Piece(part) for part in cut(text.encode(), cuts)])
    assert "".join(found) == text
    assert all(found)


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 200), max_size=40))
def test_complete_texts_never_wait_for_ever(data: bytes, cuts: list[int]) -> None:
    """Broken bytes cannot hold the text back: after one more whole piece all of it is out."""
    found = complete_texts([*(Piece(part) for part in cut(data, cuts)), Piece(b"!")])
    assert found[-1].endswith("!")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([b"\xe2", b"\x82", b"\xac"], ["€"]),
        ([b"\xff", b"a"], ["\ufffd", "a"]),
        ([b"\xe2", b"a"], ["\ufffda"]),
        ([b"a\xe2\x82"], []),
        ([b"a\xe2", b"\x82\xacb"], ["a€b"]),
        ([b"\xf0\x9f\x99", b"\x82", b"!"], ["🙂", "!"]),
        ([b"", b"x", b""], ["x"]),
    ],
)
def test_complete_texts_examples(parts: list[bytes], expected: list[str]) -> None:
    """Whole characters come at once; broken bytes are replaced as soon as they are known to be broken."""
    assert complete_texts([Piece(part) for part in parts]) == expected
