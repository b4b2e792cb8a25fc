"""Text completions on the wire: what is asked in each dialect, and what replies mean, damaged ones among them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.errors import (
    ConfigError,
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    ModelNotFoundError,
    MopeError,
)
from mope_bb.providers.completions import build_request, choose_model, parse_models, parse_response
from mope_bb.providers.dialects import COMPLETIONS
from mope_bb.providers.endpoint import Ask, build_from_reply
from mope_bb.providers.wire import PieceReader, Reply
from mope_bb.types import END, Piece, TokenDistribution
from mope_bb.zoo.build import Zoo


@pytest.fixture(scope="module")
def tokenizer(nano: Zoo) -> ChatTokenizer:
    """The zoo's: byte-level, one end token, id 0."""
    return load_chat_tokenizer(str(nano.folder("concise")))


def one(reply: list[Reply | MopeError]) -> Reply:
    """The only reply; its error is raised."""
    (found,) = reply
    if isinstance(found, MopeError):
        raise found
    return found


def distribution(data: Any, reader: PieceReader, *, top_k: int = 20, num_ids: int | None = 3) -> TokenDistribution:
    """The distribution in the reply to one question."""
    reply = one(parse_response(data, reader, 1, expert="e"))
    return build_from_reply(reply, num_ids=num_ids, top_k=top_k, vocab_size=None, expert="e")


# As vLLM 0.32 and 0.33 write it: the drawn token first where it is not among the best, keys by id.
VLLM: dict[str, Any] = {
    "id": "cmpl-1",
    "object": "text_completion",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "text": "!",
            "finish_reason": "length",
            "stop_reason": None,
            "logprobs": {
                "text_offset": [0],
                "tokens": ["token_id:70"],
                "token_logprobs": [-4.0],
                "top_logprobs": [
                    {
                        "token_id:70": -4.0,
                        "token_id:100": -0.5,
                        "token_id:0": -1.5,
                        "token_id:101": -2.5,
                        "token_id:102": -9999.0,
                    }
                ],
            },
            "prompt_logprobs": None,
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}


def test_request_of_vllm() -> None:
    """Ids in, ids out, greedy so that the drawn token is on the list, and no special token is added or hidden."""
    sent = build_request([[5, 6]], Ask(20), dialect=COMPLETIONS["vllm"], model="lora-a", forced_id=None)
    assert sent == {
        "model": "lora-a",
        "prompt": [5, 6],
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 20,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
    }
    both = build_request([[5, 6], [7]], Ask(3), dialect=COMPLETIONS["vllm"], model="m", forced_id=None)
    assert both["prompt"] == [[5, 6], [7]]


def test_a_draft_of_vllm_is_drawn_from_all_that_the_model_gives() -> None:
    """Its servers take defaults from a model's generation_config; a single question is greedy and needs none."""
    ask = Ask(20, num_tokens=16, temperature=0.7, seed=5)
    sent = build_request([[5, 6]], ask, dialect=COMPLETIONS["vllm"], model="m", forced_id=None)
    expected = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 5}
    expected |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 16, "temperature": 0.7}
    assert {name: sent.get(name) for name in expected} == expected
    unseeded = build_request([[5]], Ask(20, 16, 0.7), dialect=COMPLETIONS["vllm"], model="m", forced_id=None)
    assert "seed" not in unseeded


@pytest.mark.parametrize("provider", ["tensorrt-llm", "completions", "fireworks"])
def test_a_draft_of_which_only_lists_are_used_has_no_foreign_field(provider: str) -> None:
    """What other samplers do there changes the path alone."""
    draft, alone = (
        build_request([[5]], ask, dialect=COMPLETIONS[provider], model="m", forced_id=None)
        for ask in (Ask(5, num_tokens=8, temperature=0.0, seed=5), Ask(5))
    )
    assert draft == alone | {"max_tokens": 8}


def test_request_of_fireworks() -> None:
    """A switch and a number; a context that is too long must be an error."""
    sent = build_request([[5]], Ask(5), dialect=COMPLETIONS["fireworks"], model="m", forced_id=None)
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 5)
    assert sent["context_length_exceeded_behavior"] == "error"
    assert "return_tokens_as_token_ids" not in sent


def test_request_of_tensorrt_llm_has_no_foreign_field() -> None:
    """Its schema refuses fields that it does not know."""
    sent = build_request([[5]], Ask(5), dialect=COMPLETIONS["tensorrt-llm"], model="m", forced_id=None)
    assert set(sent) == {"model", "prompt", "max_tokens", "temperature", "logprobs"}


