"""Replies of OpenAI's chat completions as endpoints write them, each with its pitfall, and wrong ones.

The bodies are reproduced from the servers' sources and public threads; vLLM's and llama.cpp's are as real servers wrote
them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.errors import LogprobsUnavailableError, MalformedResponseError
from mope_bb.providers.chat import parse_response
from mope_bb.providers.endpoint import build_from_reply
from mope_bb.providers.wire import PieceReader, Reply
from mope_bb.types import END, Piece, TokenDistribution
from mope_bb.zoo.build import Zoo


def entry(token: str | None, logprob: float | None, data: Any = "text", **facts: Any) -> dict[str, Any]:
    """One token; `data`: its bytes, by default those of the text."""
    found = list((token or "").encode()) if data == "text" else None if data is None else list(data)
    return {"token": token, "logprob": logprob, "bytes": found, **facts}


def completion(
    *entries: dict[str, Any], drawn: dict[str, Any] | None = None, finish: str = "length", **choice: Any
) -> dict[str, Any]:
    """A reply with one list; without entries with an empty `content`."""
    token = {**(drawn or entries[0]), "top_logprobs": list(entries)} if entries else None
    return {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "" if token is None else token["token"]},
                "logprobs": {"content": [] if token is None else [token], "refusal": None},
                "finish_reason": finish,
                **choice,
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 1},
    }


def parse(data: Any, tokenizer: ChatTokenizer | None = None, **options: Any) -> Reply:
    """The reply to the expert "short"."""
    return parse_response(data, PieceReader(tokenizer), expert="short", **options)


def distribution(data: Any, tokenizer: ChatTokenizer | None = None, top_k: int = 5) -> TokenDistribution:
    """What an expert makes of it."""
    reply = parse(data, tokenizer)
    return build_from_reply(reply, num_ids=None, top_k=top_k, vocab_size=None, expert="short", whole_characters=True)


@pytest.fixture(scope="module")
def tokenizer(nano: Zoo) -> ChatTokenizer:
    """A byte-level tokenizer."""
    return load_chat_tokenizer(str(nano.folder("concise")))


def test_normal_reply() -> None:
    """Pieces are bytes; the endpoint's own draw and its count of tokens are kept."""
    reply = parse(completion(entry("Use", -0.3), entry(" é", -1.5), entry("Try", -2.0)))
    assert reply.prompt_tokens == 10
    assert not reply.has_ended
    (position,) = reply.positions
    assert position.entries == ((Piece(b"Use"), -0.3), (Piece(" é".encode()), -1.5), (Piece(b"Try"), -2.0))
    assert position.drawn == Piece(b"Use")


def test_drawn_token_first_is_sorted() -> None:
    """vLLM's order."""
    found = distribution(completion(entry(" Grab", -3.7), entry(" a", -2.0), entry(" b", -2.2), entry(" c", -3.1)))
    assert [piece.data for piece in found.pieces] == [b" a", b" b", b" c", b" Grab"]


def test_minus_9999_for_the_drawn_token_and_fewer_entries() -> None:
    """OpenAI's thread 2257: the drawn token has no value, the list is of others, and shorter than asked."""
    data = completion(entry("No", -0.2), entry("Maybe", -2.5), entry("Yes", -9999.0), drawn=entry("Yes", -9999.0))
    assert distribution(data).pieces == (Piece(b"No"), Piece(b"Maybe"))
    assert distribution(data).logprobs == (-0.2, -2.5)


def test_null_bytes() -> None:
    """The text counts; a control token that ends answers is END; several join in it."""
    found = distribution(completion(entry("a", -0.5, None), entry("<|im_end|>", -2.0, None), entry("</s>", -2.0, None)))
    assert found.pieces == (Piece(b"a"), END)
    assert found.logprobs[1] == pytest.approx(-2.0 + 0.6931471805599453)


