"""SGLang's `/generate`: what is asked, and what replies mean, damaged ones among them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mope_bb.chat_tokenizer import load_chat_tokenizer
from mope_bb.errors import (
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    ModelNotFoundError,
    MopeError,
    ServerError,
)
from mope_bb.providers import sglang
from mope_bb.providers.endpoint import Ask, build_from_reply
from mope_bb.providers.wire import PieceReader, Reply
from mope_bb.types import END, TokenDistribution
from mope_bb.zoo.build import Zoo

# As SGLang 0.5.23 writes it with `return_text_in_logprobs` off.
SGLANG: dict[str, Any] = {
    "text": " x",
    "output_ids": [99],
    "meta_info": {
        "id": "0f3c",
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "cached_tokens": 2,
        "input_token_logprobs": [],
        "input_top_logprobs": [],
        "output_token_logprobs": [[-0.3, 99, None]],
        "output_top_logprobs": [[[-0.3, 99, None], [-2.0, 7, None], [-4.5, 0, None]]],
    },
}


@pytest.fixture(scope="module")
def reader(nano: Zoo) -> PieceReader:
    """Of the zoo's tokenizer: byte-level, one end token, id 0."""
    return PieceReader(load_chat_tokenizer(str(nano.folder("concise"))))


def with_meta(**values: Any) -> dict[str, Any]:
    """SGLang's reply with other `meta_info`; None takes a field away."""
    reply = copy.deepcopy(SGLANG)
    reply["meta_info"] |= values
    reply["meta_info"] = {name: value for name, value in reply["meta_info"].items() if value is not None}
    return reply


def distribution(reply: Reply) -> TokenDistribution:
    """What comes of a reply to three ids."""
    return build_from_reply(reply, num_ids=3, top_k=20, vocab_size=None, expert="e")


def ids_of(found: TokenDistribution) -> list[int | None]:
    """The ids of its pieces."""
    return [piece.token_id for piece in found.pieces]


def test_sglang_is_asked_in_ids() -> None:
    """Greedy, logprobs of the answer only, no texts."""
    assert sglang.build_request([(1, 2, 3)], Ask(20)) == {
        "input_ids": [[1, 2, 3]],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "top_logprobs_num": 20,
        "logprob_start_len": -1,
        "return_text_in_logprobs": False,
    }


def test_sglang_takes_lists_adapters_and_other_draws() -> None:
    """Each prompt is a list of its own; an adapter has a field of its own."""
    body = sglang.build_request([(1,), (2, 3)], Ask(5, num_tokens=4, temperature=0.5), adapter="kind")
    assert body["input_ids"] == [[1], [2, 3]]
    assert body["sampling_params"] == {"max_new_tokens": 4, "temperature": 0.5, **sglang.NOTHING_FILTERED}
    assert body["lora_path"] == "kind"


def test_sglang_scores_from_where_the_draft_begins() -> None:
    """One token earlier, since the first row is always null; the prefix cache is used up to there."""
    body = sglang.build_score_request((1, 2, 3), (7, 8), 5, "kind")
    assert body == sglang.build_request([(1, 2, 3, 7, 8)], Ask(5), adapter="kind") | {"logprob_start_len": 2}


# A draft of the tokens 99 and 7 after two ids of a prompt, scored.
SCORED: dict[str, Any] = {
    "prompt_tokens": 4,
    "input_token_logprobs": [[None, 5, None], [-0.3, 99, None], [-5.0, 7, None]],
    "input_top_logprobs": [None, [[-0.3, 99, None], [-2.0, 7, None]], [[-0.5, 8, None], [-1.5, 0, None]]],
    "output_token_logprobs": [[-0.9, 6, None]],
    "output_top_logprobs": [[[-0.9, 6, None], [-1.1, 8, None]]],
}


