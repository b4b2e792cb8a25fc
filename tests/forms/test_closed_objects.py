"""Objects that list their properties hold no others, unless the schema says so or another schema wants more."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from mope_bb.pcm.closed_objects import close_objects
from mope_bb.pcm.grammar import json_constraint
from tests.forms.schemas import random_schema

A: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
B: dict[str, Any] = {"properties": {"b": {}}, "required": ["b"]}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, not to have anything more."""
    return {**schema, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, closed(A)),
        ({"properties": {}}, closed({"properties": {}})),
        ({"properties": {"x": A}}, closed({"properties": {"x": closed(A)}})),
        ({"items": A, "prefixItems": [B]}, {"items": closed(A), "prefixItems": [closed(B)]}),
        ({"type": "object", "additionalProperties": A}, {"type": "object", "additionalProperties": closed(A)}),
        ({"anyOf": [A, {"type": "null"}], "title": "?"}, {"anyOf": [closed(A), {"type": "null"}], "title": "?"}),
        ({"oneOf": [A, B], "discriminator": {}}, {"oneOf": [closed(A), closed(B)], "discriminator": {}}),
        (
            {"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": A}},
            {"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": closed(A)}},
        ),
        # A name or a value that looks like a schema.
        ({"properties": {"properties": A}}, closed({"properties": {"properties": closed(A)}})),
        ({"enum": [A], "default": A}, {"enum": [A], "default": A}),
        # References lead in a circle, and through escapes.
        (
            {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
            closed({"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}),
        ),
        ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": A}}, {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": closed(A)}}),
    ],
)
def test_closed(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    """Wherever one schema alone says what an object holds."""
    before = copy.deepcopy(schema)
    assert close_objects(schema) == expected
    assert schema == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**A, "additionalProperties": True},
        {**A, "additionalProperties": {"type": "null"}},
        {**A, "patternProperties": {"^b": {}}},
        {**A, "required": ["a", "b"]},
        {**A, "minProperties": 2},
        {**A, "enum": [{"a": 1, "b": 2}]},
        {"allOf": [A, B]},
        {**A, "anyOf": [B, {"properties": {"c": {}}}]},
        {"oneOf": [A, B]},
        {"anyOf": [A, B], "required": ["b"]},
        {"if": A, "then": B},
        {"allOf": [{"properties": {"x": A}}, {"properties": {"x": B}}]},
        {"allOf": [{"$ref": "#/$defs/A"}, B], "$defs": {"A": A}},
        {"properties": {"x": {"$ref": "#/$defs/A"}}, "allOf": [B], "$defs": {"A": A}},
        {"properties": {"x": {"$ref": "elsewhere.json"}}},
        {"properties": {"x": {"$ref": "#/$defs/missing"}}},
        # What is no schema at all is for the grammar to refuse.
        {**A, "required": [["a"], {}]},
        {**A, "required": 5},
        {**A, "minProperties": "two"},
        {"anyOf": [A], "$ref": "#/anyOf/" + "9" * 5000},
        {"anyOf": 5, "items": "x", "$ref": None},
    ],
)
def test_left_open(schema: dict[str, Any]) -> None:
    """Where the schema says so, or more may be wanted of the same object."""
    assert close_objects(schema) == schema


def test_one_schema_used_alone_and_with_others_is_left_open() -> None:
    """Closing it would forbid what the others want."""
    alone = {"$ref": "#/$defs/A"}
    schema = {"properties": {"x": alone, "y": {"allOf": [alone, B]}}, "$defs": {"A": A}}
    assert close_objects(schema) == closed(schema)


def test_what_fits_the_closed_schema_fits_the_schema() -> None:
    """The shortest answer to each of many random schemas."""
    num_changed = 0
    for seed in range(400):
        schema = random_schema(seed)
        num_changed += close_objects(schema) != schema
        closing = json_constraint(schema).closing()
        assert closing is not None
        jsonschema.validate(json.loads(closing), close_objects(schema), cls=jsonschema.Draft202012Validator)
        jsonschema.validate(json.loads(closing), schema, cls=jsonschema.Draft202012Validator)
    assert num_changed > 10


def test_names_that_are_not_listed_are_not_allowed() -> None:
    """As an agent's function would not take them."""
    form = json_constraint(A)
    assert form.allows(b'{"a": 1')
    assert not form.allows(b'{"b')
    assert json_constraint({**A, "additionalProperties": True}).allows(b'{"b')