def test_tokens_without_text_are_unseen() -> None:
    """vLLM's "" and Ollama's U+FFFD name no token; half characters with true bytes do, but no text can hold them."""
    data = completion(
        entry("ok", -0.5),
        entry("", -1.5),
        entry("\ufffd", -2.0),
        entry("\\xf0\\x9f", -3.0, b"\xf0\x9f"),
        entry("", -4.0),
    )
    (position,) = parse(data).positions
    assert [piece for piece, _ in position.entries] == [Piece(b"ok"), Piece(b"\xf0\x9f")]
    assert position.num_unreadable == 3
    assert distribution(data).pieces == (Piece(b"ok"),)
    assert distribution(data).tail_mass == pytest.approx(1 - 2.718281828459045**-0.5)


def test_ids_of_vllm(tokenizer: ChatTokenizer) -> None:
    """ "token_id:17" is an id, whatever `bytes` spell, and half characters are told apart."""
    use, half, end = tokenizer.encode_text("Use")[0], 130, min(tokenizer.end_ids)
    entries = [entry(f"token_id:{token}", value) for token, value in ((half, -9.2), (use, -0.5), (end, -2.0))]
    (position,) = parse(completion(*entries), tokenizer).positions
    assert [piece for piece, _ in position.entries] == [tokenizer.piece(half), tokenizer.piece(use), END]
    assert tokenizer.piece(half).data not in (b"", b"token_id:130")
    assert position.num_unreadable == 0


def test_ids_of_llamacpp(tokenizer: ChatTokenizer) -> None:
    """The end has neither text nor bytes; `content` repeats the answer, which is not read."""
    end = min(tokenizer.end_ids)
    entries = [entry("!", -0.4, id=4), entry("", -1.8, id=end)]
    data = completion(*entries, message={"role": "assistant", "content": "Use it!"})
    assert distribution(data, tokenizer).pieces == (tokenizer.piece(4), END)


def test_ids_of_mistral() -> None:
    """Without a tokenizer pieces have the endpoint's ids and bytes, and the end is told by its text."""
    data = completion(entry("a", -0.5, token_id=1), entry("</s>", -1.0, token_id=2))
    assert distribution(data).pieces == (Piece(b"a", 1), END)


def test_bytes_with_a_tokenizer_become_ids(tokenizer: ChatTokenizer) -> None:
    """So that experts behind different APIs can be merged."""
    (letter,) = tokenizer.encode_text("a")
    data = completion(entry("a", -0.5), entry("<|end|>", -1.0, None))
    assert distribution(data, tokenizer).pieces == (Piece(b"a", letter), END)


def test_legacy_shape_in_a_chat() -> None:
    """Together's own: parallel lists."""
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1.5}]}
    assert distribution(completion(logprobs=logprobs)).pieces == (Piece(b"a"), Piece(b"b"))


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"logprobs": None, "message": {"content": ""}},
        {"logprobs": None, "message": {"content": None}},
        {"logprobs": {"content": None, "refusal": None}, "message": {"content": "Use it"}},
        {"logprobs": None, "message": {"content": "Use it"}},
    ],
)
def test_end_without_a_list(choice: dict[str, Any]) -> None:
    """The endpoint drew the end and lists nothing, whether or not it repeats the answer so far."""
    data = completion(finish="stop", **choice)
    assert parse(data, answer="Use it") == Reply((), 10, has_ended=True)
    assert build_from_reply(parse(data, answer="Use it"), num_ids=None, top_k=5, vocab_size=None, expert="e").is_guess


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"logprobs": None}, "finish_reason 'length'"),
        ({"logprobs": None, "finish_reason": "stop", "message": {"content": "Use"}}, "finish_reason 'stop'"),
        ({"logprobs": None, "finish_reason": "content_filter"}, "content_filter"),
        ({"logprobs": {"content": []}}, "without logprobs"),
        ({"logprobs": {"content": None, "refusal": []}}, "without logprobs"),
        ({"logprobs": {"content": [entry("a", -0.1)]}}, "drawn token only"),
        ({"logprobs": {"content": [{**entry("a", -0.1), "top_logprobs": []}]}}, "drawn token only"),
        ({"logprobs": {"tokens": ["a"], "token_logprobs": [-0.1]}}, "drawn token only"),
    ],
)
def test_no_lists_is_an_error_that_says_what_to_do(choice: dict[str, Any], expected: str) -> None:
    """With status 200; a missing field is as null."""
    with pytest.raises(LogprobsUnavailableError, match=expected) as caught:
        parse(completion(**choice), hint="Pin a provider.")
    assert caught.value.expert == "short"
    if "tokens" not in (choice["logprobs"] or {}):
        assert caught.value.hint == "Pin a provider."