def test_sglang_scores(reader: PieceReader) -> None:
    """The rows of the draft's tokens, and that of what comes after it."""
    reply = sglang.parse_scores([with_meta(**SCORED)], (99, 7), reader, expert="e")
    assert reply.prompt_tokens == 4
    lists = [[piece.token_id for piece, _ in position.entries] for position in reply.positions]
    assert lists == [[99, 7], [8, END.token_id], [6, 8]]


@pytest.mark.parametrize(
    ("values", "draft"),
    [
        ({}, (99, 8)),
        ({}, (99,)),
        ({"input_token_logprobs": []}, (99, 7)),
        ({"input_token_logprobs": None}, (99, 7)),
        ({"input_top_logprobs": [None, [[-0.3, 99, None]]]}, (99, 7)),
        ({"input_top_logprobs": [None, None, [[-0.3, 99, None]]]}, (99, 7)),
        ({"input_top_logprobs": None}, (99, 7)),
    ],
)
def test_damaged_scores(values: dict[str, Any], draft: tuple[int, ...], reader: PieceReader) -> None:
    """Rows of other tokens than those that were sent, or none, are malformed."""
    with pytest.raises(MalformedResponseError):
        sglang.parse_scores(with_meta(**{**SCORED, **values}), draft, reader, expert="e")


def test_sglang_reply(reader: PieceReader) -> None:
    """Ids and values as on the wire, the end by its id, and how many tokens were read."""
    reply = sglang.parse_reply(SGLANG, reader, expert="e")
    found = distribution(reply)
    assert ids_of(found) == [99, 7, END.token_id]
    assert found.logprobs == (-0.3, -2.0, -4.5)
    assert (reply.prompt_tokens, reply.has_ended, reply.positions[0].has_ids) == (3, False, True)
    assert reply.positions[0].drawn == found.pieces[0]


def test_sglang_end_is_drawn(reader: PieceReader) -> None:
    """The drawn end has its list like any token."""
    data = with_meta(finish_reason={"type": "stop", "matched": 0}, output_token_logprobs=[[-4.5, 0, None]])
    reply = sglang.parse_reply(data, reader, expert="e")
    assert reply.has_ended
    assert reply.positions[0].drawn == END
    assert not distribution(reply).is_guess


def test_sglang_texts_are_not_read(reader: PieceReader) -> None:
    """A server that writes texts all the same gives the same pieces."""
    data = with_meta(output_top_logprobs=[[[-0.3, 99, "\ufffd"], [-2.0, 7, ""], [-4.5, 0, "<|end|>"]]])
    assert (
        distribution(sglang.parse_reply(data, reader, expert="e")).pieces
        == distribution(sglang.parse_reply(SGLANG, reader, expert="e")).pieces
    )


def test_sglang_value_without_a_number_is_dropped(reader: PieceReader) -> None:
    """Null and the lowest float name no probability; the list is shorter then."""
    data = with_meta(output_top_logprobs=[[[-0.3, 99, None], [None, 7, None], [-3.4028e38, 8, None]]])
    assert ids_of(distribution(sglang.parse_reply(data, reader, expert="e"))) == [99]


def test_sglang_of_old_takes_logprobs_at_zero(reader: PieceReader) -> None:
    """One 0 and sentinels are no distribution."""
    data = with_meta(output_top_logprobs=[[[0.0, 99, None], [-3.4028e38, 7, None]]])
    with pytest.raises(LogprobsUnavailableError, match="temperature of 0"):
        distribution(sglang.parse_reply(data, reader, expert="e"))


