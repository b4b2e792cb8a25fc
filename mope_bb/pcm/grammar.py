"""Forms by grammar: JSON schemas and tool calls, enforced by llguidance (https://github.com/guidance-ai/llguidance).

llguidance reads bytes here, not tokens: one matcher then serves every tokenizer, and a byte takes it microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mope_bb.errors import ConfigError
from mope_bb.pcm.closed_objects import close_objects
from mope_bb.pcm.constraint import Constraint
from mope_bb.tools import Form, call_prefix
from mope_bb.types import Piece

JSON_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes. Freedom in whitespace would be freedom to write nothing else."""
MAX_CALLS: Final = 32
"""So many calls at most stand in one answer."""
MAX_CLOSING: Final = 2048
"""Bytes that the end of an answer may need;"""
MAX_PLAIN: Final = 512
"""bytes for which it is sought by letters alone."""
_QUOTE: Final = ord('"')
_PLAIN: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ1234567890 "
_OTHERS: Final = bytes(byte for byte in range(256) if byte not in _PLAIN)
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
        self._is_in_string = self._is_escaped = self._is_closing_known = False
        self._closing: bytes | None = None

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
        return super().allowed_among([one for one in vocabulary if one.data[:1] in first])

    def closing(self) -> bytes | None:
        if not self._is_closing_known:
            self._closing, self._is_closing_known = self._find_closing(), True
        return self._closing

    def _find_closing(self) -> bytes | None:
        # Most strings may end after any few letters; where that leads nowhere, as before the @ of an address, look.
        found = self._walk(lambda mask: next((byte for byte in _PLAIN if mask[byte]), None), MAX_PLAIN)
        seen: set[bytes] = set()
        return found if found is not None else self._walk(lambda mask: self._newest(mask, seen), MAX_CLOSING)

    def _walk(self, in_string: Callable[[bytes], int | None], longest: int) -> bytes | None:
        """The way to the end of the form; `in_string` chooses in a string that may not end yet, by the mask."""
        state = self._is_in_string, self._is_escaped
        found = bytearray()
        while not self.is_complete and len(found) < longest:
            step = self._matcher.compute_ff_bytes() or self._soonest(in_string)
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
        self._is_closing_known = False
        self._length += len(data)
        self._scan(data)

    def restart(self, data: bytes) -> None:
        self._matcher.reset()
        self._length, self._is_in_string, self._is_escaped = 0, False, False
        self.advance(data)

    def _soonest(self, in_string: Callable[[bytes], int | None]) -> bytes:
        mask = self._matcher.compute_logit_bias()
        if self._is_in_string and not (mask[_QUOTE] and not self._is_escaped):
            byte = in_string(mask)
        else:
            byte = next((byte for byte in (b'"' if self._is_in_string else _OUTSIDE) if mask[byte]), None)
        return b"" if byte is None else bytes([byte])

    def _newest(self, mask: bytes, seen: set[bytes]) -> int | None:
        """The byte after which something else may follow than at any time before: a pattern's states differ in that.

        `seen` are the masks on the way so far.
        """
        choices: list[int] = [byte for byte in (*_PLAIN, *_OTHERS) if mask[byte]]
        for byte in choices:
            self._matcher.consume_token(byte)
            after = self._matcher.compute_logit_bias()
            self._matcher.rollback(1)
            if after not in seen:
                seen.add(after)
                return byte
        return choices[0] if choices else None

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
        call = call_constraint(form)
        return call if form.is_call_required or form.schema is not None else MaybeCall(call)
    return None if form.schema is None else json_constraint(form.schema)


def json_constraint(schema: Mapping[str, Any] | bool) -> Constraint:
    """Only JSON that fits `schema`. Raises ConfigError where the schema is wrong, or has what cannot be enforced."""
    what = "the JSON schema of `response_format`"
    return Grammar(_llguidance().LLMatcher.grammar_from_json_schema(_styled(schema)), what=what)


def call_constraint(form: Form) -> Constraint:
    """Only calls of its tools, with arguments that fit their schemas; or JSON, where it has a schema as well.

    Raises ConfigError.
    """
    names = range(len(form.tools))
    rules = [f"call: {' | '.join(f'call{n}' for n in names)}"]
    for n, tool in enumerate(form.tools):
        rules.append(f'call{n}: {json.dumps(call_prefix(tool.name))} %json {json.dumps(_styled(tool.parameters))} "}}"')
    calls = f'call ("\\n" call){{0,{MAX_CALLS - 1}}}' if form.takes_several_calls else "call"
    what = f"the parameters of a tool ({', '.join(tool.name for tool in form.tools)})"
    if form.schema is None:
        rules.append(f"start: {calls}")
    else:
        rules += [f"start: {calls} | answer", f"answer: %json {json.dumps(_styled(form.schema))}"]
        what += " or the JSON schema"
    return Grammar(_llguidance().LLMatcher.grammar_from_lark("\n".join(rules)), what=what)


def _styled(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    # `false` allows nothing; llguidance says so of an empty list of types.
    found = {} if schema is True else {"anyOf": []} if schema is False else close_objects(schema)
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
