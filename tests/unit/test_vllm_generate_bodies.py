"""vLLM's `/inference/v1/generate`: exchanges with a real one (see bodies/README.md), and damaged replies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mope_bb.chat_tokenizer import load_chat_tokenizer
from mope_bb.errors import (
    AuthenticationError,
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    MopeError,
    RequestError,
)
from mope_bb.failures import classify_status
from mope_bb.providers import vllm_generate
from mope_bb.providers.endpoint import Ask, build_from_reply
from mope_bb.providers.wire import PieceReader, Reply
from mope_bb.types import END, TokenDistribution
from mope_bb.zoo.build import Zoo

BODIES = Path(__file__).parent / "bodies"


@pytest.fixture(scope="module")
def reader(nano: Zoo) -> PieceReader:
    """Of the tokenizer of the recorded model: byte-level, one end token, id 0."""
    return PieceReader(load_chat_tokenizer(str(nano.folder("concise"))))


def recorded(name: str) -> dict[str, Any]:
    """An exchange with a real vLLM 0.32."""
    document: dict[str, Any] = json.loads((BODIES / f"{name}.json").read_text(encoding="utf-8"))
    return document


def distribution(reply: Reply, *, num_ids: int = 12) -> TokenDistribution:
    """What comes of a reply to so many ids."""
    return build_from_reply(reply, num_ids=num_ids, top_k=20, vocab_size=None, expert="e")


def ids_of(found: TokenDistribution) -> list[int | None]:
    """The ids of its pieces."""
    return [piece.token_id for piece in found.pieces]


def test_is_asked_as_recorded() -> None:
    """The recorded request is this adapter's, which also names the mode of the answer."""
    sent = recorded("vllm_generate")["sent"]
    assert vllm_generate.build_request(sent["token_ids"], Ask(5), model="base") == {**sent, "output_mode": "tokens"}


def test_reply(reader: PieceReader) -> None:
    """A real reply: ids and values as on the wire."""
    document = recorded("vllm_generate")
    wire = document["reply"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = distribution(vllm_generate.parse_reply(document["reply"], reader, expert="e"))
    assert ids_of(found) == [entry["token_id"] for entry in wire]
    assert found.logprobs == tuple(entry["logprob"] for entry in wire)


def test_drawn_token_stands_first(reader: PieceReader) -> None:
    """A real reply with a forced end: sorted, and the end is known by its id."""
    reply = vllm_generate.parse_reply(recorded("vllm_generate_end")["reply"], reader, expert="e")
    assert reply.has_ended
    assert ids_of(distribution(reply)) == [681, 745, 693, 735, END.token_id]


def test_sentinels(reader: PieceReader) -> None:
    """-9999 is no value; a drawn token without a value has no list, which is an error."""
    reply = recorded("vllm_generate")["reply"]
    content = reply["choices"][0]["logprobs"]["content"][0]
    content["top_logprobs"][-1]["logprob"] = -9999.0
    found = distribution(vllm_generate.parse_reply(reply, reader, expert="e"))
    assert ids_of(found) == [681, 745, 693, 735]
    content |= {"logprob": -9999.0, "top_logprobs": []}
    with pytest.raises(LogprobsUnavailableError):
        distribution(vllm_generate.parse_reply(reply, reader, expert="e"))


def test_cut_prompt(reader: PieceReader) -> None:
    """The server tells how much it read."""
    reply = vllm_generate.parse_reply(recorded("vllm_generate")["reply"], reader, expert="e")
    with pytest.raises(ContextLengthError, match="12 of 13"):
        distribution(reply, num_ids=13)


def test_without_scale_out() -> None:
    """The real 403 is no matter of keys: the error names the flag. Another 403 is one."""
    document = recorded("vllm_error_generate_closed")
    kind, _ = classify_status(document["status"], json.dumps(document["reply"]).encode())
    assert kind is AuthenticationError
    closed = AuthenticationError(document["reply"]["error"]["message"], status_code=403, expert="e")
    explained = vllm_generate.explain_refusal(closed)
    assert isinstance(explained, RequestError)
    assert "--enable-scale-out" in str(explained.hint)
    assert (explained.expert, explained.status_code) == ("e", 403)
    denied = AuthenticationError("Forbidden", status_code=403)
    assert vllm_generate.explain_refusal(denied) is denied


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (None, MalformedResponseError),
        ([], MalformedResponseError),
        ([{}], MalformedResponseError),
        ([None], MalformedResponseError),
        ([{"index": 0}], LogprobsUnavailableError),
        ([{"index": 0, "logprobs": None}], LogprobsUnavailableError),
        ([{"index": 0, "logprobs": {"content": [{}]}}], MalformedResponseError),
        ([{"index": 0, "logprobs": {"content": [{"token_id": 1, "logprob": -1}]}}], MalformedResponseError),
        ([{"index": 0, "logprobs": {"content": 3}}], MalformedResponseError),
        ([{"index": 0, "logprobs": "text"}], MalformedResponseError),
    ],
)
def test_damaged(choices: Any, expected: type[MopeError], reader: PieceReader) -> None:
    """Each damage is one specific error."""
    with pytest.raises(MopeError) as caught:
        vllm_generate.parse_reply({"choices": choices}, reader, expert="e")
    assert type(caught.value) is expected


@pytest.mark.parametrize("value", ["-1", True, math.nan, 0.5])
def test_numbers_are_checked(value: Any, reader: PieceReader) -> None:
    """A number that is none, or no logprob, is malformed."""
    reply = recorded("vllm_generate")["reply"]
    reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = value
    with pytest.raises(MalformedResponseError):
        distribution(vllm_generate.parse_reply(reply, reader, expert="e"))
