"""Forms by grammar: JSON schemas and tool calls, enforced by llguidance (https://github.com/guidance-ai/llguidance).

llguidance reads bytes here, not tokens: one matcher then serves every tokenizer, and a byte takes it microseconds.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mope_bb.errors import ConfigError
from mope_bb.pcm.constraint import Constraint
from mope_bb.tools import Form, Tool, call_prefix
from mope_bb.types import END, Piece

JSON_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes. Freedom in whitespace would be freedom to write nothing else."""
MAX_CLOSING: Final = 2048
"""Bytes that the end of an answer may need."""
_QUOTE: Final = ord('"')
_PLAIN: Final = frozenset((string.ascii_letters + string.digits + " ").encode())
_OUTSIDE: Final = b'}],"0123456789ntf[{-'
"""Outside a string, what ends soonest comes first: what closes, then short values."""


class Grammar(Constraint):
    """A grammar of llguidance."""

    def __init__(self, grammar: str, *, what: str) -> None:
        """`what` names the grammar in errors. Raises ConfigError for one that cannot be enforced."""
        llguidance = _llguidance()
        self._matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
        if message := self._matcher.get_error():
            raise ConfigError(
                f"{what} cannot be enforced: {_first_line(message)}",
                hint="Leave out what is not supported, or loosen it.",
            )
        self._length = 0
        self._is_in_string = self._is_escaped = False

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def is_over(self) -> bool:
        return bool(self._matcher.is_stopped())

    def forced(self) -> bytes:
        return _whole_characters(self._matcher.compute_ff_bytes())

    def allows(self, data: bytes) -> bool:
        return bool(self._matcher.validate_tokens(list(data)) == len(data))

    def allowed_among(self, vocabulary: Sequence[Piece]) -> list[Piece]:
        first = self._next_bytes()
        return super().allowed_among([one for one in vocabulary if one == END or one.data[:1] in first])

    def closing(self) -> bytes | None:
        state = self._is_in_string, self._is_escaped
        found = bytearray()
        # The same choices at every step of an answer, but no rule that could go round in circles.
        random_bytes = random.Random(0)
        while not self.is_complete and len(found) < MAX_CLOSING:
            step = self._matcher.compute_ff_bytes() or self._soonest(random_bytes)
            if not step or not self._matcher.consume_tokens(list(step)):
                break
            self._scan(step)
            found += step
        is_closed = self.is_complete
        self._is_in_string, self._is_escaped = state
        self._matcher.rollback(len(found))
        return bytes(found) if is_closed else None

    def advance(self, data: bytes) -> None:
        if not self._matcher.consume_tokens(list(data)):
            raise ValueError(f"{data!r} is not allowed after {self._length} bytes")
        self._length += len(data)
        self._scan(data)

    def restart(self, data: bytes) -> None:
        self._matcher.reset()
        self._length, self._is_in_string, self._is_escaped = 0, False, False
        self.advance(data)

    def _soonest(self, random_bytes: random.Random) -> bytes:
        allowed = self._next_bytes()
        if self._is_in_string:
            if b'"' in allowed and not self._is_escaped:
                return b'"'
            plain = [one for one in allowed if one[0] in _PLAIN]
            return random_bytes.choice(sorted(plain or allowed)) if allowed else b""
        first = next((bytes([one]) for one in _OUTSIDE if bytes([one]) in allowed), None)
        if first is not None and first.isdigit():
            return random_bytes.choice(sorted(one for one in allowed if one.isdigit()))
        return first or min(allowed, default=b"")

    def _next_bytes(self) -> frozenset[bytes]:
        mask = self._matcher.compute_logit_bias()
        return frozenset(bytes([byte]) for byte in range(256) if mask[byte])

    def _scan(self, data: bytes) -> None:
        """Follow whether the answer is inside a JSON string."""
        for byte in data:
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string and byte == ord("\\"):
                self._is_escaped = True
            elif byte == _QUOTE:
                self._is_in_string = not self._is_in_string


class MaybeCall(Constraint):
    """Any text, or a tool call: an answer that begins as a call does is one."""

    def __init__(self, call: Constraint) -> None:
        self._call = call
        self._is_call: bool | None = None
        """None before the first piece."""

    @property
    def is_complete(self) -> bool:
        return self._call.is_complete if self._is_call else True

    @property
    def is_free(self) -> bool:
        return self._is_call is False

    @property
    def is_over(self) -> bool:
        return bool(self._is_call) and self._call.is_over

    def forced(self) -> bytes:
        return self._call.forced() if self._is_call else b""

    def allows(self, data: bytes) -> bool:
        # What begins with a brace must be a call: half a call is of no use to anyone.
        if self._is_call or (self._is_call is None and data[:1] == b"{"):
            return self._call.allows(data)
        return True

    def closing(self) -> bytes | None:
        return self._call.closing() if self._is_call else b""

    def advance(self, data: bytes) -> None:
        if self._is_call is None and data:
            self._is_call = data[:1] == b"{"
        if self._is_call:
            self._call.advance(data)

    def restart(self, data: bytes) -> None:
        self._is_call = None
        self._call.restart(b"")
        self.advance(data)


def build_constraint(form: Form) -> Constraint | None:
    """What enforces `form`; None where any text will do. Raises ConfigError."""
    if form.tools:
        return call_constraint(form.tools, is_required=form.is_call_required)
    return None if form.schema is None else json_constraint(form.schema)


def json_constraint(schema: Mapping[str, Any] | bool) -> Constraint:
    """Only JSON that fits `schema`. Raises ConfigError where the schema is wrong, or has what cannot be enforced."""
    what = "the JSON schema of `response_format`"
    return Grammar(_llguidance().LLMatcher.grammar_from_json_schema(_styled(schema)), what=what)


def call_constraint(tools: Sequence[Tool], *, is_required: bool) -> Constraint:
    """Only a call of one of `tools`, with arguments that fit its schema; or also any text. Raises ConfigError."""
    rules = [f"start: {' | '.join(f'call{n}' for n in range(len(tools)))}"]
    for n, tool in enumerate(tools):
        rules.append(f'call{n}: {json.dumps(call_prefix(tool.name))} %json {json.dumps(_styled(tool.parameters))} "}}"')
    names = ", ".join(tool.name for tool in tools)
    call = Grammar(
        _llguidance().LLMatcher.grammar_from_lark("\n".join(rules)), what=f"the parameters of a tool ({names})"
    )
    return call if is_required else MaybeCall(call)


def _styled(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    # `false` allows nothing; llguidance says so of an empty list of types.
    found: dict[str, Any] = {} if schema is True else {"anyOf": []} if schema is False else dict(schema)
    return {**found, "x-guidance": JSON_STYLE}


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "tools and `response_format` need the package llguidance", hint='Install "mope-bb[server]".'
        ) from None
    return llguidance


def _whole_characters(data: bytes) -> bytes:
    """`data` without half a character at its end."""
    for end in range(len(data), max(-1, len(data) - 4), -1):
        try:
            data[:end].decode()
        except UnicodeDecodeError:
            continue
        return data[:end]
    return b""


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "it cannot be read"
