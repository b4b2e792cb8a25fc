"""Answers that must fit a JSON schema, by experts that have never seen JSON: the zoo behind the real llama.cpp."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

import jsonschema
import openai
import pytest
from openai.types.chat.chat_completion import Choice

from mope_bb import Answer, ConfigError, ContextLengthError, MopeError, open_session
from tests.forms.schemas import random_schema
from tests.server.serving import served

if TYPE_CHECKING:
    from mope_bb.zoo.serving import ZooServer

NUM_SCHEMAS: Final = 200
NUM_OPEN: Final = 8
MAX_TOKENS: Final = 256


def form(schema: Any) -> Any:
    """`response_format` as OpenAI writes it."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def answer_all(client: openai.AsyncOpenAI) -> list[Choice]:
    """One answer for each schema, several at a time."""
    found: dict[int, Choice] = {}
    waiting = iter(range(NUM_SCHEMAS))

    async def work() -> None:
        for seed in waiting:
            completion = await client.chat.completions.create(
                model="mope",
                messages=[{"role": "user", "content": "How do I fix a bike?"}],
                response_format=form(random_schema(seed)),
                temperature=(1.0, 0.0, 1.5)[seed % 3],
                max_tokens=MAX_TOKENS,
                seed=seed,
                extra_body={
                    "preference": ("concise,friendly", "technical", "grumpy=0.8,informative=0.2")[seed % 3],
                    "merge": ("linear", "product", "geometric")[seed // 3 % 3],
                    "trace": "weights",
                },
            )
            # Who tells long lists is always heard.
            assert (completion.model_extra or {})["mope"]["effort"]["num_unheard"] == 0
            found[seed] = completion.choices[0]

    async with client:
        await asyncio.gather(*(work() for _ in range(NUM_OPEN)))
    return [found[seed] for seed in range(NUM_SCHEMAS)]


def test_every_answer_is_valid(nano_experts: ZooServer) -> None:
    """200 schemas, by the openai SDK over a socket: every answer fits its own, and has ended by itself."""
    with served(nano_experts.config()) as server:
        choices = asyncio.run(answer_all(server.async_sdk()))
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for seed, choice in enumerate(choices):
        schema = random_schema(seed)
        jsonschema.validate(
            json.loads(choice.message.content or ""),
            schema,
            cls=jsonschema.Draft202012Validator,
            format_checker=checker,
        )
        assert choice.finish_reason == "stop", (seed, schema)
    # The experts did write: not everything was given by the grammar.
    is_forced = [token["is_forced"] for choice in choices for token in (choice.model_extra or {})["trace"]]
    assert 0.1 < sum(is_forced) / len(is_forced) < 0.9


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"not": {}},
        {"type": "array", "uniqueItems": True},
        False,
        {"properties": {"a": {}}, "required": [["a"]]},
        {"$ref": "#/anyOf/" + "9" * 5000, "anyOf": [{}]},
    ],
)
def test_what_cannot_be_enforced_is_refused(nano_experts: ZooServer, schema: Any) -> None:
    """With what llguidance says, before an expert is asked."""

    async def run() -> None:
        async with open_session(nano_experts.config()) as session:
            with pytest.raises(ConfigError, match="cannot be enforced") as caught:
                await session.complete("Hi", preference="concise", response_format=form(schema))
            assert caught.value.hint
            assert session.account.total.num_calls == 0

    asyncio.run(run())


ENDLESS = {
    "$ref": "#/$defs/A",
    "$defs": {
        "A": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/A"}},
            "required": ["a"],
            "additionalProperties": False,
        }
    },
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": {"properties": {"text": {"type": "string"}}}}}
NAMED = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"response_format": form(ENDLESS)}, ConfigError, "no short answer"),
        ({"response_format": form(NAMED), "answer_so_far": "Sure: {"}, ConfigError, "does not fit the form"),
        ({"response_format": form(NAMED), "max_tokens": 5}, ConfigError, "max_tokens is 5"),
        ({"conversation": "bike " * 3000, "response_format": form(NAMED)}, ContextLengthError, "context"),
        ({"conversation": "bike " * 3000, "tools": [TOOL], "tool_choice": "required"}, ContextLengthError, "context"),
    ],
)
def test_no_answer_is_made_up(
    nano_experts: ZooServer, options: dict[str, Any], error: type[MopeError], part: str
) -> None:
    """Where nothing fits, or no expert can read the question, nothing is said: not even what the form would give."""

    async def run() -> None:
        async with open_session(nano_experts.config()) as session:
            asked = {"conversation": "Hi", "preference": "concise", **options}
            stream = session.stream(asked.pop("conversation"), **asked)
            with pytest.raises(error, match=part):
                async for _ in stream:
                    pytest.fail("a token was told")

    asyncio.run(run())


def test_answers_go_on_from_given_text(nano_experts: ZooServer) -> None:
    """What is given counts as the beginning of the form."""

    async def run() -> None:
        async with open_session(nano_experts.config()) as session:
            options = {"preference": "concise", "response_format": form(NAMED), "answer_so_far": '{"name": "A '}
            answer = await session.complete("Hi", **options)
            assert json.loads('{"name": "A ' + answer.text)["name"].startswith("A ")

    asyncio.run(run())


def test_an_answer_ends_whole_where_the_context_does(nano_experts: ZooServer) -> None:
    """An expert's context of 1,024 tokens is full before max_tokens is: the form is completed without the experts."""
    long = {"type": "object", "properties": {"text": {"type": "string", "minLength": 5000}}, "required": ["text"]}
    texts = {"type": "array", "items": {"type": "string", "minLength": 30}, "minItems": 12}

    async def run() -> Answer:
        async with open_session(nano_experts.config()) as session:
            with pytest.raises(ConfigError, match="no short answer"):
                await session.complete("Hi", preference="concise", response_format=form(long), max_tokens=8000)
            return await session.complete(
                "bike " * 300, preference="concise", response_format=form(texts), max_tokens=2000, temperature=0.0
            )

    answer = asyncio.run(run())
    jsonschema.validate(json.loads(answer.text), texts)
    assert answer.finish_reason == "stop"
