"""A Hugging Face tokenizer as experts need it: chats to ids, ids to the bytes they add, and a fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

from mope_bb.errors import AlignmentError, ConfigError, RequestError
from mope_bb.failures import shown
from mope_bb.types import END, Message, Piece

FINGERPRINT_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog. 0123456789 10,000.5 + 3 = (x) [y] {z};\n\n\tdef f(a): return a**2\n",
    "Ünïcödé: à é î ñ ø ß ž Ж λ ק 你好 こんにちは 안녕 🙂🚲👍🏽 naïve café – “quotes” …",
    "internationalization antidisestablishmentarianism supercalifragilistic  two  spaces   three",
)
"""Texts whose ids tell tokenizers apart: an engine that only tokenizes can be compared with a local tokenizer."""


class ChatTokenizer:
    """Renders conversations with the model's own chat template, and knows the bytes of every token."""

    def __init__(self, tokenizer: Any, *, source: str, extra_end_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._source = source
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"the tokenizer {source!r} has no chat template",
                hint="Use an instruction-tuned model, or save a chat_template with the tokenizer.",
            )
        ends = {tokenizer.eos_token_id, *extra_end_ids} - {None}
        self.end_ids: frozenset[int] = frozenset(ends)

    def encode_chat(self, messages: Sequence[Message], *, expert: str | None = None) -> tuple[int, ...]:
        """The ids of the rendered template, ready for the answer. Raises RequestError, as `render_chat` does."""
        rendered = self.render_chat(messages, expert=expert)
        return tuple(self._tokenizer.encode(rendered, add_special_tokens=False, verbose=False))

    def render_chat(self, messages: Sequence[Message], *, expert: str | None = None) -> str:
        """The rendered template as text, ready for the answer.

        Raises RequestError for a control token, and for a conversation that the template refuses.
        """
        refuse_control_token(self.control_token_in_chat(messages), expert=expert)
        return self._render(messages)

    def control_token_in_chat(self, messages: Sequence[Message], *, is_answered: bool = False) -> str | None:
        """A control token that a message spells out, or that only comes about where the template joins several.

        `is_answered`: the last message is the answer, and none is to follow. Raises RequestError for a conversation
        that cannot be sent, or that the template refuses.
        """
        for message in messages:
            for text in texts_of(message):
                if not _is_unicode(text):
                    raise RequestError("a message holds half of a surrogate pair, which is no text and cannot be sent")
                if (found := self.control_token_in(text)) is not None:
                    return found
        harmless = [replace(message, content="a" if message.content.strip() else "") for message in messages]
        rendered, expected = (
            self._controls_in(self._render(one, is_answered=is_answered)) for one in (messages, harmless)
        )
        return next(iter((rendered - expected) + (expected - rendered)), None)

    def _render(self, messages: Sequence[Message], *, is_answered: bool = False) -> str:
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                [as_openai(message) for message in messages], tokenize=False, add_generation_prompt=not is_answered
            )
        except Exception as error:  # noqa: BLE001  # templates raise what they like, such as "no system role"
            raise RequestError(
                f"the chat template of {self._source!r} refuses this conversation: {_first_line(error)}"
            ) from None
        return rendered

    def _controls_in(self, text: str) -> Counter[str]:
        """How often each control token comes about when `text` is read."""
        names = self._names_of_controls
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return Counter(names[token_id] for token_id in ids if token_id in names)

    @property
    def bos_text(self) -> str:
        """What many servers put before a text of their own accord; "" where the model has none."""
        return str(self._tokenizer.bos_token or "")

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The ids of plain `text`; what looks like a control token in it is text."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))

    @cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text of its own accord: mostly BOS or nothing."""
        return tuple(self._tokenizer.encode("", add_special_tokens=True, verbose=False))

    def spell(self, data: bytes) -> tuple[Piece, ...]:
        """Pieces whose bytes are `data`, as this tokenizer writes it. Raises AlignmentError where it cannot.

        Some tokenizers put a space before a text, or change characters: then the longest pieces that fit are taken.
        """
        if _is_utf8(data):
            pieces = tuple(map(self.piece, self.encode_text(data.decode())))
            if END not in pieces and b"".join(piece.data for piece in pieces) == data:
                return pieces
        found: list[Piece] = []
        rest = data
        while rest:
            lengths = range(min(len(rest), self._longest), 0, -1)
            piece = next(filter(None, (self.piece_of_bytes(rest[:length]) for length in lengths)), None)
            if piece is None:
                raise AlignmentError(f"the tokenizer {self._source!r} has no token for the byte {rest[:1]!r}")
            found.append(piece)
            rest = rest[len(piece.data) :]
        return tuple(found)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._pieces_by_bytes))

    def control_token_in(self, text: str) -> str | None:
        """A control token that `text` spells out, if any; also by what the tokenizer makes of other characters."""
        found = next((token for token in self._control_tokens if token in text), None)
        if found is not None or self._tokenizer.backend_tokenizer.normalizer is None:
            return found
        return next(iter(self._controls_in(text)), None)

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        added = self._tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in added if token.special and token.content)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Token id -> the piece it adds; END for the end tokens."""
        size = len(self._tokenizer)
        tokens = self._tokenizer.convert_ids_to_tokens(list(range(size)))
        added = self._tokenizer.added_tokens_decoder
        decoder = json.dumps(json.loads(self._tokenizer.backend_tokenizer.to_str()).get("decoder"))
        to_bytes = _byte_level_bytes if '"ByteLevel"' in decoder else _sentencepiece_bytes
        pieces = []
        for token_id, token in enumerate(tokens):
            if token_id in self.end_ids:
                pieces.append(END)
            elif token_id in added:
                data = b"" if added[token_id].special else added[token_id].content.encode()
                pieces.append(Piece(data, token_id))
            else:
                pieces.append(Piece(b"" if token is None else to_bytes(token), token_id))
        return tuple(pieces)

    def piece(self, token_id: int) -> Piece:
        """The piece of `token_id`; models may have more output rows than the tokenizer has tokens."""
        return self.pieces[token_id] if token_id < len(self.pieces) else Piece(b"", token_id)

    def control_piece(self, text: str) -> Piece | None:
        """The piece of the control token that is written `text`, if there is one."""
        token_id = self._ids_of_controls.get(text)
        return None if token_id is None else self.piece(token_id)

    def piece_of_bytes(self, data: bytes) -> Piece | None:
        """The piece that adds exactly `data`; None where there is none, or several that look alike."""
        return self._pieces_by_bytes.get(data)

    @cached_property
    def _ids_of_controls(self) -> dict[str, int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return {token.content: token_id for token_id, token in added if token.special}

    @cached_property
    def _names_of_controls(self) -> dict[int, str]:
        # What a vocabulary has no word for is no control token, though its place is taken by one.
        unknown = self._tokenizer.unk_token_id
        return {token_id: name for name, token_id in self._ids_of_controls.items() if token_id != unknown}

    @cached_property
    def _pieces_by_bytes(self) -> dict[bytes, Piece]:
        found: dict[bytes, Piece] = {}
        twice: set[bytes] = set()
        tokens = self._tokenizer.convert_ids_to_tokens(list(range(len(self.pieces))))
        fallbacks = [piece for piece, token in zip(self.pieces, tokens, strict=True) if _is_byte_fallback(token)]
        for piece in self.pieces:
            if piece.data and piece.data in found and piece not in fallbacks:
                twice.add(piece.data)
            elif piece.data and piece not in fallbacks:
                found[piece.data] = piece
        # "A" and "<0x41>" add the same byte; a text is made of the first.
        return {piece.data: piece for piece in fallbacks} | {
            data: piece for data, piece in found.items() if data not in twice
        }

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides what is asked of a model and how the pieces of its lists are told apart."""
        facts = [self.fingerprint, self._tokenizer.chat_template, sorted(self.end_ids), len(self._tokenizer)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        return fingerprint_of([self.encode_text(text) for text in FINGERPRINT_TEXTS])


def load_chat_tokenizer(path: str) -> ChatTokenizer:
    """Load a tokenizer folder or hub name. Raises ConfigError."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  # transformers raises whatever its parsers raise
        raise ConfigError(f"the tokenizer {path!r} cannot be loaded: {_first_line(error)}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"the tokenizer {path!r} has no fast version, which is needed for the bytes of its tokens")
    try:
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        eos = None
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(one) is int for one in ends):
        raise ConfigError(f"the generation_config of {path!r} has eos_token_id = {shown(eos)}, expected token ids")
    return ChatTokenizer(tokenizer, source=path, extra_end_ids=ends)


def fingerprint_of(encodings: Sequence[Sequence[int]]) -> str:
    """A hash of the ids that a tokenizer gives to `FINGERPRINT_TEXTS`."""
    return hashlib.sha256(json.dumps([list(ids) for ids in encodings]).encode()).hexdigest()


def refuse_control_token(token: str | None, *, expert: str | None) -> None:
    """Raise RequestError if a message spells out a control token: it could rewrite the conversation."""
    if token is not None:
        raise RequestError(
            f"a message holds {token!r}, a control token of this expert's model",
            hint="Control tokens in a message could change who says what. Write it with a space inside.",
            expert=expert,
        )


def texts_of(message: Message) -> Iterator[str]:
    """Every text in a message that a template may write out, as the template gets it. Raises RequestError."""
    waiting: list[Any] = [as_openai(message)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def as_openai(message: Message) -> dict[str, Any]:
    """`message` as the dictionary that chat templates and endpoints take. Raises RequestError."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        try:
            found["tool_calls"] = [json.loads(call) for call in message.tool_calls]
        except (ValueError, RecursionError):
            raise RequestError("a tool call of a message is not JSON") from None
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


_BYTE_FALLBACK: Final = re.compile("<0x[0-9A-Fa-f]{2}>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF: Final = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF[char] for char in token) if all(char in _BYTE_OF for char in token) else token.encode()


def _is_byte_fallback(token: str | None) -> bool:
    return token is not None and _BYTE_FALLBACK.fullmatch(token) is not None


def _sentencepiece_bytes(token: str) -> bytes:
    if _is_byte_fallback(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
