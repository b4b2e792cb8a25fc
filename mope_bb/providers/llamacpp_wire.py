"""What is sent to llama.cpp's `/completion` and what comes back; the pitfalls stand in `llamacpp`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from mope_bb.errors import AlignmentError, ContextLengthError, LogprobsUnavailableError, MalformedResponseError
from mope_bb.failures import shown
from mope_bb.providers.endpoint import Ask, build_from_reply
from mope_bb.providers.wire import (
    PieceReader,
    Position,
    Reply,
    as_count,
    checked_id,
    checked_logprob,
    is_whole_text,
    refuse_repeated,
)
from mope_bb.types import Piece, TokenDistribution

FORCE_BIAS: Final = 1000.0
NOTHING_FILTERED: Final[Mapping[str, Any]] = {
    "samplers": ["temperature"],
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "logit_bias": [],
    "ignore_eos": False,
}
"""A server may have been started with any of them."""
REPLY_FIELDS: Final = (
    "index",
    "tokens",
    "tokens_predicted",
    "tokens_evaluated",
    "truncated",
    "stop_type",
    "completion_probabilities",
)
"""Else a reply holds all settings and the prompt as text: at 2,000 tokens that takes longer than a small model."""


def build_request(prompts: Sequence[Sequence[int]], *, top_k: int, forced_id: int) -> dict[str, Any]:
    """The body of one next-token question, or of several at once."""
    return {
        "prompt": list(prompts[0]) if len(prompts) == 1 else [list(ids) for ids in prompts],
        "n_predict": 1,
        "n_probs": top_k,
        "temperature": 1.0,
        "logit_bias": [[forced_id, FORCE_BIAS]],
        "post_sampling_probs": False,
        "cache_prompt": True,
        "stream": False,
        "return_tokens": True,
        "response_fields": list(REPLY_FIELDS),
    }


def build_own_request(prompts: Sequence[Sequence[int]], ask: Ask) -> dict[str, Any]:
    """The same where the engine draws the tokens itself: nothing is forced, and `ask.num_tokens` are drawn."""
    body = {
        **build_request(prompts, top_k=ask.top_k, forced_id=0),
        **NOTHING_FILTERED,
        "n_predict": ask.num_tokens,
        "temperature": ask.temperature or 0.0,
    }
    return body if ask.seed is None else {**body, "seed": ask.seed}


def build_score_request(ids: Sequence[int], forced: Sequence[int], *, top_k: int) -> dict[str, Any]:
    """The body of a question for the lists along `forced`, which is generated and nothing else.

    The grammar is what forces. Applied to a whole vocabulary it costs more than the model's own forward, but it is
    only applied where what is drawn without it does not fit: so the forced tokens are made more probable than all
    others, the earlier ones more than the later, and what was generated before less.
    """
    places: dict[int, int] = {}
    for place, token_id in enumerate(forced):
        places.setdefault(token_id, place)
    num_forced = len(forced)
    return {
        **build_request([ids], top_k=top_k, forced_id=0),
        **NOTHING_FILTERED,
        "n_predict": num_forced,
        "grammar": "root ::= " + " ".join(f"<[{token_id}]>" for token_id in forced),
        "temperature": 0.0,
        "samplers": ["penalties", "temperature"],
        "logit_bias": [[token_id, FORCE_BIAS * (num_forced - place)] for token_id, place in places.items()],
        "presence_penalty": 2 * FORCE_BIAS * num_forced,
        "repeat_last_n": num_forced,
        "repeat_penalty": 1.0,
        "frequency_penalty": 0.0,
    }


def parse_reply(data: Any, reader: PieceReader, *, num_ids: int, expert: str) -> Reply:
    """A reply of `/completion`. Raises a ProviderError."""
    if not isinstance(data, dict):
        raise MalformedResponseError(f"the reply is {type(data).__name__}, expected an object", expert=expert)
    if data.get("truncated"):
        raise ContextLengthError(
            f"the server read {as_count(data.get('tokens_evaluated'))} of {num_ids} tokens and cut the rest",
            expert=expert,
        )
    try:
        positions = tuple(_parse_position(one, reader) for one in data.get("completion_probabilities") or ())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise MalformedResponseError(
            f"`completion_probabilities` is not as llama.cpp writes it: {shown(error)}", expert=expert
        ) from None
    return Reply(positions, as_count(data.get("tokens_evaluated")), has_ended=data.get("stop_type") == "eos")


def parse_draft(data: Any, reader: PieceReader, *, num_ids: int, expert: str) -> Reply:
    """The same where nothing was forced: up to the first position whose list is left out. Raises a ProviderError.

    From there on lists come too early, and the next token has the bytes of those that were left out before its own. The
    first one left out ends inside a character, as it would anywhere: so what stands in its place is another token.
    """
    try:
        tokens, listed = data.get("tokens") or (), data.get("completion_probabilities") or ()
        pairs = zip(tokens, (position["id"] for position in listed), strict=False)
        num_certain = next((place for place, (drawn, told) in enumerate(pairs) if drawn != told), len(listed))
        reply = parse_reply(
            {**data, "completion_probabilities": listed[:num_certain]}, reader, num_ids=num_ids, expert=expert
        )
        if not tokens:
            raise LogprobsUnavailableError("the server does not tell the ids of what it drew", expert=expert)
        positions = tuple(
            replace(position, drawn_logprob=checked_logprob(wired["logprob"]))
            for position, wired in zip(reply.positions, listed, strict=False)
        )
        left_out = tokens[num_certain] if num_certain < len(tokens) else None
        unlisted = None if left_out is None else reader.read(None, data=b"", token_id=left_out)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedResponseError(
            f"what was drawn is not as llama.cpp writes it: {shown(error)}", expert=expert
        ) from None
    return replace(reply, positions=positions, unlisted=unlisted)


def can_be_forced(piece: Piece) -> bool:
    """Whether a grammar lets this piece through: whole characters, none of them NUL."""
    return is_whole_text(piece.data) and b"\0" not in piece.data


def parse_response(
    data: Any, *, num_ids: int, top_k: int, end_ids: Collection[int], vocab_size: int | None, expert: str
) -> TokenDistribution:
    """The distribution in a reply of `/completion`. Raises a ProviderError."""
    reply = parse_reply(data, PieceReader(None, end_ids=end_ids), num_ids=num_ids, expert=expert)
    if not reply.positions:
        raise LogprobsUnavailableError("the server answered without logprobs (`n_probs` was ignored)", expert=expert)
    return build_from_reply(reply, num_ids=num_ids, top_k=top_k, vocab_size=vocab_size, expert=expert)


def split_response(data: Any, num_prompts: int, *, expert: str) -> list[Any]:
    """The replies to several questions in their order. Raises MalformedResponseError."""
    if num_prompts == 1:
        return [data]
    try:
        found = {reply["index"]: reply for reply in data}
        if len(found) != len(data) or any(type(index) is not int for index in found):
            raise KeyError("two replies have one index, or one has none")
        return [found[index] for index in range(num_prompts)]
    except (KeyError, TypeError):
        count = f"{len(data)} replies" if isinstance(data, list) else type(data).__name__
        raise MalformedResponseError(
            f"a list of {num_prompts} prompts was answered by {count}, expected one for each", expert=expert
        ) from None


def _parse_position(position: Mapping[str, Any], reader: PieceReader) -> Position:
    listed = position["top_logprobs"]
    refuse_repeated([entry["id"] for entry in listed])
    entries = tuple((_recall_piece(entry, reader), checked_logprob(entry["logprob"])) for entry in listed)
    # Without its logprob: it may be the token that we forced, which says nothing about the list. Not to be remembered:
    # where the tokens before it ended inside a character, its bytes begin with theirs.
    drawn = _parse_piece(position, reader) if "id" in position else None
    return Position(entries, drawn, has_ids=True)


def _recall_piece(entry: Mapping[str, Any], reader: PieceReader) -> Piece:
    known = reader.known.get(checked_id(entry["id"]))  # `True` would be found as 1
    if known is None:
        piece = _parse_piece(entry, reader)
        if piece.data:
            reader.known[entry["id"]] = piece, entry["bytes"]
        return piece
    piece, data = known
    if entry["bytes"] != data:
        raise ValueError(f"token {entry['id']} was {piece.data!r} and is {shown(entry['bytes'])} now: another model")
    return piece


def _parse_piece(entry: Mapping[str, Any], reader: PieceReader) -> Piece:
    token_id, data = checked_id(entry["id"]), entry["bytes"]
    if not isinstance(data, list):
        raise ValueError(f"bytes {shown(data)}")
    piece = reader.read(None, data=bytes(data), token_id=token_id)
    assert piece is not None  # it has an id
    return piece


def parse_spelling(data: Any, text: bytes, *, expert: str) -> tuple[Piece, ...]:
    """The pieces of `text` by /tokenize. Raises MalformedResponseError; AlignmentError for pieces of other bytes."""
    try:
        pieces = tuple(Piece(_bytes_of(one["piece"]), checked_id(one["id"])) for one in data["tokens"])
    except (KeyError, TypeError, ValueError):
        raise MalformedResponseError(f"/tokenize gave no pieces: {shown(data)}", expert=expert) from None
    if b"".join(piece.data for piece in pieces) != text:
        raise AlignmentError(
            f"the tokenizer of expert {expert!r} writes {text!r} as {[piece.data for piece in pieces]}",
            hint="Set `tokenizer` to the model's Hugging Face folder or hub name.",
        )
    return pieces


def _bytes_of(piece: Any) -> bytes:
    # What is no UTF-8 comes as a list of numbers.
    return piece.encode() if isinstance(piece, str) else bytes(piece)
