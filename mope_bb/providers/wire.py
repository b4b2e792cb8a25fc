"""What endpoints write, before anything is made of it, and the two shapes of logprobs that most of them share.

The order of the wire is kept, so that `probe` can see what `build_distribution` would repair. Dimension letters: K
entries of one position's list.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.errors import AlignmentError, LogprobsUnavailableError, MalformedResponseError
from mope_bb.failures import shown
from mope_bb.types import END, Piece

TOKEN_ID_KEY: Final = "token_id:"
"""vLLM's `return_tokens_as_token_ids`: tokens are written as "token_id:17"."""
REPLACEMENT: Final = "\ufffd"
END_TOKENS: Final = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "</s>",
    "<|end_of_text|>",
    "<turn|>",
    "<end_of_utterance>",
    "<|return|>",
    "<|call|>",
    "<eos>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
)
"""Tokens that end an answer whatever the model's metadata say, as in llama.cpp's own list."""
MAX_TOKEN_ID: Final = 2**31 - 1
"""Engines count tokens in 32 bits; vocabularies end below a million."""
MAX_PIECE_BYTES: Final = 1024
"""The longest tokens in use, runs of spaces in the vocabularies of GPT-4 and Llama 3, have 128 bytes: what is much
longer is no token."""
Entry = tuple[Piece, float | None]
"""A piece with its natural logprob; None where the wire has no number."""


@dataclass(frozen=True, slots=True)
class Position:
    """One generated token."""

    entries: tuple[Entry, ...]
    """K pieces, in the order of the wire."""
    drawn: Piece | None = None
    """The piece that the endpoint itself drew here."""
    drawn_logprob: float | None = None
    num_unreadable: int = 0
    """Entries that name no token: no id, and no text but "" or a broken character."""
    has_ids: bool = False
    """The wire names tokens by id."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one question."""

    positions: tuple[Position, ...]
    """One for each generated token; those whose list the endpoint leaves out are missing."""
    prompt_tokens: int | None = None
    """How many tokens the endpoint read, where it tells."""
    has_ended: bool = False
    """The endpoint drew the end of the answer."""
    text: str | None = None
    """All that was drawn as text, where the endpoint tells."""
    unlisted: Piece | None = None
    """What was drawn after `positions`, where the endpoint tells and left out the list."""
    token_ids: tuple[int, ...] | None = None
    """All that was drawn as ids, where no lists were asked for and the endpoint tells."""


