"""Another preference in mid-answer, an answer that is begun with given text, and text that is no chat."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from mope_bb import (
    Answer,
    Config,
    ConfigError,
    Finished,
    PreferenceError,
    Session,
    TextDelta,
    ToolCallDelta,
    open_session,
)
from mope_bb.config import DecodingConfig

if TYPE_CHECKING:
    from mope_bb.zoo.serving import ZooServer

QUESTION = "How do I fix a bike?"
FOUR = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"d": 1.0}]
Scripted = Callable[..., Config]


@pytest.mark.parametrize("mode", ["lockstep", "lookahead", "draft"])
def test_next_token_has_the_new_weights(nano_experts: ZooServer, mode: Any) -> None:
    """Whatever was already drawn ahead for the old preference is not said."""

    async def answer_once(session: Session) -> tuple[Answer, str]:
        stream, texts = session.stream(QUESTION, preference="friendly,informative", max_tokens=40), []
        async for token in stream:
            texts.append(token.text)
            if len(texts) == 9:
                stream.steer("grumpy=0.7,technical=0.3")
            if len(texts) == 20:
                stream.steer("concise")
        return stream.answer, "".join(texts)

    async def run() -> tuple[Answer, str]:
        config = nano_experts.config().model_copy(update={"decoding": DecodingConfig(mode=mode)})
        async with open_session(config) as session:
            found = [await answer_once(session) for _ in range(8)]
            return max(found, key=lambda one: len(one[0].steps))  # some end before anything has changed

    answer, text = asyncio.run(run())
    assert len(answer.steps) > 21
    assert answer.text == text
    asked = [set(step.experts) for step in answer.steps]
    assert asked[:9] == [{"friendly", "informative"}] * 9
    assert asked[9:20] == [{"grumpy", "technical"}] * 11
    assert asked[20:] == [{"concise"}] * (len(asked) - 20)


def test_steered_greedy_answer_is_that_of_the_new_preference(nano_experts: ZooServer) -> None:
    """After the change the answer goes on as one that was begun with the same text."""

    async def run() -> tuple[Answer, Answer]:
        async with open_session(nano_experts.config()) as session:
            options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30}
            stream = session.stream(QUESTION, preference="friendly", **options)
            count = 0
            async for _ in stream:
                count += 1
                if count == 6:
                    begun = stream.text
                    stream.steer("grumpy")
            return stream.answer, await session.complete(
                QUESTION, preference="grumpy", answer_so_far=begun, **(options | {"max_tokens": 24})
            )

    steered, begun = asyncio.run(run())
    assert [step.piece for step in steered.steps[6:]] == [step.piece for step in begun.steps]


def test_wrong_preference_changes_nothing(scripted: Scripted) -> None:
    """It is refused, and the answer goes on as before."""

    async def run() -> Answer:
        async with open_session(scripted(left=FOUR, right=FOUR)) as session:
            stream = session.stream("Hi", preference="left")
            async for _ in stream:
                with pytest.raises(PreferenceError, match="'wrong'"):
                    stream.steer("wrong")
            return stream.answer

    answer = asyncio.run(run())
    assert answer.text == "abcd"
    assert {step.experts for step in answer.steps} == {("left",)}


def test_steering_before_the_first_token(scripted: Scripted) -> None:
    """The first token has the new weights already."""

    async def run() -> Answer:
        async with open_session(scripted(left=FOUR, right=FOUR)) as session:
            stream = session.stream("Hi", preference="left")
            stream.steer("right")
            async for _ in stream:
                pass
            return stream.answer

    assert {step.experts for step in asyncio.run(run()).steps} == {("right",)}


def test_greedy_answer_goes_on_from_any_point(nano_experts: ZooServer) -> None:
    """Begun with its own first words, which do not come again."""

    async def run() -> None:
        async with open_session(nano_experts.config()) as session:
            options: dict[str, Any] = {"preference": "concise,technical", "temperature": 0.0, "max_tokens": 30}
            whole = await session.complete(QUESTION, **options)
            for count in (1, 4, 9):
                begun = b"".join(step.piece.data for step in whole.steps[:count]).decode()
                rest = await session.complete(QUESTION, answer_so_far=begun, **options)
                assert whole.text.startswith(begun + rest.text[:20])
                assert rest.num_prompt_tokens == whole.num_prompt_tokens + count

    asyncio.run(run())


def test_plain_text_has_no_template(nano_experts: ZooServer) -> None:
    """The experts read the text and nothing else: the same words as a chat are three tokens more."""

    async def run() -> None:
        async with open_session(nano_experts.config()) as session:
            options: dict[str, Any] = {"preference": "concise,friendly", "temperature": 0.0, "max_tokens": 12}
            stream = session.stream_text("Take a", **options)
            async for _ in stream:
                pass
            chat = await session.complete("Take a", **options)
            assert stream.answer.num_prompt_tokens == chat.num_prompt_tokens - 3  # user, end, assistant
            assert stream.answer.steps[0].candidates != chat.steps[0].candidates
            with pytest.raises(ConfigError, match="empty"):
                session.stream_text("")

    asyncio.run(run())


def test_events_of_an_answer_and_of_a_call(nano_experts: ZooServer) -> None:
    """One event for each token, then the whole; the parts of a call add up to it."""
    tool = {
        "type": "function",
        "function": {"name": "note", "parameters": {"properties": {"text": {"type": "string"}}}},
    }

    async def run() -> None:
        async with open_session(nano_experts.config()) as session:
            events = [one async for one in session.stream(QUESTION, preference="concise", max_tokens=20).events()]
            assert all(isinstance(one, TextDelta) for one in events[:-1])
            last = events[-1]
            assert isinstance(last, Finished)
            assert "".join(one.text for one in events if isinstance(one, TextDelta)) == last.answer.text
            assert len(events) == len(last.answer.steps) + 1
            stream = session.stream(QUESTION, preference="concise", tools=[tool], tool_choice="required")
            parts = [one async for one in stream.events()]
            calls = [one for one in parts if isinstance(one, ToolCallDelta)]
            last = parts[-1]
            assert isinstance(last, Finished)
            assert [one.name for one in calls if one.name] == ["note"]
            assert last.answer.finish_reason == "tool_calls"
            assert last.answer.text == ""
            (call,) = last.answer.tool_calls
            assert call.arguments == "".join(one.arguments for one in calls)
            assert {one.call_id for one in calls} == {call.call_id}

    asyncio.run(run())


def test_a_token_may_end_a_call_and_begin_another(scripted: Scripted) -> None:
    """Then it has an event for each; what it says of the whole answer is told once."""
    properties = {"n": {"type": "integer"}}
    tool = {
        "type": "function",
        "function": {"name": "count", "parameters": {"properties": properties, "required": ["n"]}},
    }
    # What the form leaves no choice about comes before and between them.
    script = [{"forced": 1.0}, {'1}}\n{"tool': 1.0}, {"forced": 1.0}, {"2": 1.0}, {"}}": 1.0}]

    async def run() -> None:
        async with open_session(scripted(caller=script)) as session:
            stream = session.stream(
                QUESTION, preference="caller", tools=[tool], tool_choice="required", parallel_tool_calls=True
            )
            *calls, last = [one async for one in stream.events()]
        assert isinstance(last, Finished)
        told = [(one.name, one.arguments) for one in last.answer.tool_calls]
        assert told == [("count", '{"n": 1}'), ("count", '{"n": 2}')]
        assert len(calls) == len(last.answer.steps) + 1
        for index, call in enumerate(last.answer.tool_calls):
            parts = [one for one in calls if isinstance(one, ToolCallDelta) and one.index == index]
            assert [one.name for one in parts if one.name] == ["count"]
            assert "".join(one.arguments for one in parts) == call.arguments
            assert {one.call_id for one in parts} == {call.call_id}
        reasons = [one.token.finish_reason for one in calls if isinstance(one, ToolCallDelta)]
        assert reasons == [None] * (len(calls) - 1) + ["tool_calls"]

    asyncio.run(run())
