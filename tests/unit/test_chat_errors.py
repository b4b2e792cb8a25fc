"""The chat adapter against single replies: which error each refusal is, when it asks again, and its settings."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from mope_bb import openai_client, transport
from mope_bb.errors import (
    AuthenticationError,
    ConfigError,
    ContextLengthError,
    LogprobsUnavailableError,
    ModelNotFoundError,
    PrefillError,
    ProviderError,
    RateLimitError,
    RequestError,
    ServerError,
    TopKError,
)
from mope_bb.openai_client import OpenAIClient
from mope_bb.providers.base import Expert
from mope_bb.providers.chat import MAX_DRAWS, ChatExpert, open_expert
from mope_bb.providers.dialects import CHAT
from mope_bb.types import END
from tests.unit.test_chat_bodies import completion, entry
from tests.unit.test_chat_expert import QUESTION, configured, use


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(transport, "_backoff", lambda state: 0.0)


Answer = tuple[int, Any]


def scripted(provider: str, *answers: Answer, **settings: Any) -> tuple[ChatExpert, list[dict[str, Any]]]:
    """An expert whose endpoint gives these answers in turn (the last for ever), and what it was asked."""
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        status, body = answers[min(len(asked), len(answers)) - 1]
        return httpx.Response(status, json=body)

    client = OpenAIClient(
        "http://x/v1", provider=provider, expert="short", max_retries=2, transport=httpx.MockTransport(answer)
    )
    identity = (provider, "http://x/v1 m")
    return ChatExpert("short", client, CHAT[provider], model="m", identity=identity, **settings), asked


def fails(provider: str, *answers: Answer) -> tuple[ProviderError, int]:
    """The error, and how often was asked."""

    async def main() -> tuple[ProviderError, int]:
        expert, _ = scripted(provider, *answers)
        with pytest.raises(ProviderError) as caught:
            await expert.next_tokens(QUESTION, top_k=20)
        await expert.aclose()
        return caught.value, expert.num_requests

    return asyncio.run(main())


def refusal(message: str, **facts: Any) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, **facts}}


NO_LOGPROBS = refusal("Unsupported parameter: 'logprobs' is not supported with this model.", param="logprobs")
NO_PREFILL = refusal(
    "This model does not support assistant message prefill. The conversation must end with a user message."
)
TOO_MANY = refusal("Invalid 'top_logprobs': integer above maximum value. Expected a value <= 20, but got 21 instead.")
TOO_LONG = refusal(
    "This model's maximum context length is 128000 tokens. However, your messages resulted in 128007 tokens.",
    code="context_length_exceeded",
)
UPSTREAM = refusal("Provider returned error", code=400, metadata={"raw": "logprobs is not supported", "provider": "X"})


@pytest.mark.parametrize(
    ("provider", "status", "body", "kind", "said"),
    [
        ("openai", 400, NO_LOGPROBS, LogprobsUnavailableError, 'reasoning_effort = "none"'),
        ("azure", 400, NO_LOGPROBS, LogprobsUnavailableError, 'reasoning_effort = "none"'),
        (
            "openai",
            400,
            refusal("Unsupported value: 'temperature' does not support 0.0 with this model."),
            RequestError,
            'reasoning_effort = "none"',
        ),
        ("openai", 400, refusal("Invalid 'messages[0].role'."), RequestError, "messages"),
        ("chat", 400, NO_LOGPROBS, LogprobsUnavailableError, "vLLM"),
        ("openrouter", 400, UPSTREAM, LogprobsUnavailableError, "logprobs is not supported"),
        ("openrouter", 400, UPSTREAM, LogprobsUnavailableError, 'only = \\["NAME"\\]'),
        ("openrouter", 200, completion(logprobs=None), LogprobsUnavailableError, 'only = \\["NAME"\\]'),
        ("openrouter", 400, NO_PREFILL, PrefillError, "judge"),
        ("mistral", 422, refusal("prefix is not supported for this model"), PrefillError, "judge"),
        ("openai", 400, TOO_MANY, TopKError, "Set top_k = 20"),
        (
            "vllm-chat",
            400,
            refusal("Requested sample logprobs of 21, which is greater than max allowed: 20"),
            TopKError,
            "20",
        ),
        ("openai", 400, TOO_LONG, ContextLengthError, "128007"),
        ("openai", 401, refusal("Incorrect API key provided"), AuthenticationError, "api_key_env"),
        ("openai", 404, refusal("The model `m` does not exist", code="model_not_found"), ModelNotFoundError, "`m`"),
        ("openai", 429, refusal("You exceeded your quota", code="insufficient_quota"), RequestError, "used up"),
        ("deepseek", 402, refusal("Insufficient Balance"), RequestError, "used up"),
    ],
)
def test_refusals(provider: str, status: int, body: Any, kind: type[ProviderError], said: str) -> None:
    """Each is its own error, asked once, and says what to do."""
    error, num_requests = fails(provider, (status, body))
    assert type(error) is kind
    assert num_requests == 1
    assert (error.provider or provider, error.expert) == (provider, "short")
    assert re.search(said, f"{error} {error.hint}")


@pytest.mark.parametrize(
    ("body", "kind", "num_requests"),
    [
        (refusal("Provider returned error", code=502), ServerError, 3),
        (refusal("slow down", code=429), RateLimitError, 3),
        ({"choices": [{"error": {"code": 502, "message": "upstream"}, "message": {"content": ""}}]}, ServerError, 3),
        (refusal("no code"), ServerError, 3),
        (refusal("Insufficient credits", code=402), RequestError, 1),
    ],
)
def test_errors_with_status_200(body: Any, kind: type[ProviderError], num_requests: int) -> None:
    """OpenRouter's, where its upstream fails: classified, and asked again, as if the status said so."""
    error, counted = fails("openrouter", (200, body))
    assert type(error) is kind
    assert counted == num_requests


