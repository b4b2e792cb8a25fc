"""One token without logprobs: what is asked in each dialect, and which piece a reply means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import ExpertConfig, parse_config
from mope_bb.errors import AlignmentError, ConfigError, MalformedResponseError, MopeError, PrefillError
from mope_bb.failures import classify_status
from mope_bb.pcm.bench import ExpertBench
from mope_bb.providers import chat, completions, ollama, tgi
from mope_bb.providers.dialects import CHAT, COMPLETIONS
from mope_bb.providers.drawing import ONE_DRAW, DrawAsk, piece_of_draw
from mope_bb.providers.registry import DRAWING, PROVIDERS, open_expert
from mope_bb.providers.wire import Reply
from mope_bb.types import END, Message, Piece
from mope_bb.zoo.build import Zoo

BODIES = Path(__file__).parent / "bodies"
USER = Message("user", "Hi")


def recorded(name: str) -> Any:
    """A recorded reply."""
    return json.loads((BODIES / f"{name}.json").read_text(encoding="utf-8"))["reply"]


@pytest.fixture(scope="module")
def tokenizer(nano: Zoo) -> ChatTokenizer:
    """The zoo's: byte-level, one end token, id 0."""
    return load_chat_tokenizer(str(nano.folder("base")))


def drawn(text: str | None, *, has_ended: bool = False, token_ids: tuple[int, ...] | None = None) -> Reply:
    """A reply without lists."""
    return Reply((), has_ended=has_ended, text=text, token_ids=token_ids)


def test_text_is_a_piece(tokenizer: ChatTokenizer) -> None:
    """With a tokenizer the piece has its id; without one it is its bytes, of any script."""
    assert piece_of_draw(drawn(" bike"), None, expert="e") == Piece(b" bike")
    assert piece_of_draw(drawn("\u4f60"), None, expert="e") == Piece("\u4f60".encode())
    found = piece_of_draw(drawn(" bike"), tokenizer, expert="e")
    assert (found.data, tokenizer.encode_text(" bike")) == (b" bike", (found.token_id,))


def test_the_end_is_no_text_and_a_stop(tokenizer: ChatTokenizer) -> None:
    """Or the end token by name, or by id; not what has no text and was cut."""
    for known in (None, tokenizer):
        assert piece_of_draw(drawn("", has_ended=True), known, expert="e") == END
        assert piece_of_draw(drawn(None, has_ended=True), known, expert="e") == END
        with pytest.raises(AlignmentError, match="'e' drew a token without text"):
            piece_of_draw(drawn(""), known, expert="e")
    assert piece_of_draw(drawn("<|end|>", has_ended=True), tokenizer, expert="e") == END
    assert piece_of_draw(drawn("<|im_end|>", has_ended=True), None, expert="e") == END
    assert piece_of_draw(drawn("", token_ids=(0,)), tokenizer, expert="e") == END


def test_ids_tell_half_characters(tokenizer: ChatTokenizer) -> None:
    """vLLM's text of them is empty."""
    half = recorded("vllm_completion_half")
    reply = completions.parse_draw(half, num_tokens=1, expert="e")
    found = piece_of_draw(reply, tokenizer, expert="e")
    assert (found.token_id, reply.text) == (285, "")
    assert found.data not in (b"", found.data.decode(errors="ignore").encode())
    assert (
        piece_of_draw(
            completions.parse_draw(recorded("vllm_completion_end"), num_tokens=1, expert="e"), tokenizer, expert="e"
        )
        == END
    )


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("\ufffd", "drew half a character", "vllm"),
        (" bikebike", "which is not one token", "`tokenizer`"),
        ("\u4f60\u597d", "which is not one token", "cuts off spaces"),
    ],
)
def test_what_cannot_be_told_is_an_error(text: str, message: str, hint: str, tokenizer: ChatTokenizer) -> None:
    """It is never drawn again, which would favour what can be told."""
    with pytest.raises(AlignmentError, match=message) as caught:
        piece_of_draw(drawn(text), tokenizer, expert="e")
    assert hint in str(caught.value.hint)


