"""Lists as `mope-bb serve` writes them, read by a session that has a mope endpoint among its experts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import ExpertConfig, parse_config
from mope_bb.errors import AlignmentError, MalformedResponseError
from mope_bb.providers.chat import ChatExpert, open_expert, parse_response
from mope_bb.providers.dialects import CHAT
from mope_bb.providers.discover import discover
from mope_bb.providers.endpoint import build_from_reply
from mope_bb.providers.pool import ExpertPool
from mope_bb.providers.wire import PieceReader
from mope_bb.types import END, Context, Message, Piece, TokenDistribution
from mope_bb.zoo.build import Zoo
from tests.endpoints.engine import StandIn, serving

QUESTION = Context((Message("user", "How do I fix a bike?"),))
ENDING = {"token": "<end>", "bytes": [], "token_id": -1, "logprob": -0.5}
URL = "http://localhost:1/v1"


def entry(data: bytes, logprob: float, token_id: int | None = None) -> dict[str, Any]:
    """One token of a list."""
    found = {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": logprob}
    return found if token_id is None else {**found, "token_id": token_id}


def completion(*entries: Mapping[str, Any], finish: str = "length") -> dict[str, Any]:
    """An answer of one token, the first of the list, to a question with `continue_final_message`."""
    is_end = entries[0]["bytes"] == []
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "mope",
        "system_fingerprint": "mope-bb 0.1.0",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "" if is_end else entries[0]["token"], "refusal": None},
                "logprobs": {"content": [{**entries[0], "top_logprobs": list(entries)}], "refusal": None},
                "finish_reason": finish,
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
        "mope": {"merge": "linear", "weights": {"concise": 1.0}, "seed": None, "dropped": [], "effort": {}},
    }


def distribution(data: Any, tokenizer: ChatTokenizer | None = None) -> TokenDistribution:
    """What an expert makes of a reply."""
    reader = PieceReader(tokenizer, are_pieces=CHAT["mope"].writes_pieces)
    reply = parse_response(data, reader, expert="inner")
    return build_from_reply(reply, num_ids=None, top_k=20, vocab_size=None, expert="inner", whole_characters=True)


@pytest.fixture(scope="module")
def tokenizer(nano: Zoo) -> ChatTokenizer:
    """The zoo's."""
    return load_chat_tokenizer(str(nano.folder("concise")))


@pytest.mark.parametrize("end", [ENDING, {name: ENDING[name] for name in ("token", "bytes", "logprob")}])
def test_the_end_is_the_token_without_bytes(end: dict[str, Any], tokenizer: ChatTokenizer) -> None:
    """With our own id of it or, where nobody knows ids, with none; drawn or listed."""
    ids = [token_id for token_id, piece in enumerate(tokenizer.pieces) if piece.data == b" the"]
    listed = entry(b" the", -1.5, ids[0] if "token_id" in end else None)
    for reader in (None, tokenizer):
        drawn = distribution(completion(end, listed, finish="stop"), reader)
        assert dict(zip(drawn.pieces, drawn.logprobs, strict=True))[END] == -0.5
        assert not drawn.is_guess
        assert distribution(completion({**listed, "logprob": -0.1}, {**end, "logprob": -3.0}), reader).pieces[1] == END


@pytest.mark.parametrize("text", [b"<end>", b"</s>", b"<|im_end|>", b"token_id:7"])
def test_what_only_looks_like_an_end_is_text(text: bytes) -> None:
    """A model may write it; what ends an answer has no bytes."""
    assert distribution(completion(entry(text, -0.2), entry(b" a", -2.0))).pieces == (Piece(text), Piece(b" a"))
    assert distribution(completion(entry(text, -0.2, 5), entry(b" a", -2.0, 6))).pieces == (Piece(text), Piece(b" a"))


def test_control_tokens_and_half_characters_count_as_unseen() -> None:
    """Neither can be continued as text; a control token, which adds nothing, is not the end."""
    found = distribution(completion(entry(b" a", -0.5, 6), entry(b"", -1.5, 3), entry(b"\xc3", -2.0, 4)))
    assert found.pieces == (Piece(b" a"),)
    assert found.tail_mass == pytest.approx(1 - 2.718281828**-0.5)


