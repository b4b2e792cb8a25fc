"""What a grammar allows, gives and needs to end."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from mope_bb import ConfigError
from mope_bb.pcm.constraint import Constraint, read_end_as
from mope_bb.pcm.grammar import MAX_CALLS, build_constraint, json_constraint
from mope_bb.tools import parse_form
from mope_bb.types import END, Piece, TokenDistribution
from tests.forms.schemas import random_schema
from tests.forms.test_tools import CALL, NOTHING, SCHEMA, WEATHER

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_given_and_free_parts() -> None:
    """What has no alternative is given; strings are the experts'; nothing comes after the last brace."""
    form = json_constraint(PERSON)
    assert form.forced() == b'{"name": "'
    form.advance(form.forced())
    assert form.forced() == b""
    assert form.allows("Zoë".encode())
    assert form.allows(b'", "age": ')
    assert not form.allows(b"\n")
    assert not form.allows_piece(Piece(b"", 7))  # a control token
    assert not form.allows_piece(END)
    form.advance(b'Zo"')
    assert form.forced() == b', "age": '
    form.advance(b', "age": 3}')
    assert form.is_complete
    assert form.is_over
    assert form.allows_piece(END)


def test_half_a_character_is_never_given() -> None:
    """Two choices with a common first byte."""
    form = json_constraint({"enum": ["é", "è"]})
    assert form.forced() == b'"'
    form.advance(b'"')
    assert form.forced() == b""
    assert form.allows(b"\xc3")
    assert not form.allows(b"\xc4")
    form.advance(b"\xc3")
    assert form.closing() in (b'\xa9"', b'\xa8"')


def test_restart() -> None:
    """The state is that of what has been said, whatever was said before."""
    form = json_constraint(PERSON)
    form.advance(b'{"name": "a\\')
    assert form.closing() is not None
    form.restart(b'{"name": "b", "age": 4')
    assert form.closing() == b"}"
    form.restart(b"")
    assert form.forced() == b'{"name": "'


@pytest.mark.parametrize("seed", range(0, 400, 4))
def test_closing_completes(seed: int) -> None:
    """From every point of its own way the closing completes the answer, and it fits the schema."""
    schema = random_schema(seed)
    form = json_constraint(schema)
    whole = form.closing()
    assert whole is not None
    jsonschema.validate(json.loads(whole), schema)
    written = b""
    for byte in whole:
        form.advance(bytes([byte]))
        written += bytes([byte])
        rest = form.closing()
        assert rest is not None
        jsonschema.validate(json.loads(written + rest), schema)


@pytest.mark.parametrize(
    ("schema", "closing"),
    [
        ({"type": "string", "format": "email"}, b'"a.a@a"'),
        ({"type": "string", "pattern": "^[a-z]{3,}@x$"}, b'"aaa@x"'),
        ({"type": "string", "minLength": 300}, b'"' + b"a" * 300 + b'"'),
        ({"type": "array", "minItems": 2, "items": {"type": "boolean"}}, b"[true, true]"),
    ],
)
def test_closing_of_patterns(schema: dict[str, Any], closing: bytes) -> None:
    """Also where letters alone lead nowhere."""
    assert json_constraint(schema).closing() == closing


def test_no_end_is_no_closing() -> None:
    """A schema that needs itself has none, and no answer either."""
    node = {"$ref": "#/$defs/n"}
    endless = {
        "$defs": {"n": {"type": "object", "properties": {"n": node}, "required": ["n"], "additionalProperties": False}}
    }
    try:
        assert json_constraint({**node, **endless}).closing() is None
    except ConfigError as error:
        assert "cannot be enforced" in str(error)


def spoken(form: Constraint, text: str) -> bool:
    """Whether `text`, all of it, is an answer of this form."""
    for char in text:
        if form.is_free:
            return True
        if not form.allows(char.encode()):
            return False
        form.advance(char.encode())
    return form.is_complete


def test_calls_or_text() -> None:
    """A brace begins a call, anything else is text."""
    for text, is_allowed in (
        (CALL, True),
        (CALL[:-1], False),
        ('{"tool": "other", "arguments": {}}', False),
        ('{"tool": "get_weather", "arguments": {}}', False),
        ("Just text. {", True),
        ("", True),
        ('{"a": 1}', False),
    ):
        form = build_constraint(parse_form([WEATHER, NOTHING], None, None))
        assert form is not None
        assert spoken(form, text) is is_allowed, text


