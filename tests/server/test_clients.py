"""Unmodified clients: OpenAI's SDK, sync and async, and curl, on the real zoo."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
from typing import Any

import openai
import pytest

from tests.server.serving import Served, chat_body

ASK: Any = [{"role": "user", "content": "How do I fix a bike?"}]


def test_whole_answer(zoo_server: Served) -> None:
    """What the session itself says for this seed, with exact counts."""
    reply = zoo_server.sdk().chat.completions.create(model="mope:friendly", messages=ASK, seed=3, max_tokens=12)
    own = zoo_server.in_process(conversation=ASK, preference="friendly", seed=3, max_tokens=12)
    choice = reply.choices[0]
    assert (reply.object, choice.message.role, choice.index) == ("chat.completion", "assistant", 0)
    assert (choice.message.content, choice.finish_reason) == (own.text, own.finish_reason)
    assert reply.usage is not None
    counts = (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens)
    assert counts == (own.num_prompt_tokens, len(own.steps), own.num_prompt_tokens + len(own.steps))
    assert reply.model_extra is not None
    assert reply.model_extra["mope"]["weights"] == {"friendly": 1.0}
    assert reply.model_extra["mope"]["seed"] == 3


def test_stream_says_the_same(zoo_server: Served) -> None:
    """The chunks are the whole answer in pieces, one a token, and the last one counts them."""
    options: Any = {"model": "mope:concise", "messages": ASK, "seed": 5, "max_tokens": 16}
    whole = zoo_server.sdk().chat.completions.create(**options)
    stream = zoo_server.sdk().chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert len(chunks) - 2 == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_async_client(zoo_server: Served) -> None:
    """Several at the same time, whole and streamed."""

    async def ask() -> tuple[str | None, str]:
        async with zoo_server.async_sdk() as client:
            options: Any = {"model": "mope", "messages": ASK, "seed": 1, "max_tokens": 6}

            async def streamed() -> str:
                stream = await client.chat.completions.create(**options, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            whole, text = await asyncio.gather(client.chat.completions.create(**options), streamed())
            return whole.choices[0].message.content, text

    whole, text = asyncio.run(ask())
    assert whole == text != ""


def test_several_answers(zoo_server: Served) -> None:
    """`n` answers have the seeds that follow the one given, and the counts of all."""
    client = zoo_server.sdk()
    options: Any = {"model": "mope", "messages": ASK, "max_tokens": 8}
    together = client.chat.completions.create(**options, seed=7, n=3)
    singly = [client.chat.completions.create(**options, seed=seed) for seed in (7, 8, 9)]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in together.choices]
    assert texts == [one.choices[0].message.content for one in singly]
    assert len(set(texts)) > 1
    assert together.usage is not None
    counts = [one.usage.completion_tokens for one in singly if one.usage is not None]
    assert together.usage.completion_tokens == sum(counts)
    stream = client.chat.completions.create(**options, seed=7, n=3, stream=True)
    streamed = ["", "", ""]
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop(zoo_server: Served) -> None:
    """The answer ends before the stop string."""
    options: Any = {"model": "mope", "messages": ASK, "seed": 2, "temperature": 0, "max_tokens": 24}
    free = zoo_server.sdk().chat.completions.create(**options).choices[0].message.content
    assert free is not None
    word = free.split()[2]
    cut = zoo_server.sdk().chat.completions.create(**options, stop=[word, "never"]).choices[0]
    assert cut.message.content == free[: free.index(word)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize("is_streaming", [False, True])
def test_logprobs(zoo_server: Served, *, is_streaming: bool) -> None:
    """Of every token, with the bytes that make up the answer, and the most probable ones beside it."""
    options: Any = {
        "model": "mope:concise,friendly",
        "messages": ASK,
        "seed": 4,
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 4,
    }
    if is_streaming:
        chunks = list(zoo_server.sdk().chat.completions.create(**options, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        found = [entry for chunk in chunks for entry in _content(chunk.choices[0].logprobs)]
        num_tokens = len(chunks) - 1
    else:
        reply = zoo_server.sdk().chat.completions.create(**options)
        text, found = reply.choices[0].message.content or "", list(_content(reply.choices[0].logprobs))
        assert reply.usage is not None
        num_tokens = reply.usage.completion_tokens
    assert len(found) == num_tokens
    assert b"".join(bytes(entry.bytes or ()) for entry in found).decode() == text
    for entry in found:
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert 0 < sum(map(math.exp, tops)) <= 1 + 1e-6
        assert entry.logprob <= tops[0]
        assert len(tops) == 4


def test_logprobs_of_the_end(zoo_server: Served) -> None:
    """The end has an entry as every token: a mixture that is an expert of another one needs it. Ids are told too."""
    request = chat_body(model="mope:concise", seed=0, n=8, max_tokens=200, logprobs=True, top_logprobs=30)
    choices = zoo_server.post("/v1/chat/completions", request).json()["choices"]
    choice = next(choice for choice in choices if choice["finish_reason"] == "stop")
    *tokens, end = choice["logprobs"]["content"]
    assert (end["token"], end["bytes"], end["token_id"]) == ("<end>", [], -1)
    assert all(entry["bytes"] and entry["token_id"] >= 0 for entry in tokens)
    assert all(len(entry["top_logprobs"]) > 15 for entry in tokens)


def _content(logprobs: Any) -> Any:
    return logprobs.content if logprobs is not None else ()


def test_text_completions(zoo_server: Served) -> None:
    """Prompts times n, in the order of OpenAI."""
    options: Any = {"model": "mope:friendly", "max_tokens": 4, "seed": 1}
    client = zoo_server.sdk()
    reply = client.completions.create(**options, prompt=["The bike", "My cake"], n=2, logprobs=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    single = client.completions.create(**options, prompt="My cake")
    assert single.choices[0].text == reply.choices[2].text
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.tokens is not None
    assert "".join(reply.choices[0].logprobs.tokens).startswith(reply.choices[0].text)
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 16
    chunks = list(client.completions.create(**options, prompt="My cake", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == single.choices[0].text


def test_models(zoo_server: Served) -> None:
    """Presets are models, and can be asked."""
    client = zoo_server.sdk()
    names = [model.id for model in client.models.list()]
    assert names[0] == "mope"
    assert "mope:teacher" in names
    assert [client.models.retrieve(name).id for name in (*names, "mope:concise=0.7")] == [*names, "mope:concise=0.7"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    reply = client.chat.completions.create(model="mope:teacher", messages=ASK, max_tokens=2)
    assert reply.model_extra is not None
    assert reply.model_extra["mope"]["weights"] == pytest.approx({"simple": 0.4, "informative": 0.3, "friendly": 0.3})


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "there is no model 'gpt-5'"),
        ({"model": "mope:kind"}, openai.BadRequestError, "'kind' is neither"),
        ({"extra_body": {"preference": {"concise": -1}}}, openai.BadRequestError, "expected 0 or more"),
        ({"extra_body": {"preference": "concise"}, "model": "mope:concise"}, openai.BadRequestError, "both say"),
        ({"extra_body": {"merge": "mean"}}, openai.BadRequestError, "'mean'"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "`frequency_penalty` is not supported"),
        ({"logit_bias": {"3": 1}}, openai.BadRequestError, "`logit_bias` is not supported"),
        ({"n": 9}, openai.BadRequestError, "`n` is 9, at most 8"),
        ({"max_tokens": 4096}, openai.BadRequestError, "at most 2048"),
        ({"max_completion_tokens": 4096}, openai.BadRequestError, "at most 2048"),
        ({"top_logprobs": 3}, openai.BadRequestError, "without `logprobs`"),
        ({"temperature": -1}, openai.UnprocessableEntityError, "temperature"),
        ({"messages": []}, openai.UnprocessableEntityError, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, openai.BadRequestError, "the prompt is empty"),
        ({"extra_body": {"continue_final_message": True}}, openai.BadRequestError, "last message of the assistant"),
    ],
)
def test_errors_are_openais(
    zoo_server: Served, body: dict[str, Any], kind: type[openai.APIStatusError], words: str
) -> None:
    """The SDK raises what it would for OpenAI, and the message says what is wrong."""
    for is_streaming in (False, True):
        with pytest.raises(kind, match=words) as caught:
            zoo_server.sdk().chat.completions.create(
                **{"model": "mope", "messages": ASK, "max_tokens": 2, **body}, stream=is_streaming
            )
        assert caught.value.type == "invalid_request_error"
        assert caught.value.code


def test_harmless_fields_are_ignored(zoo_server: Served) -> None:
    """What agents and front ends send along."""
    extra = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "frequency_penalty": 0,
        "logit_bias": None,
        "x_own": [1],
    }
    assert zoo_server.post("/v1/chat/completions", chat_body(**extra)).status_code == 200


def test_continued_message(zoo_server: Served) -> None:
    """The answer goes on where the last message ends, and does not repeat it."""
    options: Any = {"model": "mope:concise", "temperature": 0, "max_tokens": 12}
    client = zoo_server.sdk()
    choice = client.chat.completions.create(**options, messages=ASK, logprobs=True).choices[0]
    whole, pieces = choice.message.content, _content(choice.logprobs)
    begun = b"".join(bytes(piece.bytes) for piece in pieces[:5]).decode()
    rest = client.chat.completions.create(
        **options,
        messages=[*ASK, {"role": "assistant", "content": begun}],
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    text = rest.choices[0].message.content
    assert text
    assert whole
    assert (begun + text).startswith(whole)


def test_tool_call(zoo_server: Served) -> None:
    """A call that is asked for comes, whole and in pieces, and fits its schema."""
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Graz", "Bern"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    options: Any = {"model": "mope", "messages": ASK, "tools": tools, "tool_choice": "required", "seed": 1}
    reply = zoo_server.sdk().chat.completions.create(**options)
    choice = reply.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Graz", "Bern")
    chunks = list(zoo_server.sdk().chat.completions.create(**options, stream=True))
    deltas: list[Any] = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert [delta.function.name for delta in deltas if delta.function.name] == ["weather"]
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_response_format(zoo_server: Served) -> None:
    """JSON that fits its schema, through the SDK's own helper too."""
    import pydantic

    class Rating(pydantic.BaseModel):
        stars: int = pydantic.Field(ge=1, le=5)

    reply = zoo_server.sdk().chat.completions.parse(model="mope", messages=ASK, response_format=Rating, seed=1)
    parsed = reply.choices[0].message.parsed
    assert parsed is not None
    assert 1 <= parsed.stars <= 5


def curl(*arguments: str) -> str:
    """What curl prints."""
    return subprocess.run(["curl", "-sS", *arguments], check=True, capture_output=True, text=True, timeout=60).stdout


def test_curl(zoo_server: Served) -> None:
    """Whole, and unbuffered as events."""
    url, kind = f"{zoo_server.url}/v1/chat/completions", "Content-Type: application/json"
    whole = json.loads(curl(url, "-H", kind, "-d", json.dumps(chat_body(seed=1))))
    events = curl("-N", url, "-H", kind, "-d", json.dumps(chat_body(seed=1, stream=True))).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