@pytest.mark.parametrize(
    ("message", "usage"),
    [
        ({"content": "", "reasoning_content": "Okay"}, {}),
        ({"content": None, "reasoning": "Okay"}, {}),
        ({"content": "<think>"}, {}),
        ({"content": ""}, {"completion_tokens_details": {"reasoning_tokens": 64}}),
    ],
)
@pytest.mark.parametrize("logprobs", [None, {"content": []}, {"content": None}])
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_thoughts_instead_of_an_answer(message: Any, usage: Any, logprobs: Any, finish: str) -> None:
    """Never taken for the end of the answer."""
    data = completion(message=message, logprobs=logprobs, finish=finish) | {"usage": usage}
    with pytest.raises(LogprobsUnavailableError, match="thinks") as caught:
        parse(data)
    assert "enable_thinking" in str(caught.value.hint)


def test_lists_beside_a_reasoning_field_are_read() -> None:
    """A reasoning parser files a continued answer under `reasoning`; its tokens are the answer's all the same."""
    data = completion(entry("Use", -0.5), message={"content": None, "reasoning": "Use"})
    assert distribution(data).pieces == (Piece(b"Use"),)


def test_list_of_a_greedy_scaled_endpoint_is_refused() -> None:
    """DeepSeek at temperature 0: 0 and -9999 only."""
    with pytest.raises(LogprobsUnavailableError, match="temperature of 0"):
        distribution(completion(entry("Use", 0.0), entry("Try", -9999.0), entry("Go", -9999.0)))


GOOD = completion(entry("a", -0.5), entry("b", -1.5))


def damaged(*path: Any, value: Any) -> Any:
    """GOOD with one place replaced."""
    data: Any = copy.deepcopy(GOOD)
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return data


AT = ("choices", 0, "logprobs", "content", 0)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "ok",
        {},
        {"choices": None},
        {"choices": []},
        {"choices": ["a"]},
        {"choices": [*GOOD["choices"], *GOOD["choices"]]},
        damaged("choices", 0, "logprobs", value="yes"),
        damaged("choices", 0, "logprobs", value=[1]),
        damaged("choices", 0, "logprobs", "content", value="a"),
        damaged("choices", 0, "logprobs", "content", value=[None]),
        damaged(*AT, "top_logprobs", value="ab"),
        damaged(*AT, "top_logprobs", value=[None]),
        damaged(*AT, "top_logprobs", 1, "logprob", value="-1.5"),
        damaged(*AT, "top_logprobs", 1, "logprob", value=True),
        damaged(*AT, "top_logprobs", 1, "token", value=5),
        damaged(*AT, "top_logprobs", 1, "bytes", value="YQ=="),
        damaged(*AT, "top_logprobs", 1, "bytes", value=[300]),
        damaged(*AT, "top_logprobs", 1, "bytes", value=["a"]),
        damaged(*AT, "top_logprobs", 1, "token", value="token_id:x"),
        damaged(*AT, "top_logprobs", 1, "token", value="token_id:-3"),
        damaged(*AT, "logprob", value="x"),
    ],
)
def test_wrong_shapes(data: Any) -> None:
    """What is not a chat completion is said to be none, never guessed at."""
    with pytest.raises(MalformedResponseError):
        parse(data)


@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_impossible_numbers(value: float) -> None:
    """No logprob is above 0."""
    with pytest.raises(MalformedResponseError):
        distribution(damaged(*AT, "top_logprobs", 1, "logprob", value=value))
