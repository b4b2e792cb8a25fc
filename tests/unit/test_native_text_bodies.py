"""Ollama and TGI, which take text: what is asked, and what replies mean, damaged ones among them."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.errors import (
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    ModelNotFoundError,
    MopeError,
    RateLimitError,
    ServerError,
    TopKError,
)
from mope_bb.failures import classify_status
from mope_bb.providers import ollama, tgi
from mope_bb.providers.endpoint import Ask, build_from_reply
from mope_bb.providers.wire import PieceReader, Reply
from mope_bb.types import END, TokenDistribution
from mope_bb.zoo.build import Zoo


@pytest.fixture(scope="module")
def tokenizer(nano: Zoo) -> ChatTokenizer:
    """The zoo's: byte-level, one end token, id 0."""
    return load_chat_tokenizer(str(nano.folder("concise")))


def distribution(reply: Reply, *, top_k: int = 20) -> TokenDistribution:
    """What comes of a reply to a text."""
    return build_from_reply(reply, num_ids=None, top_k=top_k, vocab_size=None, expert="e", whole_characters=True)


def ollama_reply(**values: Any) -> dict[str, Any]:
    """As Ollama 0.33 writes it, with other fields; None takes one away."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob} | ({"bytes": list(text.encode())} if text else {})

    top = [entry("!", -0.3), entry("?", -2.0), entry("\ufffd", -3.0), entry("", -4.0)]
    reply = {
        "model": "m",
        "response": "!",
        "done": True,
        "done_reason": "length",
        "prompt_eval_count": 3,
        "logprobs": [{**entry("!", -0.3), "top_logprobs": top}],
        **values,
    }
    return {name: value for name, value in reply.items() if value is not None}


def test_ollama_is_asked_for_the_best_piece() -> None:
    """Raw, uncut, greedy, and free of all that a Modelfile may add."""
    assert ollama.build_request("Hi", Ask(20), model="m") == {
        "model": "m",
        "prompt": "Hi",
        "raw": True,
        "stream": False,
        "truncate": False,
        "shift": False,
        "logprobs": True,
        "top_logprobs": 20,
        "options": {
            "num_predict": 1,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": [],
        },
    }
    assert ollama.build_request("Hi", Ask(5, 4, 0.5), model="m")["options"]["temperature"] == 0.5


def test_ollama_reply(tokenizer: ChatTokenizer) -> None:
    """Texts become the tokenizer's own pieces; half characters and control tokens name none and are counted."""
    reply = ollama.parse_reply(ollama_reply(), PieceReader(tokenizer), expert="e")
    assert distribution(reply).pieces == (tokenizer.piece_of_bytes(b"!"), tokenizer.piece_of_bytes(b"?"))
    assert distribution(reply).logprobs == (-0.3, -2.0)
    assert reply.positions[0].num_unreadable == 2
    assert not reply.has_ended


def test_ollama_end_has_no_list(tokenizer: ChatTokenizer) -> None:
    """A drawn end is a guess: certain, with everything unseen."""
    data = ollama_reply(response="", done_reason="stop", logprobs=None)
    found = distribution(ollama.parse_reply(data, PieceReader(tokenizer), expert="e"))
    assert (found.pieces, found.is_guess, found.tail_mass) == ((END,), True, 1.0)


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"response": "", "logprobs": None}, "half a character", "llamacpp"),
        ({"response": "\ufffd", "logprobs": None}, "half a character", "llamacpp"),
        ({"logprobs": None}, "'!' without logprobs", "0.12.11"),
        ({"logprobs": []}, "'!' without logprobs", "0.12.11"),
        ({"logprobs": None, "done_reason": "stop"}, "'!' without logprobs", "0.12.11"),
    ],
)
def test_ollama_without_logprobs(values: dict[str, Any], message: str, hint: str, tokenizer: ChatTokenizer) -> None:
    """Why there are none: the best piece is no text, or this Ollama gives none. Neither is an end."""
    with pytest.raises(LogprobsUnavailableError, match=message) as caught:
        ollama.parse_reply(ollama_reply(**values), PieceReader(tokenizer), expert="e")
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        ollama_reply(response=None),
        ollama_reply(response=3),
        ollama_reply(logprobs="text"),
        ollama_reply(logprobs=[{}]),
        ollama_reply(logprobs=[{"token": "!", "logprob": -0.3}]),
        ollama_reply(logprobs=[{"token": "!", "logprob": -0.3, "top_logprobs": [{"token": 3, "logprob": -1}]}]),
    ],
)
def test_ollama_damaged(data: Any, tokenizer: ChatTokenizer) -> None:
    """Another shape is malformed."""
    with pytest.raises(MalformedResponseError):
        ollama.parse_reply(data, PieceReader(tokenizer), expert="e")


