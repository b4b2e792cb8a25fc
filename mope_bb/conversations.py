"""Conversations in OpenAI's shape, as users and agents write them, to messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mope_bb.errors import ConfigError
from mope_bb.types import Message

Conversation = str | Sequence[Message | Mapping[str, Any]]
ROLES: Final = ("system", "user", "assistant", "tool")
SAME_ROLES: Final[Mapping[str, str]] = {"developer": "system"}
"""What OpenAI's newer models call it."""


def parse_conversation(conversation: Conversation) -> tuple[Message, ...]:
    """A question, or messages, as messages. Raises ConfigError for an empty or malformed one."""
    if isinstance(conversation, str):
        conversation = [Message("user", conversation)]
    if isinstance(conversation, Mapping) or not isinstance(conversation, Sequence):
        raise ConfigError(
            f"a conversation is text or a list of messages, got {type(conversation).__name__}",
            hint='Pass "How ...?", or [{"role": "user", "content": "How ...?"}].',
        )
    messages = tuple(_parse_message(message) for message in conversation)
    if not messages:
        raise ConfigError("the conversation is empty", hint="Ask something.")
    last = messages[-1]
    if last.role == "user" and not last.content.strip():
        raise ConfigError("the prompt is empty", hint="Ask something.")
    return messages


def _parse_message(message: object) -> Message:
    if isinstance(message, Message):
        parsed = message
    elif not isinstance(message, Mapping):
        raise ConfigError(f"a message is {type(message).__name__}, expected a dictionary with role and content")
    else:
        call = message.get("tool_call_id")
        role = _text(message, "role")
        parsed = Message(
            SAME_ROLES.get(role, role),
            _parse_content(message),
            _parse_calls(message.get("tool_calls")),
            None if call is None else _text(message, "tool_call_id"),
        )
    if parsed.role not in ROLES:
        raise ConfigError(f"a message has the role {parsed.role!r}", hint=f"Known: {', '.join(ROLES)}.")
    try:
        f"{parsed.content}{parsed.tool_call_id}{''.join(parsed.tool_calls)}".encode()
    except UnicodeEncodeError:
        raise ConfigError("a message holds half of a surrogate pair, which is no text") from None
    return parsed


def _parse_content(message: Mapping[Any, Any]) -> str:
    content = message.get("content")
    if not content:
        return ""
    if not isinstance(content, list | tuple):
        return _text(message, "content")
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError("a message has a part that is no text, expected text", hint="Experts read text only.")
    return "".join(text for text in texts if isinstance(text, str))


def _parse_calls(calls: object) -> tuple[str, ...]:
    """Each call as JSON text."""
    if calls is None:
        return ()
    if not isinstance(calls, list | tuple):
        raise ConfigError(f"the tool_calls of a message are {type(calls).__name__}, expected a list")
    return tuple(_parse_call(call) for call in calls)


def _parse_call(call: object) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(name, str) or not isinstance(arguments, str):
        raise ConfigError('a tool call is not {"id": ..., "function": {"name": ..., "arguments": "JSON"}}')
    call_id = call.get("id")
    if not (call_id is None or isinstance(call_id, str)):
        raise ConfigError(f"the id of a tool call is {type(call_id).__name__}, expected text")
    shown = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return json.dumps(shown, ensure_ascii=False)


def _text(message: Mapping[Any, Any], name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"the {name} of a message is {type(value).__name__}, expected text")
    return value
