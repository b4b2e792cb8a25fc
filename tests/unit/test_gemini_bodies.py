"""Gemini's `generateContent`: what is asked, and what replies mean, damaged ones among them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mope_bb.config import parse_config
from mope_bb.errors import ContextLengthError, LogprobsUnavailableError, MalformedResponseError, MopeError, RequestError
from mope_bb.failures import classify_status
from mope_bb.providers import gemini
from mope_bb.providers.endpoint import Ask, build_from_reply
from mope_bb.providers.wire import PieceReader, Reply
from mope_bb.types import END, Message, Piece, TokenDistribution


def distribution(reply: Reply) -> TokenDistribution:
    """What comes of a reply to a text."""
    return build_from_reply(reply, num_ids=None, top_k=20, vocab_size=None, expert="e", whole_characters=True)


def gemini_reply(**values: Any) -> dict[str, Any]:
    """As Vertex writes it, with other fields of the candidate; None takes one away."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "tokenId": 7, "logProbability": logprob}

    candidate = {
        "content": {"role": "model", "parts": [{"text": "Use"}]},
        "finishReason": "MAX_TOKENS",
        "logprobsResult": {
            "chosenCandidates": [entry("Use", -0.3)],
            "topCandidates": [
                {"candidates": [entry("Use", -0.3), entry("<end_of_turn>", -2.0), entry("\ufffd", -3.0)]}
            ],
        },
        **values,
    }
    candidate = {name: value for name, value in candidate.items() if value is not None}
    return {"candidates": [candidate], "usageMetadata": {"promptTokenCount": 3}}


def test_is_asked_with_turns() -> None:
    """System messages stand apart, the assistant is the model, settings can be added."""
    messages = [Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "?")]
    extra = {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}, "safetySettings": []}
    assert gemini.build_request(messages, Ask(5), extra=extra, expert="e") == {
        "systemInstruction": {"parts": [{"text": "Be kind."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "Hi"}]},
            {"role": "model", "parts": [{"text": "Yo"}]},
            {"role": "user", "parts": [{"text": "?"}]},
        ],
        "safetySettings": [],
        "generationConfig": {
            "maxOutputTokens": 1,
            "temperature": 0.0,
            "responseLogprobs": True,
            "logprobs": 5,
            "thinkingConfig": {"thinkingBudget": 0},
        },
    }
    with pytest.raises(RequestError, match="'tool'"):
        gemini.build_request([Message("tool", "7")], Ask(5), extra={}, expert="e")


def test_reply() -> None:
    """Pieces by their text, the end by its name, half characters as unreadable."""
    reply = gemini.parse_reply(gemini_reply(), PieceReader(None), expert="e")
    assert distribution(reply).pieces == (Piece(b"Use"), END)
    assert (reply.prompt_tokens, reply.positions[0].num_unreadable) == (3, 1)


def test_end_has_no_list() -> None:
    """An answer that ends at once is a guess."""
    data = gemini_reply(finishReason="STOP", content={"role": "model"}, logprobsResult=None)
    assert distribution(gemini.parse_reply(data, PieceReader(None), expert="e")).is_guess


def test_thinks_first() -> None:
    """Thoughts use the only token up: the error says how to switch them off."""
    data = gemini_reply(logprobsResult=None, content={"role": "model"})
    with pytest.raises(LogprobsUnavailableError, match="without logprobs") as caught:
        gemini.parse_reply(data, PieceReader(None), expert="e")
    assert "thinkingBudget" not in str(caught.value.hint)
    data["usageMetadata"]["thoughtsTokenCount"] = 1
    with pytest.raises(LogprobsUnavailableError, match="1 tokens of thought") as caught:
        gemini.parse_reply(data, PieceReader(None), expert="e")
    assert "thinkingBudget = 0" in str(caught.value.hint)


def test_blocks() -> None:
    """A blocked prompt has no candidates, and the error says why."""
    with pytest.raises(RequestError, match="SAFETY"):
        gemini.parse_reply({"promptFeedback": {"blockReason": "SAFETY"}}, PieceReader(None), expert="e")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"candidates": []},
        gemini_reply(content="text", logprobsResult=None, finishReason="STOP"),
        gemini_reply(logprobsResult="text"),
        gemini_reply(logprobsResult={"topCandidates": [{"candidates": []}]}),
        gemini_reply(logprobsResult={"topCandidates": [{"candidates": []}], "chosenCandidates": []}),
        gemini_reply(logprobsResult={"topCandidates": [{}], "chosenCandidates": [{"token": "a", "logProbability": 0}]}),
    ],
)
def test_damaged(data: Any) -> None:
    """Another shape is malformed."""
    with pytest.raises(MalformedResponseError):
        gemini.parse_reply(data, PieceReader(None), expert="e")


def test_key_stands_in_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own, not as a bearer's, and never in the address."""
    monkeypatch.setenv("GOOGLE_KEY", "secret")
    table = {"name": "e", "provider": "gemini", "model": "gemini-2.5-flash", "api_key_env": "GOOGLE_KEY"}
    client = gemini.open_expert(parse_config({"experts": [table]}).experts[0], None)._client
    assert client.base_url == "https://generativelanguage.googleapis.com/v1beta"
    assert client.headers["x-goog-api-key"] == "secret"
    assert "authorization" not in client.headers


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Logprobs is not enabled for models/gemini-2.5-pro", LogprobsUnavailableError),
        ("Logprobs is not supported for this model", LogprobsUnavailableError),
        ("The input token count (9) exceeds the maximum number of tokens allowed (8).", ContextLengthError),
    ],
)
def test_refusals(message: str, expected: type[MopeError]) -> None:
    """What Gemini refuses, in its own words."""
    body = {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}
    assert classify_status(400, json.dumps(body).encode())[0] is expected
