"""One token from an endpoint that gives no logprobs: from what the wire says of it to the piece that was drawn.

What cannot be told is an error, never drawn again: that would make the pieces that can be told more probable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.errors import AlignmentError, MalformedResponseError
from mope_bb.failures import shown
from mope_bb.providers.wire import MAX_PIECE_BYTES, REPLACEMENT, PieceReader, Reply, checked_id
from mope_bb.types import END, Piece


@dataclass(frozen=True, slots=True)
class DrawAsk:
    """What is asked of an endpoint that gives no logprobs: what it draws, every other sampler off where it can be."""

    num_tokens: int = 1
    temperature: float = 1.0


ONE_DRAW: Final = DrawAsk()
ENDED: Final = ("stop", "eos")
"""`finish_reason` of an answer that has ended by itself; Together says "eos"."""
_NO_TEXT_HINT: Final = 'No token is lost where they are named by id ("vllm"), or where there are logprobs ("llamacpp").'
_NO_TOKEN_HINT: Final = (
    "Is `tokenizer` that of the model which is served there? An endpoint that cuts off spaces cannot take part; "
    "`mope-bb doctor` finds out."
)


def piece_of_draw(reply: Reply, tokenizer: ChatTokenizer | None, *, expert: str) -> Piece:
    """The piece of the one token that was drawn, END where the answer ended; with a `tokenizer` it has its id.

    Raises AlignmentError for half a character, for a token that shows no text, and for what is not one token.
    """
    if tokenizer is not None and reply.token_ids is not None and len(reply.token_ids) == 1:
        return tokenizer.piece(reply.token_ids[0])
    text = reply.text or ""
    if reply.has_ended and not text:
        return END
    # The text is the model's own: one that looks like a token's number is still text.
    piece = PieceReader(tokenizer).read_text(text) if len(text) <= MAX_PIECE_BYTES else None
    if piece is not None:
        return piece
    if is_lost(text):
        what = "half a character" if text else "a token without text: half a character, or an end that is not told"
        raise AlignmentError(f"expert {expert!r} drew {what}", hint=_NO_TEXT_HINT)
    raise AlignmentError(f"expert {expert!r} drew {shown(text)}, which is not one token", hint=_NO_TOKEN_HINT)


def is_lost(text: str) -> bool:
    """Whether the `text` of a token does not show it: half a character, or a control token. Any model draws them."""
    return not text or REPLACEMENT in text


def check_num_drawn(data: Mapping[str, Any], num_tokens: int, *, expert: str) -> None:
    """Raise AlignmentError where `usage` counts more tokens than were asked for."""
    usage = data.get("usage")
    written = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if type(written) is int and written > num_tokens:
        raise AlignmentError(
            f"expert {expert!r} wrote {written} tokens where {num_tokens} was asked for",
            hint="An endpoint that writes more than it is asked for cannot be drawn from token by token.",
        )


def parse_drawn_ids(choice: Mapping[str, Any], *, expert: str) -> tuple[int, ...] | None:
    """`token_ids` of a choice, where the endpoint tells. Raises MalformedResponseError."""
    ids = choice.get("token_ids")
    try:
        return None if ids is None else tuple(map(checked_id, ids))
    except (TypeError, ValueError) as error:
        raise MalformedResponseError(f"`token_ids` are not ids: {shown(error)}", expert=expert) from None
