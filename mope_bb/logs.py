"""Chats and their traces, kept: what was asked, by which preference, what was answered, and who carried which token.

    log = open_log()
    log.record(build_entry(stream, source="chat", conversation=new_conversation(), ...))

No bad day of the log costs an answer: what cannot be written is told once and not kept, and it is tried again after
`REST_S` seconds. No API key that this process knows is written.

A trace is compressed JSON, one list for each thing that is known of a token: 20 to 40 bytes a token
of one to three experts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import sqlite3
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mope_bb.config import resolve_home
from mope_bb.errors import ConfigError
from mope_bb.keys import redacted
from mope_bb.logs_file import COLUMNS, LogFile, explain
from mope_bb.types import ToolCall

if TYPE_CHECKING:
    from mope_bb.pcm.mixture import MergeRule
    from mope_bb.preferences import PreferenceLike
    from mope_bb.streams import AnswerStream
    from mope_bb.types import TokenStep

FILE_NAME: Final = "logs.db"
REST_S: Final = 60.0
"""How long nothing is tried after a failure, so that a log that cannot be written costs no time either."""
STOPPED: Final = "stopped"
"""The finish reason of an answer that a person, or the program that asked, ended."""
MAX_TRACE_BYTES: Final = 2**26
_STOPS: Final = (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit, BrokenPipeError)
_JSON_COLUMNS: Final = {
    "messages": list,
    "lambdas": dict,
    "options": dict,
    "tool_calls": list,
    "effort": dict,
    "dropped": list,
}
_NUMBERS: Final = ("num_prompt_tokens", "num_completion_tokens", "cost")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TracedToken:
    """What is kept of one token."""

    data: bytes
    token_id: int | None
    logprob: float | None
    """As `TokenStep.logprob`, None where that is not a number; like all numbers here rounded to six digits."""
    weights: Mapping[str, float]
    """Of each expert asked."""
    carriers: Mapping[str, float]
    """How much each styled expert carried the token, see `pcm.readout.carried_by`."""
    missed_mass: float | None
    is_forced: bool
    drawn_by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One answer, finished or not."""

    conversation: str
    """The same for all turns of one conversation."""
    started_at: str
    """UTC, as `utc_text` writes it."""
    ended_at: str
    source: str
    """Who asked: "chat" or "serve"."""
    version: str
    """Of mope-bb."""
    model: str
    """The configuration, or the name under which the server was asked."""
    pcm: str | None
    """The folder of the PCM."""
    messages: Sequence[Mapping[str, Any]]
    """What was asked, the earlier turns included."""
    preference: str | None
    """As written; weights as JSON."""
    lambdas: Mapping[str, float]
    """The weight of each styled expert that was asked for, summing to 1."""
    merge: str
    options: Mapping[str, Any]
    """Sampling options as they were asked for."""
    seed: int | None
    """See `Answer.seed`."""
    answer: str
    tool_calls: Sequence[ToolCall]
    finish_reason: str | None
    """As `Answer.finish_reason`, or `STOPPED`; None where an error ended the answer."""
    error_class: str | None
    error_message: str | None
    num_prompt_tokens: int
    num_completion_tokens: int
    effort: Mapping[str, int]
    """See `types.Effort`."""
    dropped: Sequence[str]
    cost: float | None
    """By the configured prices, where there are any and they could be told apart from those of other answers."""
    trace: Sequence[TracedToken] | None
    """None where none is kept."""


class ChatLog:
    """Where answers are kept. Any thread may use it; nothing is opened before the first answer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: LogFile | None = None
        self._rests_until = -math.inf
        self._told: set[str] = set()

    def record(self, entry: LogEntry) -> int | None:
        """Keep `entry`; when this returns it is committed. Its id; None, and a warning once, where it cannot be kept.

        It may wait for the disk and for other processes, so on an event loop: `await asyncio.to_thread(log.record, e)`.
        """
        with self._lock:
            if time.monotonic() < self._rests_until:
                return None
            try:
                if self._file is None:
                    self._file = LogFile(self.path, creates=True)
                return self._file.add(*_sealed(entry))
            except (OSError, sqlite3.Error, ConfigError) as error:
                self._give_up(error if isinstance(error, ConfigError) else explain(self.path, error))
                return None

    def _give_up(self, error: ConfigError) -> None:
        self._disconnect()
        self._rests_until = time.monotonic() + REST_S
        if str(error) not in self._told:
            self._told.add(str(error))
            _log.warning("answers are not logged: %s", error.in_words)

    def _disconnect(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file; a later `record` opens it again."""
        with self._lock:
            self._disconnect()


