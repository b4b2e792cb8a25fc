"""What agents ask of an endpoint, over HTTP and with the clients they have: JSON, tool calls, usage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamEvent
from pydantic_ai import Agent, ModelSettings, NativeOutput, RunContext, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

from tests.agents.forms import MODEL, ORDER_FORMAT, ORDER_TOOL, PRICE_TOOL, QUESTION, Order, only, order_in
from tests.agents.serving import serve_mope, write_config


@pytest.fixture(scope="module")
def client(mope_url: str) -> Iterator[OpenAI]:
    """The unmodified SDK; what goes wrong is not tried again."""
    with OpenAI(base_url=mope_url, api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_json_that_fits(client: OpenAI, seed: int) -> None:
    """`response_format` with a schema: whole JSON and nothing else, even where there is little room."""
    for max_tokens in (80, 300):
        reply = client.chat.completions.create(
            model=MODEL, messages=[QUESTION], response_format=ORDER_FORMAT, max_tokens=max_tokens, seed=seed
        )
        (choice,) = reply.choices
        order_in(choice.message.content)
        assert choice.finish_reason == "stop"
        assert reply.usage is not None
        assert 0 < reply.usage.completion_tokens <= max_tokens
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_parse_into_a_type(client: OpenAI) -> None:
    """The SDK's own reading of a pydantic model."""
    reply = client.chat.completions.parse(model=MODEL, messages=[QUESTION], response_format=Order, max_tokens=300)
    parsed = reply.choices[0].message.parsed
    assert isinstance(parsed, Order)
    assert parsed == order_in(reply.choices[0].message.content)


def test_many_at_once(mope_url: str) -> None:
    """The asynchronous SDK: JSON, calls and plain answers at the same time do not get into each other's way."""
    forms: tuple[Any, ...] = (
        {"response_format": ORDER_FORMAT},
        {"tools": [ORDER_TOOL], "tool_choice": "required"},
        {},
    )

    async def main() -> None:
        async with AsyncOpenAI(base_url=mope_url, api_key="none", max_retries=0) as asynchronous:
            create: Any = asynchronous.chat.completions.create
            calls = [create(model=MODEL, messages=[QUESTION], max_tokens=120, **form) for form in 3 * forms]
            choices = [reply.choices[0] for reply in await asyncio.gather(*calls)]
        for choice in choices[::3]:
            order_in(choice.message.content)
        for choice in choices[1::3]:
            order_in(only(choice.message.tool_calls).function.arguments)
        for choice in choices[2::3]:
            assert choice.message.content
            assert not choice.message.content.startswith("{")

    asyncio.run(main())


def test_any_json(client: OpenAI) -> None:
    """Without a schema: an object."""
    reply = client.chat.completions.create(
        model=MODEL, messages=[QUESTION], response_format={"type": "json_object"}, max_tokens=100
    )
    assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)