def test_transformers_serve(tokenizer: ChatTokenizer) -> None:
    """A recorded token and a recorded end; where only one token may be written the end looks like any other."""
    names = ("draw", "draw_end", "draw_hidden_end")
    token, end, hidden = (
        completions.parse_draw(recorded(f"transformers_serve_{name}"), num_tokens=2, expert="e") for name in names
    )
    assert piece_of_draw(token, tokenizer, expert="e").data == b"."
    assert piece_of_draw(end, tokenizer, expert="e") == END
    with pytest.raises(AlignmentError, match="an end that is not told"):
        piece_of_draw(hidden, tokenizer, expert="e")


def test_transformers_serve_is_made_to_sample() -> None:
    """Its own way is greedy, with the filters of the model's generation_config."""
    dialect = COMPLETIONS["transformers"]
    body = completions.build_draw_request("Hi", ONE_DRAW, dialect=dialect, model="m", end_ids={7, 3})
    config = json.loads(body.pop("generation_config"))
    assert body == {"model": "m", "prompt": "Hi", "max_tokens": 2, "temperature": 1.0, "top_p": 1.0}
    assert (config["do_sample"], config["top_k"], config["repetition_penalty"]) == (True, 0, 1.0)
    assert config["forced_eos_token_id"] == config["eos_token_id"] == [3, 7]


@pytest.mark.parametrize("provider", COMPLETIONS)
def test_completions_are_asked_for_one_plain_sample(provider: str) -> None:
    """One token at temperature 1 and top_p 1, nothing filtered, and no field about logprobs."""
    dialect = COMPLETIONS[provider]
    body = completions.build_draw_request([5, 6], ONE_DRAW, dialect=dialect, model="m", end_ids={0})
    assert (body["prompt"], body["temperature"], body["top_p"]) == ([5, 6], 1.0, 1.0)
    assert dialect.nothing_filtered.items() <= body.items()
    assert not any("logprob" in name for name in body)
    assert body.get("return_token_ids", False) is (provider == "vllm")
    assert body["max_tokens"] == (2 if provider == "transformers" else 1)


@pytest.mark.parametrize("provider", CHAT)
def test_chats_are_asked_for_one_plain_sample(provider: str) -> None:
    """As above, whatever `extra_body` says of sampling; its other fields are sent."""
    dialect = CHAT[provider]
    more = {"temperature": 0.2, "top_p": 0.5, "user": "me"}
    body = chat.build_draw_request([USER], "", ONE_DRAW, dialect=dialect, model="m", extra_body=more)
    assert (body["temperature"], body["top_p"], body["user"]) == (1.0, 1.0, "me")
    assert {**dialect.nothing_filtered, **dialect.extra, dialect.max_tokens_field: 1}.items() <= body.items()
    assert not any("logprob" in name for name in body)
    assert body["messages"] == [{"role": "user", "content": "Hi"}]


def test_native_requests_without_lists() -> None:
    """Ollama's filters stay off; TGI refuses a temperature of 0."""
    body = ollama.build_draw_request("Hi", ONE_DRAW, model="m")
    assert not any("logprobs" in name for name in body)
    assert body["options"]["temperature"] == 1.0
    assert ollama.NOTHING_FILTERED.items() <= body["options"].items()
    plain = {"max_new_tokens": 1, "details": True}
    assert tgi.build_draw_request("Hi", ONE_DRAW)["parameters"] == plain | {"do_sample": True, "temperature": 1.0}
    greedy = tgi.build_draw_request("Hi", DrawAsk(2, 0.0))["parameters"]
    assert greedy == {"max_new_tokens": 2, "details": True, "do_sample": False}


def completion(content: str | None, finish: str = "length", **message: Any) -> dict[str, Any]:
    """A chat completion."""
    said = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "message": said, "finish_reason": finish}], "usage": {"completion_tokens": 1}}


def chat_draw(data: Any, provider: str, answer: str = "") -> Reply:
    """What a chat completion says was drawn."""
    return chat.parse_draw(data, dialect=CHAT[provider], num_tokens=1, expert="e", answer=answer)