@pytest.mark.parametrize(("provider", "temperature"), [("deepseek-completions", 1.0), ("together", 0.0)])
def test_requests_in_text_at_the_temperature_that_is_safe(provider: str, temperature: float) -> None:
    """Where logprobs are taken after the temperature, 1 is the one that leaves them as they are."""
    sent = build_request("Hi", Ask(7), dialect=COMPLETIONS[provider], model="m", forced_id=None)
    assert (sent["prompt"], sent["temperature"], sent["logprobs"]) == ("Hi", temperature, 7)


def test_llamacpp_forces_a_harmless_token() -> None:
    """A drawn half character would cost the list."""
    sent = build_request([[5]], Ask(5), dialect=COMPLETIONS["llamacpp-completions"], model="m", forced_id=68)
    assert sent["logit_bias"] == {"68": 100.0}


def test_lists_keyed_by_id(tokenizer: ChatTokenizer) -> None:
    """Pieces come by id with the tokenizer's bytes, END by its id, sentinels leave, the best are kept in order."""
    found = distribution(VLLM, PieceReader(tokenizer))
    assert found.pieces == (tokenizer.piece(100), END, tokenizer.piece(101), tokenizer.piece(70))
    assert found.logprobs == (-0.5, -1.5, -2.5, -4.0)
    # k + 1 entries came; k are the most probable, not the first.
    assert distribution(VLLM, PieceReader(tokenizer), top_k=3).pieces == found.pieces[:3]


def test_the_drawn_token_is_on_the_list_even_where_the_endpoint_leaves_it_out(tokenizer: ChatTokenizer) -> None:
    """Its logprob is known."""
    data = copy.deepcopy(VLLM)
    del data["choices"][0]["logprobs"]["top_logprobs"][0]["token_id:70"]
    assert tokenizer.piece(70) in distribution(data, PieceReader(tokenizer)).pieces


def test_lists_keyed_by_text(tokenizer: ChatTokenizer) -> None:
    """A known tokenizer gives texts their ids; what names no token counts as unseen, not as a token."""
    word = next(p for p in tokenizer.pieces if p.data.isalpha() and len(p.data) > 2)
    data = copy.deepcopy(VLLM)
    data["choices"][0]["logprobs"] |= {
        "tokens": [word.data.decode()],
        "token_logprobs": [-0.5],
        "top_logprobs": [{word.data.decode(): -0.5, "": -2.0, "\ufffd": -2.0, "no such token": -2.5, "<|end|>": -3.0}],
    }
    reply = one(parse_response(data, PieceReader(tokenizer), 1, expert="e"))
    assert [piece for piece, _ in reply.positions[0].entries] == [word, END]
    assert reply.positions[0].num_unreadable == 3
    assert not reply.positions[0].has_ids
    assert distribution(data, PieceReader(tokenizer)).tail_mass == pytest.approx(1 - math.exp(-0.5) - math.exp(-3.0))
    # Without a tokenizer texts are pieces of their own.
    alone = distribution(data, PieceReader(None))
    assert set(alone.pieces) == {Piece(word.data), Piece(b"no such token"), END}