def test_an_end_with_text_is_malformed() -> None:
    """Our id of the end belongs to nothing else."""
    with pytest.raises(MalformedResponseError, match="id -1"):
        distribution(completion(entry(b" a", -0.5, 6), entry(b"end", -1.5, -1)))


def test_a_tokenizer_of_another_model_is_told_by_the_bytes(tokenizer: ChatTokenizer) -> None:
    """The wire has both, so that a wrong `tokenizer` does not give other words their probabilities."""
    token_id = next(n for n, piece in enumerate(tokenizer.pieces) if piece.data == b" the")
    assert distribution(completion(entry(b" the", -0.5, token_id)), tokenizer).pieces == (Piece(b" the", token_id),)
    with pytest.raises(AlignmentError, match=rf"token {token_id} is b' cat' at the endpoint and b' the'"):
        distribution(completion(entry(b" cat", -0.5, token_id)), tokenizer)


def configured(name: str, **more: Any) -> ExpertConfig:
    """An expert that is a mope endpoint."""
    table = {"name": name, "provider": "mope", "base_url": URL, "model": "mope", "max_retries": 0, **more}
    return parse_config({"experts": [table]}).experts[0]


def open_together(*configs: ExpertConfig) -> str | None:
    """The tokenizer that they share. Raises AlignmentError."""

    async def main() -> str | None:
        pool = ExpertPool(configs, cache=None)
        try:
            await pool.open([config.name for config in configs])
            return pool.tokenizer_fingerprint
        finally:
            await pool.aclose()

    return asyncio.run(main())


def test_mixtures_of_one_endpoint_share_a_tokenizer(nano: Zoo) -> None:
    """Whatever their preferences and presets; of another endpoint nothing is known, unless `tokenizer` tells."""
    brief = configured("brief", extra_body={"preference": "concise"})
    kind = configured("kind", model="mope:friendly")
    other = configured("other", base_url="http://localhost:2/v1")
    assert open_together(brief, kind) == URL
    with pytest.raises(AlignmentError, match="'brief' and 'other'"):
        open_together(brief, kind, other)
    folder = str(nano.folder("concise"))
    known = [one.model_copy(update={"tokenizer": folder}) for one in (brief, kind, other)]
    assert open_together(*known) == load_chat_tokenizer(folder).fingerprint


def test_each_preference_has_its_own_place_in_the_cache() -> None:
    """What is asked with one must not answer for another."""
    experts = [
        open_expert(configured("e", **more), None)
        for more in ({}, {"model": "mope:concise"}, {"extra_body": {"preference": "concise"}})
    ]
    messages = [Message("user", "Hi")]
    assert len({expert._key(messages, "", 5) for expert in experts}) == 3
    asyncio.run(close(*experts))


async def close(*experts: ChatExpert) -> None:
    """Close all."""
    for expert in experts:
        await expert.aclose()


def test_the_preference_is_sent_and_the_reply_is_read() -> None:
    """One question on a real socket."""
    reply = completion(entry(b" a", -0.5, 6), {**ENDING, "logprob": -1.0})
    cards = {"object": "list", "data": [{"id": "mope", "object": "model", "created": 1, "owned_by": "mope-bb"}]}
    routes = {
        ("POST", "/v1/chat/completions"): lambda *_: (200, reply),
        ("GET", "/v1/models"): lambda *_: (200, cards),
    }

    async def main(url: str) -> tuple[TokenDistribution, str, str]:
        found = await discover(url)
        expert = open_expert(configured("e", base_url=url, extra_body={"preference": {"concise": 1.0}}), None)
        try:
            listed = await expert.next_tokens(QUESTION.extended(Piece(b"Use")), top_k=5)
        finally:
            await expert.aclose()
        return listed, found.provider, found.base_url

    with serving(StandIn({}, routes)) as stand_in:
        listed, provider, base_url = asyncio.run(main(stand_in.url))
        body = stand_in.requests[-1][1]
    assert listed.pieces == (Piece(b" a"), END)
    assert (provider, base_url) == ("mope", f"{stand_in.url}/v1")
    assert body["preference"] == {"concise": 1.0}
    assert body["continue_final_message"] is True
    assert body["messages"][-1] == {"role": "assistant", "content": "Use"}
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 5, 1)
