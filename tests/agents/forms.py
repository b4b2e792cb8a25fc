"""The forms that the tests ask for, and who judges what comes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Literal

import jsonschema
from openai.types.chat import ChatCompletionToolParam, ChatCompletionUserMessageParam
from pydantic import BaseModel, Field

MODEL: Final = "mope:concise=0.7,friendly=0.3"
QUESTION: Final[ChatCompletionUserMessageParam] = {"role": "user", "content": "How do I fix a bike?"}


class Part(BaseModel):
    """One thing that is needed."""

    name: Literal["chain", "tire", "wheel"]
    quantity: int = Field(ge=1, le=9)


class Order(BaseModel):
    """Nested, with a list, an optional value and a choice."""

    parts: list[Part] = Field(min_length=1, max_length=2)
    is_urgent: bool
    note: str | None = Field(max_length=20)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """As strict tools and formats want it: no other properties, and all required."""
    for part in (schema, *schema.get("$defs", {}).values()):
        part |= {"additionalProperties": False, "required": list(part["properties"])}
    return schema


ORDER: Final = closed(Order.model_json_schema())
ORDER_FORMAT: Final[Any] = {"type": "json_schema", "json_schema": {"name": "order", "strict": True, "schema": ORDER}}
ORDER_TOOL: Final[ChatCompletionToolParam] = {
    "type": "function",
    "function": {"name": "place_order", "description": "Order parts.", "strict": True, "parameters": ORDER},
}
PRICE_TOOL: Final[ChatCompletionToolParam] = {
    "type": "function",
    "function": {
        "name": "price_of",
        "parameters": {
            "type": "object",
            "properties": {"part": {"enum": ["chain", "tire"]}},
            "required": ["part"],
            "additionalProperties": False,
        },
    },
}


def order_in(text: str | None) -> Order:
    """Both judges, of JSON schemas and of types, must find nothing wrong."""
    assert text is not None
    jsonschema.validate(json.loads(text), ORDER)
    return Order.model_validate_json(text, strict=True)


def only(calls: Sequence[Any] | None) -> Any:
    """The one call of an answer."""
    assert calls is not None
    assert len(calls) == 1
    return calls[0]
