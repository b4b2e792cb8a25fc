"""An answer as typed events, for agents: text and tool calls apart. See `AnswerStream.events`."""

from __future__ import annotations

from dataclasses import dataclass

from mope_bb.types import Answer, Token


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The answer's text grew; by nothing where a character or a stop string may still be incomplete."""

    text: str
    token: Token


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A tool call grew."""

    index: int
    """Which call of the answer, from 0."""
    call_id: str
    name: str | None
    """The tool, in the one event in which it becomes known."""
    arguments: str
    """What the JSON text of the arguments grew by."""
    token: Token


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is over."""

    answer: Answer


Event = TextDelta | ToolCallDelta | Finished
"""One TextDelta or ToolCallDelta for each token, or two where it ends a call and begins another; then one Finished."""