def test_a_strict_tool_with_a_nested_schema(client: OpenAI) -> None:
    """Whole and read by the SDK; another tool that was offered is left alone where one is named."""
    reply = client.chat.completions.parse(
        model=MODEL,
        messages=[QUESTION],
        tools=[openai.pydantic_function_tool(Order, name="place_order"), {**PRICE_TOOL, "function": strict_price()}],
        tool_choice={"type": "function", "function": {"name": "place_order"}},
        max_tokens=300,
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    call = only(choice.message.tool_calls)
    assert (call.type, call.function.name) == ("function", "place_order")
    assert call.function.parsed_arguments == order_in(call.function.arguments)


def strict_price() -> Any:
    """The SDK reads strict tools only."""
    return {**PRICE_TOOL["function"], "strict": True}


def test_streamed_calls_are_put_together_by_the_sdk(client: OpenAI) -> None:
    """Its stream helper finds the name once, arguments that only grow, and the whole that the last chunk leaves."""
    grown: dict[str, str] = {}
    kinds: list[str] = []
    with client.chat.completions.stream(
        model=MODEL,
        messages=[QUESTION],
        tools=[{**ORDER_TOOL}, {**PRICE_TOOL, "function": strict_price()}],
        tool_choice="required",
        max_tokens=300,
        stream_options={"include_usage": True},
    ) as stream:
        for event in stream:
            kinds.append(event.type)
            _follow(event, grown)
        final = stream.get_final_completion()
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    call = only(choice.message.tool_calls)
    assert call.id.startswith("call_")
    assert grown == {call.function.name: call.function.arguments}
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert kinds.count("tool_calls.function.arguments.delta") > 2
    if call.function.name == "place_order":
        order_in(call.function.arguments)
    else:
        assert json.loads(call.function.arguments)["part"] in ("chain", "tire")
    assert final.usage is not None
    assert final.usage.completion_tokens > 5


def test_several_calls_in_one_answer(client: OpenAI) -> None:
    """The same whole and streamed; the results of all go back in one turn; and without the flag there is one."""
    asked: Any = {"model": MODEL, "messages": [QUESTION], "tools": [{**PRICE_TOOL, "function": strict_price()}]}
    asked |= {"tool_choice": "required", "max_tokens": 150}
    numbers = []
    for seed in range(4):
        message = client.chat.completions.create(**asked, seed=seed, parallel_tool_calls=True).choices[0].message
        with client.chat.completions.stream(**asked, seed=seed, parallel_tool_calls=True) as stream:
            (choice,) = stream.get_final_completion().choices
        calls, streamed = ([one.function for one in found.tool_calls or ()] for found in (message, choice.message))
        assert [(one.name, one.arguments) for one in calls] == [(one.name, one.arguments) for one in streamed]
        assert {json.loads(one.arguments)["part"] for one in calls} <= {"chain", "tire"}
        assert len({one.id for one in message.tool_calls or ()}) == len(calls)
        assert choice.finish_reason == "tool_calls"
        numbers.append(len(calls))
        only(client.chat.completions.create(**asked, seed=seed).choices[0].message.tool_calls)
        results: list[Any] = [
            {"role": "tool", "tool_call_id": one.id, "content": "12"} for one in message.tool_calls or ()
        ]
        again = client.chat.completions.create(
            model=MODEL, messages=[QUESTION, message.model_dump(), *results], max_tokens=5
        )
        assert again.choices[0].message.content
    assert max(numbers) > 1, numbers


def _follow(event: ChatCompletionStreamEvent[Any], grown: dict[str, str]) -> None:
    if event.type == "tool_calls.function.arguments.delta":
        grown[event.name] = grown.get(event.name, "") + event.arguments_delta
        assert event.arguments == grown[event.name]
    # The first chunk, which says who speaks, counts as one.
    assert event.type != "content.delta" or event.delta == ""


def test_streamed_json_is_whole(client: OpenAI) -> None:
    """Chunk by chunk the same text that the final reply has."""
    texts = []
    with client.chat.completions.stream(
        model=MODEL, messages=[QUESTION], response_format=Order, max_tokens=300, seed=5
    ) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(texts) > 5
    assert "".join(texts) == final.choices[0].message.content
    assert final.choices[0].message.parsed == order_in("".join(texts))


def test_a_model_that_may_call_answers_in_words(client: OpenAI) -> None:
    """The zoo has never heard of tools: with "auto" it says something, and none of it is lost."""
    reply = client.chat.completions.create(
        model=MODEL, messages=[QUESTION], tools=[PRICE_TOOL], max_tokens=60, seed=4, temperature=0
    )
    (choice,) = reply.choices
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.finish_reason in ("stop", "length")


def test_an_expert_that_knows_tools_calls_by_itself(tmp_path: Path) -> None:
    """With "auto", whole and streamed: what begins as a call is one, and is told as nothing else."""
    # What stands between its own words is left no choice by the form, and counts as one.
    script = [{'{"tool': 0.9, "Well": 0.05}, {"forced": 0.9}, {"chain": 0.6, "tire": 0.3}]
    expert = {"name": "caller", "dimension": "caller", "provider": "scripted", "script": script}
    path = write_config(tmp_path / "mope.toml", [expert])
    asked: Any = {"model": "mope", "messages": [QUESTION], "tools": [PRICE_TOOL], "temperature": 0}
    with serve_mope(path) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**asked)
        with client.chat.completions.create(stream=True, **asked) as stream:
            choices = [chunk.choices[0] for chunk in stream]
    assert whole.choices[0].finish_reason == choices[-1].finish_reason == "tool_calls"
    call = only(whole.choices[0].message.tool_calls)
    assert (call.function.name, call.function.arguments) == ("price_of", '{"part": "chain"}')
    deltas = [one for choice in choices for one in choice.delta.tool_calls or ()]
    assert [one.function.name for one in deltas if one.function and one.function.name] == ["price_of"]
    assert "".join(one.function.arguments or "" for one in deltas if one.function) == '{"part": "chain"}'
    assert not any(choice.delta.content for choice in choices)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tool"),
        ({"tools": [PRICE_TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"response_format": ORDER_FORMAT, "max_tokens": 3}, "max_tokens"),
        ({"tools": [PRICE_TOOL], "tool_choice": "required", "max_tokens": 2}, "max_tokens"),
    ],
)
def test_forms_that_cannot_be_are_refused(client: OpenAI, body: Mapping[str, Any], param: str) -> None:
    """With 400, what is wrong and what to do, streamed or not."""
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError, match=param) as caught:
            client.chat.completions.create(model=MODEL, messages=[QUESTION], stream=is_streamed, extra_body=dict(body))
        assert caught.value.status_code == 400


@pytest.mark.parametrize("output", [NativeOutput(Order), ToolOutput(Order)])
def test_pydantic_ai_gets_its_type(mope_url: str, output: Any) -> None:
    """Both ways of pydantic-ai, at the first try, and its count of what it cost."""

    async def main() -> None:
        async with AsyncOpenAI(base_url=mope_url, api_key="none", max_retries=0) as asynchronous:
            model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=asynchronous))
            agent = Agent(model, output_type=output, model_settings=ModelSettings(max_tokens=300))
            result = await agent.run("Order what my bike needs.", usage_limits=UsageLimits(request_limit=1))
        assert isinstance(result.output, Order)
        assert (result.usage.requests, result.usage.input_tokens > 0) == (1, True)
        assert result.usage.output_tokens > 5

    asyncio.run(main())


def test_pydantic_ai_calls_or_answers(mope_url: str) -> None:
    """Tools and a form for the answer in one request: a call, or JSON that fits; the agent gets to its type."""
    called: list[str] = []

    def price_of(part: Literal["chain", "tire"]) -> float:
        """The price of a part."""
        called.append(part)
        return 24.5

    def settings(context: RunContext[None]) -> ModelSettings:
        # The zoo would call for ever.
        return ModelSettings(max_tokens=300, seed=context.run_step, tool_choice="none" if called else "auto")

    async def main() -> None:
        async with AsyncOpenAI(base_url=mope_url, api_key="none", max_retries=0) as asynchronous:
            model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=asynchronous))
            agent = Agent(model, output_type=NativeOutput(Order), tools=[price_of], model_settings=settings)
            result = await agent.run("Order what my bike needs.", usage_limits=UsageLimits(request_limit=2))
        assert isinstance(result.output, Order)
        assert result.usage.requests == 1 + len(called)

    asyncio.run(main())