@pytest.mark.parametrize("provider", ["mistral", "chat"])
def test_a_repeated_answer_is_taken_off(provider: str) -> None:
    """What comes after it was drawn; nothing but the answer and a stop is the end."""
    assert chat_draw(completion("Use it now"), provider, answer="Use it").text == " now"
    ended = chat_draw(completion("Use it", "stop"), provider, answer="Use it")
    assert piece_of_draw(ended, None, expert="e") == END


def test_a_token_that_begins_like_the_answer_stays_whole() -> None:
    """Where it is known that the answer is not repeated."""
    assert chat_draw(completion("Haha"), "vllm-chat", answer="Ha").text == "Haha"


def test_thoughts_and_long_replies_are_no_draws() -> None:
    """A thought is not the answer's next token, and of several tokens the first is not known."""
    with pytest.raises(AlignmentError, match="'e' thinks") as caught:
        chat_draw(completion("", reasoning_content="Hm"), "chat")
    assert "enable_thinking" in str(caught.value.hint)
    with pytest.raises(AlignmentError, match="wrote 16 tokens where 1 was"):
        chat_draw(completion("Use it") | {"usage": {"completion_tokens": 16}}, "chat")
    with pytest.raises(AlignmentError, match="wrote 2 tokens"):
        completions.parse_draw(recorded("transformers_serve_draw"), num_tokens=1, expert="e")


@pytest.mark.parametrize("data", [None, {}, {"choices": []}, {"choices": [{"index": 1}]}])
def test_malformed_draws(data: Any) -> None:
    """A reply in another shape is an error of its own."""
    with pytest.raises(MalformedResponseError):
        completions.parse_draw(data, num_tokens=1, expert="e")
    with pytest.raises(MalformedResponseError):
        tgi.parse_draw(data, expert="e")
    with pytest.raises(MalformedResponseError):
        ollama.parse_draw(data, expert="e")


def configured(provider: str, **more: object) -> ExpertConfig:
    """One expert's configuration."""
    table = {"name": "short", "provider": provider, "base_url": "http://localhost:1/v1", "model": "m", **more}
    return parse_config({"experts": [table]}).experts[0]


@pytest.mark.parametrize("provider", sorted(PROVIDERS.keys() - DRAWING))
def test_adapters_that_always_ask_for_lists(provider: str) -> None:
    """They name the setting."""
    with pytest.raises(ConfigError, match=f"'short': `logprobs` is false, and provider '{provider}'"):
        open_expert(configured(provider, logprobs=False), None)


def test_transformers_serve_without_the_setting() -> None:
    """It gives none, and the hint says how it can be used."""
    with pytest.raises(ConfigError, match="transformers gives no logprobs") as caught:
        open_expert(configured("transformers"), None)
    assert "logprobs = false" in str(caught.value.hint)


@pytest.mark.parametrize("urls", ["http://localhost:1/v1", ["http://localhost:1/v1", "http://localhost:2/v1"]])
def test_capabilities(urls: object) -> None:
    """Neither lists, nor drafts, nor scores, at one address and at several; all else is the dialect's."""
    found = open_expert(configured("chat", logprobs=False, base_url=urls), None).capabilities
    assert (found.gives_lists, found.drafts, found.score) == (False, "none", "none")
    assert found.prefill == CHAT["chat"].capabilities.prefill


def test_a_bench_refuses_it_before_anything_is_opened() -> None:
    """Nothing can be learned from draws; an expert that is not asked for does no harm."""
    experts = [configured("chat", logprobs=False), configured("chat", name="long")]
    config = parse_config({"experts": [expert.model_dump() for expert in experts], "cache": {"enabled": False}})
    with pytest.raises(ConfigError, match="'short' gives no logprobs") as caught:
        ExpertBench(config, {"short", "long"})
    assert isinstance(caught.value, MopeError)
    assert caught.value.exit_code == 2
    ExpertBench(config, {"long"}).close()


def test_a_refused_begun_answer_is_named() -> None:
    """`transformers serve` does not know the flag."""
    body = (BODIES / "transformers_serve_error_prefill.json").read_bytes()
    assert classify_status(422, json.dumps(json.loads(body)["reply"]).encode()) == (PrefillError, None)