def log_path(configured: str | None) -> Path:
    """The file that `[logs] path` names, by default the user's own."""
    return resolve_home() / FILE_NAME if configured is None else Path(configured).expanduser()


def open_log(path: Path | None = None) -> ChatLog:
    """The log in the file `path`, by default the user's own."""
    return ChatLog(path or log_path(None))


def new_conversation() -> str:
    """An id that groups the turns of one conversation."""
    return secrets.token_hex(6)


def utc_text(moment: datetime) -> str:
    """A time as it stands in the log: UTC to the millisecond, so that texts sort as times do."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def build_entry(
    stream: AnswerStream,
    *,
    source: str,
    conversation: str,
    started_at: datetime,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    preference: PreferenceLike,
    options: Mapping[str, Any],
    pcm: str | None = None,
    error: BaseException | None = None,
    cost: float | None = None,
    traces: bool = True,
) -> LogEntry:
    """What to keep of an answer that has ended: by itself, or by `error`, where it was cancelled or failed.

    `options` are JSON values. The trace takes time, about a millisecond for five tokens: not for an event loop.
    """
    answer, plan = stream.answer, stream.plan
    is_stopped = isinstance(error, _STOPS)
    has_failed = error is not None and not is_stopped
    reason = None if has_failed else STOPPED if is_stopped else answer.finish_reason
    # Half of a tool call is no text; what there is of it is worth keeping all the same.
    text = answer.text if answer.tool_calls or error is None else stream.text
    return LogEntry(
        conversation=conversation,
        started_at=utc_text(started_at),
        ended_at=utc_text(datetime.now(UTC)),
        source=source,
        version=_own_version(),
        model=model,
        pcm=pcm,
        messages=messages,
        preference=_as_written(preference),
        lambdas=dict(zip(plan.experts, plan.lambdas, strict=True)),
        merge=answer.merge,
        options=options,
        seed=answer.seed,
        answer=text,
        tool_calls=answer.tool_calls,
        finish_reason=reason,
        error_class=type(error).__name__ if has_failed else None,
        error_message=str(error) if has_failed else None,
        num_prompt_tokens=answer.num_prompt_tokens,
        num_completion_tokens=answer.num_completion_tokens,
        effort=asdict(answer.effort),
        dropped=answer.dropped,
        cost=cost,
        trace=tuple(_traced(step, plan.rule) for step in answer.steps) if traces else None,
    )


@cache
def _own_version() -> str:
    return version("mope-bb")


def _as_written(preference: PreferenceLike) -> str | None:
    if preference is None or isinstance(preference, str):
        return preference
    if isinstance(preference, Mapping):
        return json.dumps(dict(preference), ensure_ascii=False)
    return preference.text or json.dumps(dict(preference.weights), ensure_ascii=False)


def _traced(step: TokenStep, rule: MergeRule) -> TracedToken:
    from mope_bb.pcm.readout import carried_by

    return TracedToken(
        step.piece.data,
        step.piece.token_id,
        _rounded(step.logprob),
        {name: _rounded(weight) or 0.0 for name, weight in zip(step.experts, step.weights, strict=True)},
        {name: _rounded(share) or 0.0 for name, share in carried_by(step, rule).items()},
        _rounded(step.missed_mass),
        step.is_forced,
        step.drawn_by,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user said last, as text: what lists show and searches find."""
    said = [message.get("content") for message in messages if message.get("role") == "user"]
    return text_of(said[-1]) if said else ""


