"""Forms by experts that cannot write JSON, behind endpoints with short lists: often nothing that is listed fits."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any, Final

import jsonschema
import pytest

from mope_bb import Answer, Session, open_session
from mope_bb.config import parse_config
from tests.forms.schemas import random_schema
from tests.forms.test_schemas import NAMED, TOOL, form

if TYPE_CHECKING:
    from tests.endpoints.stand_ins import StandIns

NUM_SCHEMAS: Final = 24
QUESTION: Final = "How do I fix a bike?"


async def answer_all(session: Session) -> list[Answer]:
    """One answer for each schema, several at a time."""
    turns = asyncio.Semaphore(4)

    async def answer(seed: int) -> Answer:
        async with turns:
            return await session.complete(
                QUESTION,
                response_format=form(random_schema(seed)),
                temperature=(1.0, 0.0, 1.5)[seed % 3],
                merge=("linear", "geometric")[seed % 2],
                seed=seed,
            )

    return await asyncio.gather(*map(answer, range(NUM_SCHEMAS)))


@pytest.mark.parametrize(("provider", "top_k"), [("openrouter", 20), ("fireworks", 5)])
def test_every_answer_is_valid(
    stand_ins: StandIns, provider: str, top_k: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody says is given by the form, is counted, and is told once for each answer."""
    table = {"provider": provider, "top_k": top_k, **stand_ins.table(provider)}
    experts = [{"name": name, "dimension": name, **table} for name in ("concise", "friendly")]

    async def run() -> list[Answer]:
        async with open_session(parse_config({"experts": experts, "cache": {"enabled": False}})) as session:
            call = await session.complete(QUESTION, tools=[TOOL], tool_choice="required", seed=1)
            assert call.tool_calls[0].name == "note"
            return [call, *await answer_all(session)]

    with caplog.at_level(logging.WARNING):
        call, *answers = asyncio.run(run())
    for seed, answer in enumerate(answers):
        jsonschema.validate(json.loads(answer.text), random_schema(seed))
        assert answer.finish_reason == "stop"
    unheard = [one.effort.num_unheard for one in (call, *answers)]
    assert len([number for number in unheard if number]) == caplog.text.count("goes on by the form alone there")
    for one in answers:
        # Lists that are as long as they can be are not asked for twice.
        num_heard = sum(not step.is_forced for step in one.steps)
        assert one.effort.num_round_trips <= num_heard + one.effort.num_unheard
    assert 0 < sum(unheard) < sum(step.is_forced for one in (call, *answers) for step in one.steps)


def test_who_can_write_json_is_heard() -> None:
    """A script of what fits, one text a token: nothing is made up, and the string is the expert's own."""
    script: list[Any] = [{"forced": 1.0}, {"Ann": 0.9, "x": 0.1}, {'"}': 1.0}]
    expert = {"name": "writer", "dimension": "writer", "provider": "scripted", "script": script}

    async def run() -> Answer:
        async with open_session(parse_config({"experts": [expert], "cache": {"enabled": False}})) as session:
            return await session.complete(QUESTION, response_format=form(NAMED), temperature=0)

    answer = asyncio.run(run())
    assert answer.text == '{"name": "Ann"}'
    assert answer.effort.num_unheard == 0