TGI: dict[str, Any] = {
    "generated_text": "!",
    "details": {
        "finish_reason": "length",
        "generated_tokens": 1,
        "seed": None,
        "prefill": [],
        "tokens": [{"id": 4, "text": "!", "logprob": -0.3, "special": False}],
        "top_tokens": [
            [
                {"id": 4, "text": "!", "logprob": -0.3, "special": False},
                {"id": 99, "text": "\ufffd", "logprob": -1.5, "special": False},
                {"id": 34, "text": "?", "logprob": -2.0, "special": False},
                {"id": 0, "text": "<|end|>", "logprob": -2.0, "special": True},
            ]
        ],
    },
}


def with_details(**values: Any) -> dict[str, Any]:
    """TGI's reply with other `details`; None takes a field away."""
    details = {**copy.deepcopy(TGI["details"]), **values}
    return {**TGI, "details": {name: value for name, value in details.items() if value is not None}}


def test_tgi_is_asked_greedily() -> None:
    """Without a temperature, which would scale the logprobs, and 0 of which is refused."""
    parameters = {"max_new_tokens": 1, "details": True, "top_n_tokens": 5, "do_sample": False}
    assert tgi.build_request("Hi", Ask(5)) == {"inputs": "Hi", "parameters": parameters}
    assert tgi.build_request("Hi", Ask(5, temperature=0.0))["parameters"] == parameters
    sampled = tgi.build_request("Hi", Ask(5, temperature=0.5))["parameters"]
    assert (sampled["do_sample"], sampled["temperature"]) == (True, 0.5)


def test_tgi_reply(tokenizer: ChatTokenizer) -> None:
    """Ids name pieces and the end; where values tie more come than asked, and the list is cut.

    Half a character is known by its id, but cannot be continued by text.
    """
    reply = tgi.parse_reply(TGI, PieceReader(tokenizer), expert="e")
    assert distribution(reply).pieces == (tokenizer.piece(4), END, tokenizer.piece(34))
    assert tokenizer.piece(99) in dict(reply.positions[0].entries)
    assert len(distribution(reply, top_k=2).pieces) == 2
    assert reply.positions[0].has_ids
    assert tgi.parse_reply(with_details(finish_reason="eos_token"), PieceReader(tokenizer), expert="e").has_ended


@pytest.mark.parametrize("data", [with_details(top_tokens=None), with_details(top_tokens=[]), {"generated_text": "!"}])
def test_tgi_without_lists(data: Any, tokenizer: ChatTokenizer) -> None:
    """No top tokens is its own error."""
    with pytest.raises(LogprobsUnavailableError, match="top_tokens"):
        tgi.parse_reply(data, PieceReader(tokenizer), expert="e")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [TGI],
        {},
        {**TGI, "details": "text"},
        with_details(tokens=None),
        with_details(tokens=[]),
        with_details(top_tokens=[None]),
        with_details(top_tokens=[[{"id": 4}]]),
        with_details(top_tokens=[[{"id": "4", "logprob": -0.3}]]),
        with_details(top_tokens=[[{"id": -5, "logprob": -0.3}]]),
        with_details(top_tokens=[[{"id": 4, "logprob": "-0.3"}]]),
    ],
)
def test_tgi_damaged(data: Any, tokenizer: ChatTokenizer) -> None:
    """Another shape is malformed."""
    with pytest.raises(MalformedResponseError):
        tgi.parse_reply(data, PieceReader(tokenizer), expert="e")


def invalid(message: str) -> dict[str, str]:
    """What TGI writes with status 422."""
    return {"error": f"Input validation error: {message}", "error_type": "validation"}


FULL = '{"error":{"code":400,"message":"request (9 tokens) exceeds the available context size (8 tokens)"}}'
TOO_MANY = "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 600 `inputs` tokens and 1 `max_new_tokens`"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, {"error": "top_logprobs must be between 0 and 20"}, TopKError),
        (404, {"error": "model 'm' not found"}, ModelNotFoundError),
        (503, {"error": "server busy, please try again. maximum pending requests exceeded"}, ServerError),
        (400, {"error": FULL}, ContextLengthError),
        (422, invalid("`top_n_tokens` must be >= 0 and <= 5. Given: 20"), TopKError),
        (422, invalid(TOO_MANY), ContextLengthError),
        (422, invalid("`inputs` must have less than 512 tokens. Given: 600"), ContextLengthError),
        (429, {"error": "Model is overloaded", "error_type": "overloaded"}, RateLimitError),
        (424, {"error": "Request failed during generation: CUDA error", "error_type": "generation"}, ServerError),
    ],
)
def test_refusals(status: int, body: dict[str, Any], expected: type[MopeError]) -> None:
    """What Ollama and TGI refuse, in their own words; a limit is told."""
    kind, hint = classify_status(status, json.dumps(body).encode())
    assert kind is expected
    if expected is TopKError:
        assert re.search(r"top_k = (20|5),", str(hint))
