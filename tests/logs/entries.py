"""Entries to record."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mope_bb.logs import LogEntry, TracedToken, open_log
from mope_bb.types import ToolCall

ROOT: Final = Path(__file__).parents[2]
TOKENS: Final = (
    TracedToken(b"\xff\x00", 3, -0.25, {"base": 0.0, "a": 1.0}, {"a": 1.0}, 0.125, is_forced=False, drawn_by=None),
    TracedToken(b"{", None, 0.0, {}, {}, None, is_forced=True, drawn_by=None),
    TracedToken(b"", -1, None, {"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}, None, is_forced=False, drawn_by="b"),
)
FULL: Final = LogEntry(
    conversation="c1",
    started_at="2026-11-25T12:00:00.000Z",
    ended_at="2026-11-25T12:00:01.500Z",
    source="serve",
    version="0.1.0",
    model="m",
    pcm="pcm",
    messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "Grüße?"}],
    preference="concise=1",
    lambdas={"a": 0.25, "b": 0.75},
    merge="linear",
    options={"temperature": 0.5, "stop": ["x"], "top_p": 1.0},
    seed=2**70,
    answer="Hi\0 there",
    tool_calls=(ToolCall("call_1", "look", '{"x": 1}'),),
    finish_reason="tool_calls",
    error_class=None,
    error_message=None,
    num_prompt_tokens=7,
    num_completion_tokens=3,
    effort={"num_round_trips": 3},
    dropped=["z"],
    cost=0.5,
    trace=TOKENS,
)


def asking(question: str, answer: str = "So.", **changes: Any) -> LogEntry:
    """An answer to `question`."""
    return replace(FULL, messages=[{"role": "user", "content": question}], answer=answer, tool_calls=(), **changes)


if __name__ == "__main__":
    path, name, count = sys.argv[1:]
    log = open_log(Path(path))
    for number in range(int(count)):
        print(log.record(asking(f"{name} {number}")), flush=True)