@pytest.mark.parametrize(
    "values",
    [
        {"output_top_logprobs": None},
        {"output_token_logprobs": None},
        {"output_top_logprobs": []},
        {"output_top_logprobs": [None]},
    ],
)
def test_sglang_without_lists(values: dict[str, Any], reader: PieceReader) -> None:
    """Missing, empty and null lists are one error."""
    with pytest.raises(LogprobsUnavailableError, match="without lists"):
        sglang.parse_reply(with_meta(**values), reader, expert="e")


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (400, "The input (600 tokens) is longer than the model's context length (512 tokens).", ContextLengthError),
        (503, "The request queue is full.", ServerError),
        (None, "Aborted by the scheduler", ServerError),
    ],
)
def test_sglang_abort(status: int | None, message: str, expected: type[MopeError], reader: PieceReader) -> None:
    """What the scheduler gave up is an error that says why, in its own prompt's place only."""
    aborted = with_meta(finish_reason={"type": "abort", "message": message, "status_code": status})
    found = sglang.parse_response([SGLANG, aborted], reader, 2, expert="e")
    assert isinstance(found[0], Reply)
    assert type(found[1]) is expected
    assert message in str(found[1])


def test_sglang_cut_prompt(reader: PieceReader) -> None:
    """Fewer tokens read than sent: the server cut the prompt."""
    reply = sglang.parse_reply(with_meta(prompt_tokens=2), reader, expert="e")
    with pytest.raises(ContextLengthError, match="2 of 3"):
        distribution(reply)


@pytest.mark.parametrize(
    "reply",
    [
        None,
        [],
        {},
        {"meta_info": None},
        with_meta(prompt_tokens="3"),
        with_meta(prompt_tokens=None),
        with_meta(finish_reason="stop"),
        with_meta(output_top_logprobs=[[[-0.3, 99]]]),
        with_meta(output_top_logprobs=[[[-0.3, "99", None]]]),
        with_meta(output_top_logprobs=[[[-0.3, None, None]]]),
        with_meta(output_top_logprobs=[[[-0.3, -1, None]]]),
        with_meta(output_top_logprobs=[[["-0.3", 99, None]]]),
        with_meta(output_top_logprobs=[[], []]),
        with_meta(output_top_logprobs=[[7]]),
        with_meta(output_top_logprobs=3),
    ],
)
def test_sglang_damaged(reply: Any, reader: PieceReader) -> None:
    """Another shape is malformed, never another exception, and the error names the expert."""
    with pytest.raises(MalformedResponseError) as caught:
        sglang.parse_reply(reply, reader, expert="e")
    assert caught.value.expert == "e"


def test_sglang_replies_are_counted(reader: PieceReader) -> None:
    """One for each prompt; a single one may stand without its list."""
    assert len(sglang.parse_response(SGLANG, reader, 1, expert="e")) == 1
    for data, num_prompts in (([SGLANG], 2), (SGLANG, 2), ("text", 1), ([SGLANG, SGLANG], 1)):
        with pytest.raises(MalformedResponseError, match="expected one for each"):
            sglang.parse_response(data, reader, num_prompts, expert="e")


def test_sglang_adapter_is_known_by_its_parent() -> None:
    """The model itself needs no field; an unknown name is refused with those that are served."""
    models = {"data": [{"id": "m", "root": "m", "parent": None}, {"id": "kind", "root": "/loras/kind", "parent": "m"}]}
    assert sglang.find_adapter(models, "m", expert="e") is None
    assert sglang.find_adapter(models, "kind", expert="e") == "kind"
    with pytest.raises(ModelNotFoundError) as caught:
        sglang.find_adapter(models, "other", expert="e")
    assert caught.value.hint == "Served: m, kind."


def test_sglang_tokenizer_path() -> None:
    """The tokenizer's own path, else the model's; else the server is not SGLang."""
    assert sglang.find_tokenizer_path({"model_path": "m", "tokenizer_path": "t"}, expert="e") == "t"
    assert sglang.find_tokenizer_path({"model_path": "m", "tokenizer_path": None}, expert="e") == "m"
    others: list[Any] = [{}, [], {"model_path": 3}]
    for data in others:
        with pytest.raises(MalformedResponseError, match="names no tokenizer"):
            sglang.find_tokenizer_path(data, expert="e")
