"""Tools and forms in OpenAI's shapes: what is read, what experts are told, how calls are read back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mope_bb import ConfigError, Message
from mope_bb.conversations import parse_conversation
from mope_bb.tools import CallReader, Form, parse_form, told_messages

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOTHING = {"type": "function", "function": {"name": "wait"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
CALL = '{"tool": "get_weather", "arguments": {"city": "Kassel"}}'


def test_choices() -> None:
    """auto, none, required and a name."""
    assert not parse_form([WEATHER], "auto", None).is_call_required
    assert parse_form([WEATHER], "none", None) == Form()
    assert parse_form([WEATHER, NOTHING], "required", None).is_call_required
    named = parse_form([WEATHER, NOTHING], {"type": "function", "function": {"name": "wait"}}, None)
    assert [tool.name for tool in named.tools] == ["wait"]
    assert named.is_call_required
    assert parse_form([WEATHER], "none", SCHEMA).schema == {"type": "integer"}
    assert parse_form([], None, {"type": "json_object"}).schema == {"type": "object"}


@pytest.mark.parametrize(
    ("tools", "choice", "response_format", "part"),
    [
        ([{"type": "web_search"}], None, None, "a tool is not"),
        ([{"type": "function", "function": {"name": "no good"}}], None, None, "'no good'"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], None, None, "'a'"),
        ([WEATHER, WEATHER], None, None, "two tools have the name 'get_weather'"),
        ([WEATHER], "sometimes", None, "'sometimes'"),
        ([WEATHER], {"type": "function", "function": {"name": "other"}}, None, "'other'"),
        ([], "required", None, "`tools` is empty"),
        ([WEATHER] * 129, None, None, "at most 128"),
        ([], None, {"type": "json_schema", "json_schema": {}}, "not understood"),
        ([], None, {"type": "xml"}, "not understood"),
        ([], None, "json", "not understood"),
    ],
)
def test_wrong_shapes(tools: Any, choice: Any, response_format: Any, part: str) -> None:
    """Each is refused by a message that names it."""
    with pytest.raises(ConfigError, match=part):
        parse_form(tools, choice, response_format)


HISTORY: list[Any] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Kassel"}'}},
            {"id": "2", "type": "function", "function": {"name": "wait", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "2", "content": "waited"},
]


def test_history_in_words() -> None:
    """Calls are written as they are asked for, results are told by the user, all in one message."""
    system, user, assistant, results = told_messages(
        parse_conversation(HISTORY), parse_form([WEATHER], None, None), style="plain"
    )
    assert system.content.startswith("Be kind.\n\nThese tools can be called:\n- get_weather: The weather of a city.")
    assert '{"tool": "NAME", "arguments": {...}}' in system.content
    assert user.content == "And now?"
    assert assistant == Message("assistant", f'{CALL}\n{{"tool": "wait", "arguments": {{}}}}')
    assert results == Message("user", "get_weather returned: sunny\nwait returned: waited")


def test_results_and_the_next_question_are_one_message() -> None:
    """User and assistant take turns, as many templates want it."""
    asked = [*HISTORY, {"role": "user", "content": "And tomorrow?"}]
    told = told_messages(parse_conversation(asked), Form(), style="plain")
    assert [message.role for message in told] == ["system", "user", "assistant", "user"]
    assert told[-1].content == "get_weather returned: sunny\nwait returned: waited\nAnd tomorrow?"


def test_history_for_templates() -> None:
    """Calls and results stay in OpenAI's shape; a system message comes in front where there was none."""
    told = told_messages(parse_conversation(HISTORY[1:]), parse_form([WEATHER], "required", None), style="template")
    assert told[0].role == "system"
    assert "Answer only with a call" in told[0].content
    assert [json.loads(call)["id"] for call in told[2].tool_calls] == ["1", "2"]
    assert told[3] == Message("tool", "sunny", (), "1")


def test_schema_is_told() -> None:
    """What the answer must fit is in the system prompt; of `json_object` there is nothing to tell."""
    asked = parse_conversation("How many?")
    assert '{"type": "integer"}' in told_messages(asked, parse_form([], None, SCHEMA), style="plain")[0].content
    assert told_messages(asked, parse_form([], None, {"type": "json_object"}), style="plain") == asked


@pytest.mark.parametrize("size", [1, 2, 7, 200])
def test_call_is_read_in_parts(size: int) -> None:
    """Whatever the parts, each name comes once, and the arguments of each call add up."""
    text = f'{CALL}\n{{"tool": "wait", "arguments": {{}}}}\n{CALL}'
    reader = CallReader()
    found = [part for start in range(0, len(text), size) for part in reader.feed(text[start : start + size])]
    assert [(part.index, part.name) for part in found if part.name is not None] == [
        (0, "get_weather"),
        (1, "wait"),
        (2, "get_weather"),
    ]
    written = ["".join(part.arguments for part in found if part.index == index) for index in range(3)]
    assert written == ['{"city": "Kassel"}', "{}", '{"city": "Kassel"}']
    calls = reader.read(text)
    assert [(call.name, call.arguments) for call in calls] == list(
        zip(["get_weather", "wait", "get_weather"], written, strict=True)
    )
    assert {(part.index, part.call_id) for part in found} == set(enumerate(call.call_id for call in calls))
    assert len({call.call_id for call in calls}) == 3


def test_every_piece_of_a_call_is_a_part() -> None:
    """What is written between two calls is no part of either, but the stream goes on with it."""
    reader = CallReader()
    assert len(reader.feed(CALL)) == 1
    (between,) = reader.feed("\n")
    assert (between.index, between.name, between.arguments) == (1, None, "")
    ended, begun = reader.feed(f'{CALL}\n{{"to')
    assert (ended.index, ended.name, ended.arguments) == (1, "get_weather", '{"city": "Kassel"}')
    assert (begun.index, begun.name, begun.arguments) == (2, None, "")


def test_what_begins_a_call() -> None:
    """A brace, where text is allowed; the whole head with the name of a tool, where other JSON is."""
    text_or_call = parse_form([WEATHER], None, None)
    assert [text_or_call.begins_call(text) for text in ("", "{", " {", "Hi")] == [None, True, False, False]
    json_or_call = parse_form([WEATHER], None, SCHEMA)
    starts = ("", '{"to', CALL[:38], CALL, '{"tool": "hammer", "arguments": {}}', '{"name"')
    assert [json_or_call.begins_call(text) for text in starts] == [None, None, True, True, False, False]
    assert parse_form([WEATHER], "required", None).begins_call("") is True
    assert parse_form([], None, SCHEMA).begins_call("{") is False


@pytest.mark.parametrize("choice", [None, "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_several_calls_are_told(choice: Any) -> None:
    """Only where they are allowed."""
    for is_parallel in (False, True):
        form = parse_form([WEATHER], choice, None, parallel_tool_calls=is_parallel)
        assert form.takes_several_calls is is_parallel
        told = told_messages(parse_conversation("How is it?"), form, style="plain")[0].content
        assert ("several calls" in told) is is_parallel
    assert parse_form([WEATHER], "none", None, parallel_tool_calls=True) == Form()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": "no list"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]},
        {"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "a", "arguments": "{}"}}]},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "\ud800", "arguments": "{}"}}]},
    ],
)
def test_wrong_messages(message: Any) -> None:
    """Malformed calls and parts that are no text are refused."""
    with pytest.raises(ConfigError):
        parse_conversation([{"role": "user", "content": "Hi"}, message])