class PieceReader:
    """From what the wire says of a token to the piece that it adds."""

    def __init__(
        self,
        tokenizer: ChatTokenizer | None,
        *,
        end_ids: Collection[int] = (),
        end_texts: Collection[str] = END_TOKENS,
        are_pieces: bool = False,
    ) -> None:
        """Without a `tokenizer` tokens are told apart by id where there is one, else by their bytes.

        `are_pieces`: see `ChatDialect.writes_pieces`; no text is then an end, whatever it looks like.
        """
        self._tokenizer = tokenizer
        self._are_pieces = are_pieces
        self._end_ids = frozenset(end_ids)
        self._end_texts = frozenset(() if are_pieces else end_texts)
        self.known: dict[int, tuple[Piece, object]] = {}
        """Pieces that were read from lists, by id, with the bytes on the wire: lists name the same few hundred again
        and again, and another model behind the same address names them otherwise."""

    def read(self, text: str | None, *, data: bytes | None = None, token_id: int | None = None) -> Piece | None:
        """The piece; None where the wire does not tell which one it is. Raises ValueError for what is no token."""
        if self._are_pieces and data is not None:
            return self._read_piece(data, token_id)
        if token_id is None and text is not None and text.startswith(TOKEN_ID_KEY):
            token_id = _parse_id(text.removeprefix(TOKEN_ID_KEY))
            data = None  # vLLM spells "token_id:17" there as well
        if token_id is not None:
            return self._read_id(token_id, text, data)
        return self.read_text(text, data=data)

    def read_text(self, text: str | None, *, data: bytes | None = None) -> Piece | None:
        """The same where `text` is what the model wrote, whatever it looks like."""
        _check_length(text, data)
        if self._tokenizer is None and text in self._end_texts:
            return END
        if self._tokenizer is not None and text is not None:
            control = self._tokenizer.control_piece(text)
            if control is not None:
                return control
        if data is None or (text is not None and data == text.encode("utf-8", "surrogatepass")):
            if not text or REPLACEMENT in text:
                return None
            data = text.encode("utf-8", "surrogatepass")
        if not data:
            return None
        return Piece(data) if self._tokenizer is None else self._tokenizer.piece_of_bytes(data)

    def _read_id(self, token_id: int, text: str | None, data: bytes | None) -> Piece:
        checked_id(token_id)
        if self._tokenizer is not None:
            return self._tokenizer.piece(token_id)
        if token_id in self._end_ids or text in self._end_texts:
            return END
        _check_length(text, data)
        return Piece(data if data is not None else (text or "").encode(), token_id)

    def _read_piece(self, data: bytes, token_id: int | None) -> Piece | None:
        if not data and token_id in (None, END.token_id):
            return END
        _check_length(None, data)
        if token_id is not None:
            checked_id(token_id)
        if self._tokenizer is None:
            # By bytes, as all that is spelt here: ids would tell the same token apart from its spelling.
            return Piece(data) if data else None
        piece = self._tokenizer.piece_of_bytes(data) if token_id is None else self._tokenizer.piece(token_id)
        if piece is not None and piece.data != data:
            raise AlignmentError(
                f"token {token_id} is {shown(data)} at the endpoint and {shown(piece.data)} in its `tokenizer`",
                hint="Set `tokenizer` to that of the endpoint's experts, or leave it out.",
            )
        return piece


def checked_id(value: object) -> int:
    """A token id. Raises ValueError for anything else."""
    if type(value) is not int or not 0 <= value <= MAX_TOKEN_ID:
        raise ValueError(f"id {shown(value)}")
    return value


def _parse_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"id {shown(text)}")
    return int(text)


def _check_length(text: str | None, data: bytes | None) -> None:
    longest = max(len(text or ""), len(data or b""))
    if longest > MAX_PIECE_BYTES:
        raise ValueError(f"a token of {longest} bytes, expected at most {MAX_PIECE_BYTES}")


def parse_openai_logprobs(logprobs: Any, reader: PieceReader, *, expert: str) -> tuple[Position, ...]:
    """The positions in the `logprobs` of a choice, in either shape.

    Legacy completions: parallel lists `tokens`, `token_logprobs`, and `top_logprobs` of dictionaries. Chat, and
    newer completions: `content`, a list of tokens with `top_logprobs`, a list. Raises LogprobsUnavailableError for
    null, MalformedResponseError for anything else.
    """
    if logprobs is None:
        raise LogprobsUnavailableError("the endpoint answered with `logprobs: null`", expert=expert)
    try:
        if logprobs.get("content") is not None:
            return tuple(_parse_content(token, reader) for token in logprobs["content"])
        if logprobs.get("top_logprobs") is None:
            raise LogprobsUnavailableError("the endpoint gives the logprob of the drawn token only", expert=expert)
        tokens, drawn, tops = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
        if not len(tokens) == len(drawn) == len(tops):
            raise ValueError(f"{len(tokens)} tokens, {len(drawn)} logprobs and {len(tops)} lists")
        ids = logprobs.get("token_ids") or [None] * len(tokens)
        return tuple(
            build_position(
                [(reader.read(key), checked_logprob(number)) for key, number in _dictionary(top).items()],
                (reader.read(token, token_id=token_id), checked_logprob(value)),
                has_ids=all(_is_id(key) for key in _dictionary(top)),
            )
            for token, token_id, value, top in zip(tokens, ids, drawn, tops, strict=True)
        )
    except AlignmentError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise MalformedResponseError(f"`logprobs` is not in OpenAI's shape: {shown(error)}", expert=expert) from None


