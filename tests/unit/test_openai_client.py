"""The openai SDK in our hands: what goes out, what comes back, and that no exception of its own gets through."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import httpx2
import openai
import pytest
from aiohttp import web

from mope_bb import transport
from mope_bb.errors import (
    AuthenticationError,
    BrokenReplyError,
    ConfigError,
    ContextLengthError,
    MalformedResponseError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    RequestError,
    ServerError,
)
from mope_bb.keys import Key
from mope_bb.openai_client import OpenAIClient, _WholeReplies, map_openai_error
from mope_bb.transport import Endpoint
from tests.unit.test_failures import EXPECTED as EXPECTED_OF_HTTPX
from tests.unit.test_failures import exported_errors
from tests.unit.test_transport import Handler, reply, serving, serving_bytes

BODY: dict[str, Any] = {"model": "judge", "messages": [{"role": "user", "content": "Why?"}], "temperature": 0}
COMPLETION: dict[str, Any] = {
    "id": "c-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "é"}, "finish_reason": "stop"}],
    "not in the SDK": [None, 1.5],
}
URL = "http://x/v1/chat/completions"


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once, unless the server asks for a time."""
    monkeypatch.setattr(transport, "_backoff", lambda state: 0.0)


def make_client(url: str, **options: Any) -> OpenAIClient:
    """A client of the expert "short" with 2 retries."""
    return OpenAIClient(url, provider="openai", expert="short", **{"timeout_s": 20.0, "max_retries": 2, **options})


def ask(
    replies: Sequence[Handler], *, body: dict[str, Any] | None = None, path: str = "/v1", **options: Any
) -> tuple[Any, int]:
    """Ask a server whose n-th request is answered by the n-th handler (the last one for ever).

    What came back, a value or a ProviderError, and how many requests the server saw, which is what the client counts.
    """

    async def run() -> tuple[Any, int]:
        seen = 0

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            nonlocal seen
            seen += 1
            return await replies[min(seen, len(replies)) - 1](request)

        async with serving(handler) as url, make_client(url + path, **options) as client:
            try:
                result: Any = await client.chat(body or BODY)
            except ProviderError as error:
                result = error
            assert client.num_requests == seen
            return result, seen

    return asyncio.run(run())


