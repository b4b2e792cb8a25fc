"""Answers that must fit a JSON schema, by experts that have never seen JSON: the zoo behind the real llama.cpp."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final

import jsonschema
import pytest

from mope_bb import Answer, ConfigError, Session, open_session
from tests.forms.schemas import random_schema

if TYPE_CHECKING:
    from mope_bb.zoo.serving import ZooServer

NUM_SCHEMAS: Final = 200
NUM_OPEN: Final = 8
MAX_TOKENS: Final = 256


def form(schema: Any) -> dict[str, Any]:
    """`response_format` as OpenAI writes it."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def answer_all(session: Session) -> list[Answer]:
    """One answer for each schema, several at a time."""
    outcomes: dict[int, Answer] = {}
    waiting = iter(range(NUM_SCHEMAS))

    async def work() -> None:
        for seed in waiting:
            preference = ("concise,friendly", "technical", "grumpy=0.8,informative=0.2")[seed % 3]
            outcomes[seed] = await session.complete(
                "How do I fix a bike?",
                preference=preference,
                response_format=form(random_schema(seed)),
                temperature=(1.0, 0.0, 1.5)[seed % 3],
                max_tokens=MAX_TOKENS,
                seed=seed,
            )

    await asyncio.gather(*(work() for _ in range(NUM_OPEN)))
    return [outcomes[seed] for seed in range(NUM_SCHEMAS)]


def test_every_answer_is_valid(nano_experts: ZooServer) -> None:
    """200 schemas: every answer fits its own, and has ended by itself."""

    async def run() -> list[Answer]:
        async with open_session(nano_experts.config()) as session:
            return await answer_all(session)

    answers = asyncio.run(run())
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for seed, answer in enumerate(answers):
        schema = random_schema(seed)
        jsonschema.validate(
            json.loads(answer.text), schema, cls=jsonschema.Draft202012Validator, format_checker=checker
        )
        assert answer.finish_reason == "stop", (seed, schema)
    # The experts did write: not everything was given by the grammar.
    steps = [step for answer in answers for step in answer.steps]
    assert 0.1 < sum(step.is_forced for step in steps) / len(steps) < 0.9


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"not": {}}, {"type": "array", "uniqueItems": True}, False])
def test_what_cannot_be_enforced_is_refused(nano_experts: ZooServer, schema: Any) -> None:
    """With what llguidance says, before an expert is asked."""

    async def run() -> None:
        async with open_session(nano_experts.config()) as session:
            with pytest.raises(ConfigError, match="cannot be enforced") as caught:
                await session.complete("Hi", preference="concise", response_format=form(schema))
            assert caught.value.hint
            assert session.account.total.num_calls == 0

    asyncio.run(run())
