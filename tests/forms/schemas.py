"""Random JSON schemas of what people write: nested objects and lists, choices, bounds, patterns, references."""

from __future__ import annotations

import json
import random
from typing import Any, Final

NAMES: Final = ("name", "city", "steps", "tool", "minutes", "is_safe", "größe", "first name", "a", "notes", "kind")
PATTERNS: Final = ("^[A-Z]{2}-[0-9]{3}$", "^(red|green|blue)+$", "^[a-z]*z$", "^\\d{1,4}$", "^#[0-9a-f]{6}$")
FORMATS: Final = ("date", "time", "date-time", "uuid", "email", "ipv4")


MAX_LENGTH: Final = 450
"""Characters of a schema: experts are told of it, and the zoo's read 1,024 tokens."""


def random_schema(seed: int) -> dict[str, Any]:
    """The schema number `seed`."""
    rng = random.Random(f"schema {seed}")
    found = _whole(rng)
    while len(json.dumps(found, ensure_ascii=False)) > MAX_LENGTH:
        found = _whole(rng)
    return found


def _whole(rng: random.Random) -> dict[str, Any]:
    found = _value(rng, depth=0)
    if rng.random() < 0.15:
        found = {
            "type": "object",
            "properties": {"value": {"$ref": "#/$defs/node"}},
            "required": ["value"],
            "additionalProperties": False,
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"item": found, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                    "required": ["item", "next"],
                    "additionalProperties": False,
                }
            },
        }
    return found


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_text, _text, _number, _choice, _constant, _boolean]
    if depth < 3:
        kinds += [_object, _object, _object, _list, _list, _either]
    return rng.choice(kinds)(rng, depth)


def _text(rng: random.Random, depth: int) -> dict[str, Any]:
    del depth
    found: dict[str, Any] = {"type": "string"}
    extra = rng.random()
    if extra < 0.2:
        low = rng.randint(0, 6)
        found |= {"minLength": low, "maxLength": low + rng.randint(0, 20)}
    elif extra < 0.35:
        found["pattern"] = rng.choice(PATTERNS)
    elif extra < 0.5:
        found["format"] = rng.choice(FORMATS)
    return found


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    del depth
    found: dict[str, Any] = {"type": rng.choice(("integer", "number"))}
    if rng.random() < 0.5:
        low = rng.randint(-50, 50)
        found |= {"minimum": low, "maximum": low + rng.randint(0, 300)}
    elif rng.random() < 0.3:
        found["exclusiveMinimum"] = rng.randint(-5, 1000)
    return found


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"enum": rng.sample(["soon", "später", "never", 7, None, True, 2.5, 'quo"te', ""], rng.randint(1, 4))}


def _constant(rng: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"const": rng.choice(["fixed", 12, False, None, "🚲"])}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    del rng, depth
    return {"type": "boolean"}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 4))
    found: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    rest = rng.random()
    if rest < 0.7:
        found["additionalProperties"] = False
    elif rest < 0.85:
        found["additionalProperties"] = _value(rng, depth + 2)
    return found


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "array", "items": _value(rng, depth + 1)}
    if rng.random() < 0.5:
        low = rng.randint(0, 2)
        found |= {"minItems": low, "maxItems": low + rng.randint(0, 3)}
    return found


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
