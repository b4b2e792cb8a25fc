"""Tools in words: how experts that know nothing of tools are told of them, and how their calls are read.

A call is an answer that is one JSON object, `{"tool": NAME, "arguments": {...}}`; several are several lines. It is the
same for every expert, whatever syntax its own template has, since experts of one answer write the same tokens.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from mope_bb.errors import ConfigError
from mope_bb.types import Message, ToolCall

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HEAD: Final = re.compile(r'\{"tool": "([^"]*)", "arguments": ')
MAX_TOOLS: Final = 128


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that an answer may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """The JSON schema of its arguments, an object."""


@dataclass(frozen=True, slots=True)
class Form:
    """Which form an answer must have."""

    tools: tuple[Tool, ...] = ()
    """Those that may be called."""
    is_call_required: bool = False
    takes_several_calls: bool = False
    schema: Mapping[str, Any] | bool | None = None
    """What an answer that is no call must fit, as JSON; None = it is text."""
    tells_schema: bool = False
    """Whether the experts are told of the schema."""

    def begins_call(self, text: str) -> bool | None:
        """Whether an answer that begins with `text` is a call; None where that cannot be told yet."""
        if not self.tools or self.is_call_required:
            return bool(self.tools)
        if self.schema is None:
            return text[:1] == "{" if text else None
        if found := _HEAD.match(text):
            return any(tool.name == found[1] for tool in self.tools)
        heads = [call_prefix(tool.name) for tool in self.tools]
        return None if any(head.startswith(text) for head in heads) else False


def parse_form(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    response_format: Mapping[str, Any] | None,
    *,
    parallel_tool_calls: bool = False,
) -> Form:
    """Read `tools`, `tool_choice` and `response_format` in OpenAI's shapes. Raises ConfigError."""
    offered = tuple(_parse_tool(tool) for tool in tools or ())
    if len(offered) > MAX_TOOLS:
        raise ConfigError(f"{len(offered)} tools are offered, at most {MAX_TOOLS} can be")
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "allowed_tools":
        offered, tool_choice = _parse_allowed(tool_choice, offered)
    names = [tool.name for tool in offered]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two tools have the name {twice!r}")
    schema, tells_schema = _parse_format(response_format)
    kind = _parse_choice(tool_choice, names)
    if kind == "none" or not offered:
        return Form(schema=schema, tells_schema=tells_schema)
    if kind == "auto":
        return Form(offered, takes_several_calls=parallel_tool_calls, schema=schema, tells_schema=tells_schema)
    if kind != "required":
        offered = tuple(tool for tool in offered if tool.name == kind.removeprefix("name:"))
    return Form(offered, is_call_required=True, takes_several_calls=parallel_tool_calls)


def _parse_tool(tool: object) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(function, Mapping):
        raise ConfigError('a tool is not {"type": "function", "function": {"name": ..., "parameters": {...}}}')
    name, description = function.get("name"), function.get("description") or ""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"the tool name {name!r} is not 1 to 64 letters, digits, '_', '-' or '.'")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(description, str) or not isinstance(parameters, Mapping):
        raise ConfigError(f"tool {name!r}: `description` must be text and `parameters` a JSON schema")
    if "type" not in parameters and not parameters.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
        parameters = {**parameters, "type": "object"}
    return Tool(name, description, parameters)


def _parse_allowed(choice: Mapping[str, Any], offered: Sequence[Tool]) -> tuple[tuple[Tool, ...], str]:
    """The tools that may be called, and whether one must be: OpenAI's `allowed_tools`."""
    section = choice.get("allowed_tools")
    listed = section.get("tools") if isinstance(section, Mapping) else None
    mode = section.get("mode", "auto") if isinstance(section, Mapping) else None
    functions = [one.get("function") if isinstance(one, Mapping) else None for one in listed or ()]
    names = {function.get("name") for function in functions if isinstance(function, Mapping)}
    allowed = tuple(tool for tool in offered if tool.name in names)
    if mode not in ("auto", "required") or not allowed or len(allowed) < len(names):
        raise ConfigError(
            f"tool_choice is {choice!r}, expected the mode auto or required and names of tools",
            hint=f"Offered: {', '.join(tool.name for tool in offered) or 'none'}.",
        )
    return allowed, mode


def _parse_choice(choice: object, names: Sequence[str]) -> str:
    """auto, none, required, or "name:" with a tool's name."""
    if choice is None:
        return "auto"
    if choice in ("auto", "none"):
        return str(choice)
    if not names:
        raise ConfigError(f"tool_choice is {choice!r} and `tools` is empty")
    if choice == "required":
        return "required"
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise ConfigError(
            f"tool_choice is {choice!r}, expected auto, none, required or the name of a tool",
            hint=f"Offered: {', '.join(names)}.",
        )
    return f"name:{name}"