END_DRAWN = (200, completion(finish="stop"))
LISTED = (200, completion(entry("Use", -0.5), entry("Try", -2.0)))


def test_drawn_end_counts_where_it_is_the_most_probable() -> None:
    """At temperature 1 the end can be drawn anywhere: a second look at temperature 0 decides."""

    async def ended() -> None:
        expert, asked = scripted("deepseek", END_DRAWN)
        found = await expert.next_tokens(QUESTION, top_k=5)
        assert (found.pieces, found.is_guess) == ((END,), True)
        assert [body["temperature"] for body in asked] == [1.0, 0.0]

    async def not_ended() -> None:
        greedy = (200, completion(entry("Use", 0.0), entry("Try", -9999.0)))
        expert, asked = scripted("deepseek", END_DRAWN, greedy, END_DRAWN, LISTED)
        found = await expert.next_tokens(QUESTION, top_k=5)
        assert found.logprobs == (-0.5, -2.0)
        assert [body["temperature"] for body in asked] == [1.0, 0.0, 1.0, 1.0]

    async def never() -> None:
        expert, asked = scripted("deepseek", END_DRAWN, LISTED, END_DRAWN)
        with pytest.raises(LogprobsUnavailableError, match=f"{MAX_DRAWS} times"):
            await expert.next_tokens(QUESTION, top_k=5)
        assert len(asked) == 2 + MAX_DRAWS

    async def at_zero() -> None:
        expert, asked = scripted("chat", END_DRAWN)
        assert (await expert.next_tokens(QUESTION, top_k=5)).is_guess
        assert len(asked) == 1

    for case in (ended, not_ended, never, at_zero):
        asyncio.run(case())


@pytest.mark.parametrize(
    ("provider", "table", "said"),
    [
        ("azure", {"base_url": "https://r.openai.azure.com"}, "`api_version` is missing"),
        ("azure", {"api_version": "2024-10-21"}, "`base_url` is missing"),
        ("openai", {"api_version": "2024-10-21"}, "Azure's"),
        ("llamacpp-chat", {"base_url": "http://x"}, "`tokenizer` is missing"),
        ("chat", {}, "`base_url` is missing"),
        ("openai", {"model": None}, "`model` is missing"),
        ("openai", {"extra_body": {"top_p": 1, "stream": True}}, "must not set 'stream'"),
        ("openai", {"extra_body": {"top_logprobs": 3}}, "must not set 'top_logprobs'"),
        ("chat", {"base_url": "ftp://x"}, r"not an http\(s\) URL"),
    ],
)
def test_settings(provider: str, table: dict[str, Any], said: str) -> None:
    """What is missing or wrong is said before anything is asked."""
    with pytest.raises(ConfigError, match=said):
        open_expert(configured(provider, {"model": "m"} | table), None)


@pytest.mark.parametrize(
    ("provider", "base_url", "expected"),
    [
        ("openai", None, "https://api.openai.com/v1"),
        ("xai", None, "https://api.x.ai/v1"),
        ("openrouter", None, "https://openrouter.ai/api/v1"),
        ("mistral", None, "https://api.mistral.ai/v1"),
        ("deepseek", None, "https://api.deepseek.com/beta"),
        ("openai", "http://proxy/openai/v1/", "http://proxy/openai/v1"),
        ("vllm-chat", "http://x:8000", "http://x:8000/v1"),
        ("vllm-chat", "http://x:8000/v1/", "http://x:8000/v1"),
        ("chat", "https://api.together.ai/v1", "https://api.together.ai/v1"),
        ("chat", "https://open.example/api/paas/v4", "https://open.example/api/paas/v4"),
    ],
)
def test_addresses(provider: str, base_url: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosted APIs have one; a server's is taken as it is, with "/v1" where it has no path."""
    seen: list[str] = []

    class Recorder(OpenAIClient):
        def __init__(self, url: str, **options: Any) -> None:
            seen.append(url)
            super().__init__(url, **options)

    monkeypatch.setattr(openai_client, "OpenAIClient", Recorder)
    config = configured(provider, {"model": "m", "base_url": base_url})

    async def nothing(expert: Expert) -> None:
        assert expert.num_requests == 0

    use(config, nothing)
    assert seen == [expected]