def _parse_content(token: Mapping[str, Any], reader: PieceReader) -> Position:
    entries = token["top_logprobs"]
    refuse_repeated([_identity_of(one) for one in entries])
    return build_position(
        [read_entry(entry, reader) for entry in entries],
        read_entry(token, reader),
        has_ids=all("id" in one or "token_id" in one or _is_id(one.get("token")) for one in entries),
    )


def _identity_of(entry: Mapping[str, Any]) -> Hashable:
    """Which token this is; without an id, two tokens may be of the same bytes, but hardly of the same logprob."""
    token_id = entry.get("id", entry.get("token_id"))
    data = entry.get("bytes")
    return (entry.get("token"), str(data), entry["logprob"]) if token_id is None else token_id


def refuse_repeated(tokens: Sequence[Hashable]) -> None:
    """Raise ValueError where a list names a token twice: its probability would count twice."""
    if len(set(tokens)) < len(tokens):
        raise ValueError("a token stands twice in a list")


def _dictionary(top: Any) -> Mapping[str, Any]:
    if top is None:  # nothing but the drawn token is known
        return {}
    if not isinstance(top, dict):
        raise TypeError(f"a list is {type(top).__name__}, expected a dictionary")
    return top


def _is_id(text: object) -> bool:
    return isinstance(text, str) and text.startswith(TOKEN_ID_KEY)


def read_entry(entry: Mapping[str, Any], reader: PieceReader) -> tuple[Piece | None, float | None]:
    """One token of a list in the chat shape: `token`, `logprob`, and `bytes`, `id` or `token_id` where there are."""
    text, data = entry.get("token"), entry.get("bytes")
    token_id = entry.get("id", entry.get("token_id"))
    if not (text is None or isinstance(text, str)) or not (data is None or isinstance(data, list)):
        raise ValueError(f"token {shown(text)}, bytes {shown(data)}")
    piece = reader.read(text, data=None if data is None else bytes(data), token_id=token_id)
    return piece, checked_logprob(entry["logprob"])


def checked_logprob(value: object) -> float | None:
    """A number or null. Raises ValueError for anything else, such as a number written as text."""
    if value is None or type(value) is float:
        return value
    if type(value) is not int or abs(value) > 2**53:
        raise ValueError(f"logprob {shown(value)}")
    return float(value)


def build_position(
    entries: Sequence[tuple[Piece | None, float | None]], drawn: tuple[Piece | None, float | None], *, has_ids: bool
) -> Position:
    """A position from the entries of a list, None for those that name no token, and the token that was drawn."""
    listed = tuple((piece, value) for piece, value in entries if piece is not None)
    return Position(listed, *drawn, num_unreadable=len(entries) - len(listed), has_ids=has_ids)


def parse_usage(data: Mapping[str, Any]) -> int | None:
    """`usage.prompt_tokens`, where the endpoint tells."""
    usage = data.get("usage")
    return as_count(usage.get("prompt_tokens")) if isinstance(usage, dict) else None


def as_count(value: object) -> int | None:
    """A number of tokens, where the endpoint tells one."""
    return value if type(value) is int else None


def in_order(choices: Any, num_prompts: int, *, expert: str) -> Sequence[Mapping[str, Any]]:
    """The `choices` of several prompts by their `index`. Raises MalformedResponseError."""
    try:
        found = {choice["index"]: choice for choice in choices}
        if len(found) != len(choices) or any(type(index) is not int for index in found):
            raise KeyError("two choices have one index, or one has none")
        return [found[index] for index in range(num_prompts)]
    except (KeyError, TypeError):
        count = f"{len(choices)} choices" if isinstance(choices, list) else type(choices).__name__
        raise MalformedResponseError(
            f"{num_prompts} prompts were answered by {count}, expected one for each", expert=expert
        ) from None


def is_whole_text(data: bytes) -> bool:
    """Whether these bytes are text of whole characters, and not nothing."""
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False