def text_of(content: Any) -> str:
    """The text of a message's content, which may come in parts; empty where it has none."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _sealed(entry: LogEntry) -> tuple[list[Any], bytes | None]:
    """The values of `COLUMNS`, and the trace; keys, and halves of surrogate pairs, are taken out."""
    values = {name: getattr(entry, name) for name in COLUMNS if name != "question"}
    values |= {
        "question": question_of(entry.messages),
        "seed": None if entry.seed is None else str(entry.seed),
        "tool_calls": [asdict(call) for call in entry.tool_calls],
    }
    values |= {name: json.dumps(values[name], ensure_ascii=False) for name in _JSON_COLUMNS}
    kept = {name: _storable(value) if isinstance(value, str) else value for name, value in values.items()}
    # The trace would spell the key that the text no longer holds.
    is_kept = entry.trace is not None and redacted(entry.answer) == entry.answer
    return [kept[name] for name in COLUMNS], seal_trace(entry.trace) if is_kept and entry.trace is not None else None


def _storable(text: str) -> str:
    return redacted(text).encode(errors="replace").decode()


def opened_entry(columns: Mapping[str, Any], trace: bytes | None) -> LogEntry:
    """The entry of which `LogFile.get` gave this. Raises ValueError for what no `record` has written."""
    values = {name: value for name, value in columns.items() if name != "question"}
    try:
        for name, value in values.items():
            # SQLite keeps what it is given, whatever the column says.
            if not isinstance(value, (int | float if name in _NUMBERS else str) | None):
                raise ValueError(f"{name} is {type(value).__name__}")
        for name, kind in _JSON_COLUMNS.items():
            values[name] = json.loads(values[name])
            if not isinstance(values[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        if not all(isinstance(message, dict) for message in values["messages"]):
            raise ValueError("messages holds something else")
        values["lambdas"] = {name: float(value) for name, value in values["lambdas"].items()}
        values["seed"] = None if values["seed"] is None else int(values["seed"])
        values["tool_calls"] = tuple(ToolCall(**call) for call in values["tool_calls"])
        return LogEntry(**values, trace=None if trace is None else open_trace(trace))
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError, zlib.error) as error:
        raise ValueError(f"it is damaged: {error}") from None


_FIELDS: Final = ("token_id", "logprob", "missed_mass", "is_forced", "drawn_by")


def seal_trace(trace: Sequence[TracedToken]) -> bytes:
    """Compressed JSON: lists over the tokens; bytes as latin-1, which maps every byte to one character and back."""
    weighted = list(dict.fromkeys(name for token in trace for name in token.weights))
    carrying = list(dict.fromkeys(name for token in trace for name in token.carriers))
    document = {
        "data": [token.data.decode("latin-1") for token in trace],
        **{name: [getattr(token, name) for token in trace] for name in _FIELDS},
        "weights": {name: [token.weights.get(name) for token in trace] for name in weighted},
        "carriers": {name: [token.carriers.get(name) for token in trace] for name in carrying},
    }
    return zlib.compress(json.dumps(document, separators=(",", ":")).encode())


def open_trace(data: bytes) -> tuple[TracedToken, ...]:
    """The inverse of `seal_trace`. Of others it raises what `opened_entry` catches."""
    # A small blob of a stranger may hold gigabytes of zeros.
    opener = zlib.decompressobj()
    text = opener.decompress(data, MAX_TRACE_BYTES)
    if not opener.eof:
        raise ValueError("its trace is cut off or too long")
    document = json.loads(text)
    return tuple(
        TracedToken(
            piece.encode("latin-1"),
            token_id,
            logprob,
            _at(document["weights"], place),
            _at(document["carriers"], place),
            missed_mass,
            bool(is_forced),
            drawn_by,
        )
        for place, (piece, token_id, logprob, missed_mass, is_forced, drawn_by) in enumerate(
            zip(document["data"], *(document[name] for name in _FIELDS), strict=True)
        )
    )


def _at(lists: Mapping[str, Sequence[float | None]], place: int) -> dict[str, float]:
    return {name: float(value) for name, values in lists.items() if (value := values[place]) is not None}