def test_calls_only_and_calls_or_json() -> None:
    """`required` leaves no text; a schema beside tools leaves its own JSON."""
    for choice, response_format, text, is_allowed in (
        ("required", None, "Text", False),
        ("required", None, '{"tool": "wait", "arguments": {}}', True),
        (None, SCHEMA, "12", True),
        (None, SCHEMA, CALL, True),
        (None, SCHEMA, "Text", False),
    ):
        form = build_constraint(parse_form([WEATHER, NOTHING], choice, response_format))
        assert form is not None
        assert spoken(form, text) is is_allowed, text


@pytest.mark.parametrize("choice", [None, "required"])
def test_several_calls(choice: str | None) -> None:
    """Each on a line of its own, where that is asked for; half a call never, nor more than fit."""
    wait = '{"tool": "wait", "arguments": {}}'
    for is_parallel, text, is_allowed in (
        (False, CALL, True),
        (False, f"{CALL}\n{wait}", False),
        (True, CALL, True),
        (True, f"{CALL}\n{wait}", True),
        (True, f"{CALL}\n{wait}\n{CALL}", True),
        (True, f"{CALL}\n", False),
        (True, f"{CALL}\n\n{wait}", False),
        (True, f"{CALL}{wait}", False),
        (True, f"{CALL}\nText", False),
        (True, f"{CALL}\n{wait[:-1]}", False),
        (True, "\n".join([wait] * MAX_CALLS), True),
        (True, "\n".join([wait] * (MAX_CALLS + 1)), False),
    ):
        form = build_constraint(parse_form([WEATHER, NOTHING], choice, None, parallel_tool_calls=is_parallel))
        assert form is not None
        assert spoken(form, text) is is_allowed, (is_parallel, text)


def test_after_a_call_the_experts_decide() -> None:
    """The answer may end there, and nothing is forced; where no list holds what may come, the end is asked for too."""
    line, brace, other = Piece(b"\n", 1), Piece(b"\n{", 2), Piece(b"a", 3)
    for is_parallel, is_over, named in ((False, True, [END]), (True, False, [END, line, brace])):
        form = build_constraint(parse_form([WEATHER, NOTHING], "required", None, parallel_tool_calls=is_parallel))
        assert form is not None
        form.advance(CALL.encode())
        assert (form.is_complete, form.is_over, form.forced(), form.closing()) == (True, is_over, b"", b"")
        assert form.allowed_among([other, brace, END, line]) == named


def test_a_schema_beside_several_calls() -> None:
    """Calls, or JSON: not both."""
    for text, is_allowed in ((f"{CALL}\n{CALL}", True), ("12", True), (f"{CALL}\n12", False), (f"12\n{CALL}", False)):
        form = build_constraint(parse_form([WEATHER, NOTHING], None, SCHEMA, parallel_tool_calls=True))
        assert form is not None
        assert spoken(form, text) is is_allowed, text


def test_references_of_tools_stay_their_own() -> None:
    """`#/$defs` of a tool's parameters means those of that tool."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {"x": {"$ref": "#/$defs/x"}},
                    "required": ["x"],
                    "additionalProperties": False,
                    "$defs": {"x": {"type": kind}},
                },
            },
        }
        for name, kind in (("a", "integer"), ("b", "boolean"))
    ]
    for text, is_allowed in (
        ('{"tool": "a", "arguments": {"x": 1}}', True),
        ('{"tool": "a", "arguments": {"x": true}}', False),
        ('{"tool": "b", "arguments": {"x": true}}', True),
    ):
        form = build_constraint(parse_form(tools, "required", None))
        assert form is not None
        assert spoken(form, text) is is_allowed, text


def test_end_is_read_as_what_ends_the_form() -> None:
    """Its probability goes to that piece, which keeps its own; nothing else changes but the order."""
    quote, letter = Piece(b'"', 1), Piece(b"a", 2)
    found = read_end_as(quote, TokenDistribution((letter, END), (-0.5, -1.5), vocab_size=10))
    assert found == TokenDistribution((letter, quote), (-0.5, -1.5), vocab_size=9)
    joined = read_end_as(quote, TokenDistribution((END, letter, quote), (-1.0, -1.2, -2.0)))
    assert joined.pieces == (quote, letter)
    assert joined.logprobs == pytest.approx((-0.6867383, -1.2))
    plain = TokenDistribution((letter,), (-0.1,))
    assert read_end_as(quote, plain) is plain


def test_end_is_read_by_ids_that_are_on_the_list() -> None:
    """An endpoint that tells ids but whose tokenizer is not known."""
    quote, letter = Piece(b'"', 1), Piece(b"a", 2)
    listed = TokenDistribution((END, letter, quote), (-1.0, -1.2, -2.0))
    assert read_end_as(Piece(b'"'), listed).pieces == (quote, letter)
    assert read_end_as(Piece(b"}"), listed) is listed