class Requests(list[tuple[str, dict[str, str], Any]]):
    """What a server was asked: path with query, headers in lower case, decoded body."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer with COMPLETION."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.append((request.path_qs, headers, await request.json()))
        return web.json_response(COMPLETION)


def test_the_body_goes_out_and_the_reply_comes_back_as_they_are() -> None:
    """Fields that the SDK does not know, in the request and in the reply, and whatever stands in a message."""
    seen = Requests()
    body = {**BODY, "guided_choice": ["A"], "n": None, "messages": [{"role": "judge", "content": "é", "extra": [1]}]}
    assert ask([seen.handle], body=body) == (COMPLETION, 1)
    [(path, headers, sent)] = seen
    assert (path, headers["content-type"], sent) == ("/v1/chat/completions", "application/json", body)


@pytest.mark.parametrize("path", ["/v1", "/v1/"])
def test_the_base_url_may_end_in_a_slash(path: str) -> None:
    """The address is the same."""
    seen = Requests()
    ask([seen.handle], path=path)
    assert seen[0][0] == "/v1/chat/completions"


def test_only_what_is_configured_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither keys, names and headers from the environment nor facts about this machine."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "AZURE_OPENAI_API_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("AZURE_OPENAI_AD_TOKEN", "secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/elsewhere")
    usual = {"accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}
    cases: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({}, {}),
        ({"api_key": Key("sk-1")}, {"authorization": "Bearer sk-1"}),
        ({"api_version": "v"}, {}),
        ({"api_version": "v", "api_key": Key("sk-1")}, {"api-key": "sk-1"}),
    ]
    for options, keys in cases:
        seen = Requests()
        ask([seen.handle], **options)
        [(_, headers, _)] = seen
        assert {name: value for name, value in headers.items() if name not in usual} == keys
        assert headers["user-agent"] == "mope-bb"


@pytest.mark.parametrize("path", ["", "/", "/openai", "/openai/"])
def test_azure_puts_the_deployment_into_the_path(path: str) -> None:
    """The model of the body is the deployment; the version of the API is in the query."""
    seen = Requests()
    assert ask([seen.handle], path=path, api_version="2026-10-01") == (COMPLETION, 1)
    [(address, _, sent)] = seen
    assert address == "/openai/deployments/judge/chat/completions?api-version=2026-10-01"
    assert sent == BODY


def test_environment_proxies_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for every other endpoint."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert ask([Requests().handle]) == (COMPLETION, 1)


def test_the_sdk_still_accepts_our_client() -> None:
    """The SDK is built on httpx2 and takes an httpx client by a documented exception. When that ends, this fails."""
    mine = httpx.AsyncClient()
    assert not isinstance(mine, httpx2.AsyncClient), "httpx and httpx2 are one again: the cast can go"
    client = make_client("http://x/v1")
    assert isinstance(client._http, _WholeReplies)
    used: object = client._sdk._client
    assert used is client._http, "the SDK sends by a client of its own"
    assert client._sdk.max_retries == 0, "the SDK retries on its own"
    asyncio.run(mine.aclose())
    asyncio.run(client.aclose())
    assert client._sdk.is_closed()


def test_the_sdk_has_our_time_limit() -> None:
    """Not ten minutes, however close ours is to httpx's default, which the SDK takes for none."""

    class Recorder(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(request.extensions["timeout"])
            return httpx.Response(200, json=COMPLETION)

    async def run(timeout_s: float) -> None:
        async with make_client("http://x/v1", timeout_s=timeout_s, transport=Recorder()) as client:
            await client.chat(BODY)

    seen: list[Any] = []
    asyncio.run(run(5.0))
    asyncio.run(run(30.0))
    assert [one["read"] for one in seen] == [5.0, 30.0]
    assert [one["connect"] for one in seen] == [5.0, 5.0]


class Failing(httpx.AsyncBaseTransport):
    """A transport that raises."""

    def __init__(self, build: Callable[[httpx.Request], Exception]) -> None:
        self.build = build
        self.num_requests = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.num_requests += 1
        raise self.build(request)


def raised_by(build: Callable[[httpx.Request], Exception]) -> tuple[ProviderError, int]:
    """What becomes of an exception of the transport, and how often it was asked."""

    async def run() -> tuple[ProviderError, int]:
        failing = Failing(build)
        async with make_client("http://x/v1", transport=failing) as client:
            with pytest.raises(ProviderError) as caught:
                await client.chat(BODY)
        return caught.value, failing.num_requests

    return asyncio.run(run())


@pytest.mark.parametrize("kind", exported_errors(), ids=lambda kind: kind.__name__)
def test_every_httpx_error_comes_through_the_sdk_as_ours(kind: type[httpx.HTTPError]) -> None:
    """The same error as without the SDK, retried as often; it says what happened and where."""

    def build(request: httpx.Request) -> Exception:
        if kind is httpx.HTTPStatusError:
            return httpx.HTTPStatusError("what", request=request, response=httpx.Response(500))
        return kind("what")

    error, num_requests = raised_by(build)
    assert type(error) is EXPECTED_OF_HTTPX[kind]
    assert num_requests == (3 if error.retryable else 1)
    assert (error.provider, error.expert) == ("openai", "short")
    assert URL in error.message
    assert "what" in error.message


REQUEST = httpx2.Request("POST", URL)


def response(status: int, content: bytes = b'{"error": {"message": "what"}}') -> httpx2.Response:
    """A reply as the SDK keeps it."""
    headers = {"x-request-id": "r-7", "retry-after": "3"}
    return httpx2.Response(status, content=content, headers=headers, request=REQUEST)


def status_case(kind: type[openai.APIStatusError], status: int) -> openai.APIStatusError:
    """An exception for a status."""
    return kind("what", response=response(status), body=None)


CASES: dict[type[Exception], tuple[Exception, type[ProviderError]]] = {
    openai.OpenAIError: (openai.OpenAIError("what"), RequestError),
    openai.APIError: (openai.APIError("what", REQUEST, body=None), RequestError),
    openai.APIConnectionError: (
        openai.APIConnectionError(message="what", request=REQUEST),
        ProviderConnectionError,
    ),
    openai.APITimeoutError: (openai.APITimeoutError(REQUEST), ProviderTimeoutError),
    openai.APIResponseValidationError: (
        openai.APIResponseValidationError(response(200), None, message="what"),
        MalformedResponseError,
    ),
    openai.APIStatusError: (status_case(openai.APIStatusError, 418), RequestError),
    openai.BadRequestError: (status_case(openai.BadRequestError, 400), RequestError),
    openai.AuthenticationError: (status_case(openai.AuthenticationError, 401), AuthenticationError),
    openai.OAuthError: (openai.OAuthError(response=response(401), body=None), AuthenticationError),
    openai.PermissionDeniedError: (status_case(openai.PermissionDeniedError, 403), AuthenticationError),
    openai.NotFoundError: (status_case(openai.NotFoundError, 404), RequestError),
    openai.ConflictError: (status_case(openai.ConflictError, 409), ServerError),
    openai.UnprocessableEntityError: (status_case(openai.UnprocessableEntityError, 422), RequestError),
    openai.RateLimitError: (status_case(openai.RateLimitError, 429), RateLimitError),
    openai.InternalServerError: (status_case(openai.InternalServerError, 500), ServerError),
    openai.LengthFinishReasonError: (
        openai.LengthFinishReasonError(completion=openai.types.chat.ChatCompletion.model_construct(usage=None)),
        MalformedResponseError,
    ),
    openai.ContentFilterFinishReasonError: (openai.ContentFilterFinishReasonError(), RequestError),
    openai.InvalidWebhookSignatureError: (openai.InvalidWebhookSignatureError("what"), MalformedResponseError),
    openai.WebSocketConnectionClosedError: (
        openai.WebSocketConnectionClosedError("what", unsent_messages=[]),
        ProviderConnectionError,
    ),
    openai.WebSocketQueueFullError: (openai.WebSocketQueueFullError("what"), RequestError),
}


def exported_openai_errors() -> list[type[Exception]]:
    """Every public exception of the SDK."""
    found = (value for name, value in list(vars(openai).items()) if not name.startswith("_"))
    return [value for value in found if inspect.isclass(value) and issubclass(value, Exception)]


@pytest.mark.parametrize("kind", exported_openai_errors(), ids=lambda kind: kind.__name__)
def test_every_openai_error_is_mapped(kind: type[Exception]) -> None:
    """Each exception of the SDK becomes one specific error; one that it adds fails here until it is decided."""
    assert kind in CASES, f"openai has a new exception {kind.__name__}: decide what it becomes"
    error, expected = CASES[kind]
    found = map_openai_error(error, Endpoint("openai", "short", 1.0, 1.0, 0), URL)
    assert type(found) is expected
    assert (found.provider, found.expert) == ("openai", "short")
    assert URL in found.message
    if isinstance(error, openai.APIStatusError):
        assert (found.status_code, found.request_id, found.retry_after_s) == (error.status_code, "r-7", 3.0)
        assert "what" in found.message


def test_the_sdk_has_no_exceptions_elsewhere() -> None:
    """What its module of exceptions holds is public, but for one about tokens that we do not use."""
    found = {one for one in vars(openai._exceptions).values() if inspect.isclass(one) and issubclass(one, Exception)}
    assert found - set(CASES) == {openai._exceptions.SubjectTokenProviderError}


def test_any_error_of_the_sdk_is_caught() -> None:
    """One that is raised while the SDK sends comes out as ours."""
    error, num_requests = raised_by(lambda request: openai.WebSocketQueueFullError("what"))
    assert (type(error), num_requests) == (RequestError, 1)


@pytest.mark.parametrize(
    ("handler", "expected", "num_requests"),
    [
        (reply(400), RequestError, 1),
        (reply(401), AuthenticationError, 1),
        (reply(403), AuthenticationError, 1),
        (reply(404), RequestError, 1),
        (reply(204, b""), RequestError, 1),
        (reply(307), RequestError, 1),
        (reply(429, b'{"error": {"code": "insufficient_quota"}}'), RequestError, 1),
        (reply(400, b'{"error": {"code": "context_length_exceeded"}}'), ContextLengthError, 1),
        (reply(429, retry_after="0"), RateLimitError, 3),
        (reply(500), ServerError, 3),
        (reply(503), ServerError, 3),
        (reply(200, b""), BrokenReplyError, 3),
        (reply(200, b'{"cut": '), BrokenReplyError, 3),
        (reply(200, gzip.compress(b"[1]" * 9)[:20], content_encoding="gzip"), BrokenReplyError, 3),
        (reply(200, b"<html>hello</html>"), MalformedResponseError, 1),
        (reply(200, b"[1]"), MalformedResponseError, 1),
        (reply(200, b"no gzip at all", content_encoding="gzip"), MalformedResponseError, 1),
    ],
)
def test_replies_that_are_no_completion(handler: Handler, expected: type[ProviderError], num_requests: int) -> None:
    """Each becomes its own error; only what may pass is asked again, and not by the SDK as well."""
    error, seen = ask([handler])
    assert (type(error), seen) == (expected, num_requests)
    assert (error.provider, error.expert) == ("openai", "short")


def test_an_error_says_all_that_is_known() -> None:
    """The server's own words, its request id and the time it asks for."""
    failing = reply(500, b'{"error": {"message": "out of slots"}}', x_request_id="r-7", retry_after="0.5")
    error, _ = ask([failing], max_retries=0)
    assert (error.status_code, error.request_id, error.retry_after_s) == (500, "r-7", 0.5)
    assert "out of slots" in error.message
    assert "/v1/chat/completions answered 500" in error.message


def test_an_unknown_address_gets_its_own_hint() -> None:
    """The address and the model are what is usually wrong."""
    error, _ = ask([reply(404)], path="")
    assert "/v1" in error.hint


def test_after_a_failure_comes_the_reply() -> None:
    """A limit on requests and a broken reply are asked again by our retries."""
    assert ask([reply(429, retry_after="0"), reply(200, b'{"cut'), Requests().handle]) == (COMPLETION, 3)


def test_silence_ends_at_the_deadline_of_a_try_and_at_that_of_the_whole() -> None:
    """A try that is swallowed leaves time for another; a server that never answers costs the deadline."""

    async def hang(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    assert ask([hang, Requests().handle], attempt_timeout_s=0.3) == (COMPLETION, 2)
    error, seen = ask([hang], timeout_s=0.2)
    assert (type(error), seen) == (ProviderTimeoutError, 1)
    assert "within 0.2 s" in error.message


def test_gzip_is_decoded() -> None:
    """A compressed reply is read like any other."""
    packed = gzip.compress(json.dumps(COMPLETION).encode())
    assert ask([reply(200, packed, content_encoding="gzip")]) == (COMPLETION, 1)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_a_reply_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch, encoding: str, status: int) -> None:
    """Neither a long body nor a small one that unpacks to a long one is read to its end, also of an error."""
    monkeypatch.setattr(transport, "MAX_REPLY_BYTES", 10_000)
    body = b"{" + b" " * 1_000_000 + b"}"
    packed = gzip.compress(body) if encoding == "gzip" else body
    error, seen = ask([reply(status, packed, content_encoding=encoding)])
    assert (type(error), seen) == (MalformedResponseError, 1)
    assert "longer than 10000 bytes" in error.message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"220 mail.example ESMTP\r\n\r\n", ProviderError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}", ProviderError),
        (b"", ProviderConnectionError),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"half', ProviderConnectionError),
    ],
    ids=["not HTTP", "bad length", "closed", "closed in body"],
)
def test_broken_connections(data: bytes, expected: type[ProviderError]) -> None:
    """Bytes that are no whole HTTP reply never escape as an exception of a library."""

    async def run() -> None:
        async with serving_bytes(data) as url, make_client(url) as client:
            with pytest.raises(expected):
                await client.chat(BODY)

    asyncio.run(run())


def test_base_url_must_be_http() -> None:
    """An address that is none is an error of the configuration."""
    with pytest.raises(ConfigError, match="base_url"):
        make_client("localhost:80")


@pytest.mark.parametrize(
    "module", ["mope_bb", "mope_bb.transport", "mope_bb.rewards.registry", "mope_bb.rewards.remote"]
)
def test_the_sdk_is_loaded_only_by_those_who_use_it(module: str) -> None:
    """It takes seconds. (That the command line's help does not load it is tested with the command line.)"""
    check = f"import {module}, sys; assert not {{'openai', 'httpx2'}} & set(sys.modules)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