@pytest.mark.parametrize("name", ["id", "token_id"])
def test_the_chat_shape(tokenizer: ChatTokenizer, name: str) -> None:
    """llama.cpp and Fireworks answer with lists of objects; ids count, whatever the text says."""
    entries = [
        {name: 100, "token": "x", "bytes": [120], "logprob": -0.25},
        {name: 0, "token": "", "bytes": [], "logprob": -2.0},
    ]
    data = copy.deepcopy(VLLM)
    data["choices"][0]["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
    assert distribution(data, PieceReader(tokenizer)).pieces == (tokenizer.piece(100), END)
    assert distribution(data, PieceReader(None, end_ids=(0,))).pieces == (Piece(b"x", 100), END)


def test_together_gives_ids_of_the_drawn_tokens_only(tokenizer: ChatTokenizer) -> None:
    """`token_ids` belongs to `tokens`, not to the lists."""
    data = copy.deepcopy(VLLM)
    data["choices"][0]["logprobs"] |= {"tokens": ["?"], "token_ids": [70], "top_logprobs": [{"a": -1.0}]}
    reply = one(parse_response(data, PieceReader(tokenizer), 1, expert="e"))
    assert reply.positions[0].drawn == tokenizer.piece(70)


def damaged(**changes: Any) -> dict[str, Any]:
    """`VLLM` with other `logprobs`."""
    data = copy.deepcopy(VLLM)
    data["choices"][0]["logprobs"] |= changes
    return data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (damaged(top_logprobs=None), LogprobsUnavailableError),
        (damaged(top_logprobs=[None]), None),
        (damaged(top_logprobs=[[]]), MalformedResponseError),
        (damaged(top_logprobs=["a"]), MalformedResponseError),
        (damaged(top_logprobs=[{"token_id:x": -1.0}]), MalformedResponseError),
        (damaged(top_logprobs=[{"token_id:-3": -1.0}]), MalformedResponseError),
        (damaged(top_logprobs=[{"token_id:5": "-1"}]), MalformedResponseError),
        (damaged(top_logprobs=[{"token_id:5": math.nan}]), MalformedResponseError),
        (damaged(top_logprobs=[{"token_id:5": 0.7}]), MalformedResponseError),
        (damaged(top_logprobs=[{}, {}]), MalformedResponseError),
        (damaged(tokens=None), MalformedResponseError),
        (damaged(tokens=[7]), MalformedResponseError),
        (damaged(content="text"), MalformedResponseError),
        (damaged(content=[{"token": "a"}]), MalformedResponseError),
        (damaged(content=[]), LogprobsUnavailableError),
        ({**VLLM, "choices": None}, MalformedResponseError),
        ({**VLLM, "choices": []}, MalformedResponseError),
        ({**VLLM, "choices": [{**VLLM["choices"][0], "index": 1}]}, MalformedResponseError),
        ({**VLLM, "choices": [{**VLLM["choices"][0], "logprobs": None}]}, LogprobsUnavailableError),
        ({**VLLM, "usage": {"prompt_tokens": 2}}, ContextLengthError),
        ({**VLLM, "usage": None}, None),
        ("text", MalformedResponseError),
        ([], MalformedResponseError),
    ],
)
def test_damaged_replies(tokenizer: ChatTokenizer, data: Any, expected: type[MopeError] | None) -> None:
    """Each is the error that says what is wrong; None where the reply can be used all the same."""
    if expected is None:
        assert distribution(data, PieceReader(tokenizer)).pieces
        return
    with pytest.raises(expected) as caught:
        distribution(data, PieceReader(tokenizer))
    assert type(caught.value) is expected


def test_an_answer_that_ends_at_once(tokenizer: ChatTokenizer) -> None:
    """No list, no text, "stop": the end is the most probable piece, and nothing else is known."""
    data = copy.deepcopy(VLLM)
    data["choices"][0] |= {"logprobs": None, "text": "", "finish_reason": "stop"}
    found = distribution(data, PieceReader(tokenizer))
    assert (found.pieces, found.is_guess, found.tail_mass) == ((END,), True, 1.0)


def test_several_prompts_by_their_index(tokenizer: ChatTokenizer) -> None:
    """Choices come in any order; an error in one does not cost the others; one that is missing costs all."""
    first, second = copy.deepcopy(VLLM["choices"][0]), copy.deepcopy(VLLM["choices"][0])
    second |= {"index": 1, "logprobs": None}
    data = {**VLLM, "choices": [second, first], "usage": {"prompt_tokens": 7}}
    replies = parse_response(data, PieceReader(tokenizer), 2, expert="e", num_tokens=7)
    assert isinstance(replies[0], Reply)
    assert isinstance(replies[1], LogprobsUnavailableError)
    with pytest.raises(MalformedResponseError, match="3 prompts"):
        parse_response(data, PieceReader(tokenizer), 3, expert="e")
    with pytest.raises(MalformedResponseError, match="read 7 of 8 tokens"):
        parse_response(data, PieceReader(tokenizer), 2, expert="e", num_tokens=8)


MODELS = {
    "data": [
        {"id": "base", "root": "org/base", "parent": None, "max_model_len": 512},
        {"id": "lora", "root": "/adapters/lora", "parent": "base"},
    ]
}


def test_an_adapter_has_the_tokenizer_and_the_length_of_its_base() -> None:
    """vLLM lists a LoRA adapter with its own folder as root and no length."""
    base, lora = parse_models(MODELS, expert="e")
    assert (lora.name, lora.root, lora.max_length) == ("lora", "org/base", 512)
    assert choose_model([base, lora], "lora", expert="e") is lora


def test_a_model_that_is_not_served_is_named_beside_those_that_are() -> None:
    """Before anything is asked."""
    models = parse_models(MODELS, expert="e")
    with pytest.raises(ModelNotFoundError, match="'other'") as caught:
        choose_model(models, "other", expert="e")
    assert "base, lora" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="`model` is missing") as missing:
        choose_model(models, None, expert="e")
    assert "base, lora" in str(missing.value.hint)
    assert choose_model(models[:1], None, expert="e").name == "base"


@pytest.mark.parametrize("data", [None, {}, {"data": None}, {"data": [{}]}, {"data": ["m"]}])
def test_damaged_lists_of_models(data: Any) -> None:
    """Another server's page is no list of models."""
    with pytest.raises(MalformedResponseError, match="/models"):
        parse_models(data, expert="e")