def _parse_format(response_format: object) -> tuple[Mapping[str, Any] | bool | None, bool]:
    if response_format is None:
        return None, False
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None, False
    if kind == "json_object":
        return {"type": "object"}, False
    if isinstance(response_format, Mapping) and kind == "json_schema":
        section = response_format.get("json_schema")
        schema = section.get("schema") if isinstance(section, Mapping) else None
        if isinstance(schema, Mapping | bool):
            return schema, True
    raise ConfigError(
        "`response_format` is not understood",
        hint='Expected {"type": "json_schema", "json_schema": {"schema": {...}}}, or type "json_object" or "text".',
    )


def call_prefix(name: str) -> str:
    """How the call of a tool begins, up to its arguments; a brace follows them."""
    return f'{{"tool": {json.dumps(name)}, "arguments": '


def told_messages(
    messages: Sequence[Message], form: Form, *, style: Literal["plain", "template"]
) -> tuple[Message, ...]:
    """The conversation as the experts get it: told of the form, and with calls and results in words.

    `style` "template" leaves calls and results in past messages to each expert's own chat template.
    """
    told = tuple(messages) if style == "template" else _in_words(messages)
    parts = [_describe_tools(form)] if form.tools else []
    if form.schema is not None and form.tells_schema:
        how = "Else answer" if form.tools else "Answer"
        parts.append(f"{how} only with JSON of this schema: {_compact(form.schema)}")
    if not parts:
        return told
    text = "\n".join(parts)
    if told and told[0].role == "system":
        return (replace(told[0], content=f"{told[0].content}\n\n{text}"), *told[1:])
    return (Message("system", text), *told)


def _describe_tools(form: Form) -> str:
    lines = ["These tools can be called:"]
    for tool in form.tools:
        lines.append(f"- {tool.name}: {tool.description} Arguments: {_compact(tool.parameters)}".replace(":  ", ": "))
    how = f"{call_prefix('NAME')}{{...}}}}"
    lines.append(f"Answer only with a call: {how}" if form.is_call_required else f"To call one, answer only with {how}")
    if form.takes_several_calls:
        lines.append("To make several calls, write each on a line of its own.")
    return "\n".join(lines)


def _in_words(messages: Sequence[Message]) -> tuple[Message, ...]:
    calls = [json.loads(call) for message in messages for call in message.tool_calls]
    names = {call.get("id"): call["function"]["name"] for call in calls}
    found: list[Message] = []
    results: list[str] = []
    for message in messages:
        if message.role == "tool":
            results.append(f"{names.get(message.tool_call_id, 'The tool')} returned: {message.content}")
        elif results and message.role == "user":
            # In one message: many templates want user and assistant to take turns.
            found.append(replace(message, content="\n".join([*results, message.content])))
            results = []
        else:
            found += [Message("user", "\n".join(results))] if results else []
            found.append(_with_calls_in_words(message))
            results = []
    return (*found, Message("user", "\n".join(results))) if results else tuple(found)


def _with_calls_in_words(message: Message) -> Message:
    functions = [json.loads(call)["function"] for call in message.tool_calls]
    calls = [f"{call_prefix(function['name'])}{function['arguments']}}}" for function in functions]
    return replace(message, content="\n".join(filter(None, [message.content, *calls])), tool_calls=())


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class CallPart:
    """What one call of an answer grew by."""

    index: int
    """Which call of the answer, from 0."""
    call_id: str
    name: str | None
    """The tool, in the one part in which it becomes known."""
    arguments: str


class CallReader:
    """Reads calls as they are written: of each the name once it is whole, and the text of the arguments."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._line = ""
        """The call that is being written,"""
        self._index = 0
        self._start: int | None = None
        """where its arguments begin,"""
        self._told = 0
        """and how many of their characters were told."""

    def feed(self, text: str) -> list[CallPart]:
        """What the calls grew by: at least one part, the last of the call that goes on."""
        line, *further = text.split("\n")
        parts = [self._grow(line)]
        for line in further:
            self._line, self._index, self._start, self._told = "", self._index + 1, None, 0
            parts.append(self._grow(line))
        return [part for part in parts[:-1] if part.name is not None or part.arguments] + parts[-1:]

    def read(self, text: str) -> tuple[ToolCall, ...]:
        """The calls that the whole `text` is, whether or not it was fed."""
        return tuple(self._read_all(text.split("\n")))

    def _read_all(self, lines: Sequence[str]) -> Iterator[ToolCall]:
        for index, line in enumerate(lines):
            found = _HEAD.match(line)
            assert found is not None
            yield ToolCall(self._id(index), json.loads(line)["tool"], line[found.end() : -1])

    def _grow(self, text: str) -> CallPart:
        self._line += text
        name: str | None = None
        if self._start is None and (found := _HEAD.match(self._line)):
            self._start, name = found.end(), found[1]
        arguments = "" if self._start is None else self._line[self._start :]
        # The last brace is the call's own: it is held back until more follows.
        end = max(len(arguments) - 1, self._told)
        told, self._told = arguments[self._told : end], end
        return CallPart(self._index, self._id(self._index), name, told)

    def _id(self, index: int) -> str:
        while len(self._ids) <= index:
            self._ids.append(f"call_{secrets.token_hex(12)}")
        return self._ids[index]
