"""HTTP: which failure becomes which error, and how the client behaves before a server that fails in every way."""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from aiohttp import web

from mope_bb import transport
from mope_bb.errors import (
    AuthenticationError,
    BrokenReplyError,
    ConfigError,
    ContextLengthError,
    LogprobsUnavailableError,
    MalformedResponseError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    RequestError,
    ServerError,
)
from mope_bb.transport import HttpClient, classify_status, map_httpx_error, parse_retry_after

EXPECTED: dict[type[httpx.HTTPError], type[ProviderError]] = {
    httpx.HTTPError: RequestError,
    httpx.RequestError: RequestError,
    httpx.TransportError: RequestError,
    httpx.TimeoutException: ProviderTimeoutError,
    httpx.ConnectTimeout: ProviderConnectionError,
    httpx.ReadTimeout: ProviderTimeoutError,
    httpx.WriteTimeout: ProviderTimeoutError,
    httpx.PoolTimeout: ProviderTimeoutError,
    httpx.NetworkError: ProviderConnectionError,
    httpx.ConnectError: ProviderConnectionError,
    httpx.ReadError: ProviderConnectionError,
    httpx.WriteError: ProviderConnectionError,
    httpx.CloseError: ProviderConnectionError,
    httpx.ProtocolError: RequestError,
    httpx.LocalProtocolError: RequestError,
    httpx.RemoteProtocolError: ProviderConnectionError,
    httpx.ProxyError: ProviderConnectionError,
    httpx.UnsupportedProtocol: RequestError,
    httpx.DecodingError: MalformedResponseError,
    httpx.TooManyRedirects: RequestError,
    httpx.HTTPStatusError: RequestError,
}


def exported_errors() -> list[type[httpx.HTTPError]]:
    """Every public exception of httpx that a request can raise."""
    found = (getattr(httpx, name) for name in httpx.__all__)
    return [value for value in found if inspect.isclass(value) and issubclass(value, httpx.HTTPError)]


@pytest.mark.parametrize("kind", exported_errors(), ids=lambda kind: kind.__name__)
def test_every_httpx_error_is_mapped(kind: type[httpx.HTTPError]) -> None:
    """Each exception of httpx becomes one specific error, and one that httpx adds fails here until it is decided."""
    request = httpx.Request("POST", "http://x/y")
    if kind is httpx.HTTPStatusError:
        error: httpx.HTTPError = httpx.HTTPStatusError("what", request=request, response=httpx.Response(500))
    else:
        error = kind("what")
    assert kind in EXPECTED, f"httpx has a new exception {kind.__name__}: decide what it becomes"
    found, message = map_httpx_error(error, "http://x/y")
    assert found is EXPECTED[kind]
    assert "http://x/y" in message
    assert "what" in message


def test_error_without_a_message_is_named_by_its_class() -> None:
    """Some exceptions of httpx are silent; the message then says their class."""
    assert map_httpx_error(httpx.ReadTimeout(""), "http://x")[1].endswith("ReadTimeout")


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, b"", RequestError),
        (401, b"", AuthenticationError),
        (402, b"", RequestError),
        (403, b"", AuthenticationError),
        (404, b"", RequestError),
        (408, b"", ServerError),
        (409, b"", ServerError),
        (413, b"", RequestError),
        (422, b"", RequestError),
        (429, b"slow down", RateLimitError),
        (429, b'{"error": {"code": "insufficient_quota"}}', RequestError),
        (500, b"", ServerError),
        (501, b"", RequestError),
        (502, b"", ServerError),
        (503, b"loading model", ServerError),
        (504, b"", ServerError),
        (529, b"", ServerError),
        (301, b"", RequestError),
        (307, b"", RequestError),
        (204, b"", RequestError),
        (400, b'{"error": {"type": "exceed_context_size_error"}}', ContextLengthError),
        (400, b"This model's maximum context length is 4096 tokens", ContextLengthError),
        (400, b"Input length exceeds the limit", ContextLengthError),
        (400, b"logprobs is not enabled for this model", LogprobsUnavailableError),
        (400, b"logprobs are not supported", LogprobsUnavailableError),
        (403, b"You are not allowed to request logprobs from this model", LogprobsUnavailableError),
        (400, b"\xff\xfe", RequestError),
    ],
)
def test_statuses(status: int, body: bytes, expected: type[ProviderError]) -> None:
    """Each status, with the words of the body where they matter, is one error."""
    assert classify_status(status, body)[0] is expected


NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "-1"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": email.utils.formatdate(NOW + 7, usegmt=True)}, 7.0),
        ({"retry-after": email.utils.formatdate(NOW - 7, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e400"}, None),
        ({"retry-after": "Mon, 99 Foo 2026 99:99:99 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 0001 00:00:00 +2359"}, 0.0),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    """Milliseconds, seconds and dates are read; nonsense is as good as no header; never negative."""
    found = parse_retry_after(httpx.Headers(headers), now=lambda: NOW)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("base_url", ["localhost:80", "ftp://x", "http://", "", "x y", "http://x:port", "http://\x00"])
def test_base_url_must_be_http(base_url: str) -> None:
    """An address that is none is an error of the configuration."""
    with pytest.raises(ConfigError, match="base_url"):
        HttpClient(base_url, provider="p", expert="short")


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A real HTTP server on loopback; its address."""
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    try:
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def serving_bytes(reply: bytes, *, is_reset: bool = False) -> AsyncIterator[str]:
    """A server that answers any request with these bytes and closes, or resets, the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        if is_reset:
            writer.transport.abort()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def make_client(url: str, **options: Any) -> HttpClient:
    """A client of the expert "short" with 2 retries."""
    return HttpClient(url, provider="llamacpp", expert="short", **{"timeout_s": 20.0, "max_retries": 2, **options})


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once, unless the server asks for a time."""
    monkeypatch.setattr(transport, "_backoff", lambda state: 0.0)


def ask(replies: Sequence[Handler], **options: Any) -> tuple[Any, int]:
    """Ask a server whose n-th request is answered by the n-th handler (the last one for ever).

    What came back, a value or a ProviderError, and how many requests the server saw.
    """

    async def run() -> tuple[Any, int]:
        seen = 0

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            nonlocal seen
            seen += 1
            return await replies[min(seen, len(replies)) - 1](request)

        async with serving(handler) as url, make_client(url, **options) as client:
            try:
                result: Any = await client.post_json("/completion", {"prompt": [1, 2]})
            except ProviderError as error:
                result = error
            assert client.num_requests == seen
            return result, seen

    return asyncio.run(run())


def reply(status: int = 200, body: bytes = b'{"ok": true}', **headers: str) -> Handler:
    """A handler that always answers this."""

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=body, headers=named)

    return handler


def test_a_reply_is_decoded_json() -> None:
    """The value of a good reply comes back after one request, which carried the body as JSON."""
    bodies: list[Any] = []

    async def echo(request: web.BaseRequest) -> web.StreamResponse:
        assert request.headers["content-type"] == "application/json"
        bodies.append((request.method, request.path, await request.json()))
        return web.json_response([1, "é"])

    assert ask([echo]) == ([1, "é"], 1)
    assert bodies == [("POST", "/completion", {"prompt": [1, 2]})]


@pytest.mark.parametrize(("api_key", "expected"), [("sk-1", "Bearer sk-1"), (None, None)])
def test_the_key_travels_in_the_header(api_key: str | None, expected: str | None) -> None:
    """The key is a bearer token, and no header without a key."""
    seen: list[str | None] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.headers.get("authorization"))
        return web.json_response(1)

    ask([handler], api_key=api_key)
    assert seen == [expected]


def test_rate_limit_then_success() -> None:
    """After a 429 with Retry-After 0 the same request is sent once more and succeeds."""
    assert ask([reply(429, retry_after="0"), reply()]) == ({"ok": True}, 2)


def test_retry_waits_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's time goes before our own backoff, up to a limit."""
    waits: list[float] = []
    wait = transport._wait_before_retry

    def recorded(state: Any) -> float:
        waits.append(wait(state))
        return 0.0

    monkeypatch.setattr(transport, "_wait_before_retry", recorded)
    assert ask([reply(429, retry_after="7"), reply(503, retry_after_ms="1e8"), reply()])[1] == 3
    assert waits == [7.0, transport.MAX_RETRY_AFTER_S]


@pytest.mark.parametrize(
    "broken",
    [
        reply(200, b""),
        reply(200, b'{"cut": '),
        reply(200, b'{"x": NaN}'),
        reply(200, gzip.compress(b"[1]" * 9)[:20], content_encoding="gzip"),
    ],
)
def test_a_broken_reply_is_asked_for_again(broken: Handler) -> None:
    """What was cut or garbled on its way; if it stays so the error is one of malformed replies."""
    assert ask([broken, reply()]) == ({"ok": True}, 2)
    error, seen = ask([broken], max_retries=1)
    assert (type(error), seen) == (BrokenReplyError, 2)


def test_silence_is_asked_again() -> None:
    """A try that is swallowed ends by its own deadline and leaves time for another."""

    async def swallowed(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(30)
        raise AssertionError("nobody waits for this")

    assert ask([swallowed, reply()], attempt_timeout_s=0.3) == ({"ok": True}, 2)


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_server_errors_until_retries_are_exhausted(max_retries: int) -> None:
    """A server that always fails is asked 1 + max_retries times, and the error says all that is known."""
    failing = reply(500, b'{"error": {"message": "out of slots"}}', x_request_id="r-7")
    error, seen = ask([failing], max_retries=max_retries)
    assert seen == 1 + max_retries
    assert type(error) is ServerError
    assert (error.provider, error.expert, error.status_code, error.request_id) == ("llamacpp", "short", 500, "r-7")
    assert "out of slots" in error.message


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (reply(401), AuthenticationError),
        (reply(400), RequestError),
        (reply(404), RequestError),
        (reply(501), RequestError),
        (reply(400, b"exceeds the available context size"), ContextLengthError),
        (reply(200, b"<html>hello</html>"), MalformedResponseError),
        (reply(200, b'"\xff"'), MalformedResponseError),
        (reply(200, b"no gzip at all", content_encoding="gzip"), MalformedResponseError),
    ],
)
def test_final_errors_are_not_retried(handler: Handler, expected: type[ProviderError]) -> None:
    """What would fail again is asked once."""
    error, seen = ask([handler])
    assert type(error) is expected
    assert seen == 1


def test_redirect_is_not_followed() -> None:
    """A redirect is an error with the advice to write the final address; the other address is never asked."""
    paths: list[str] = []

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        paths.append(request.path)
        return web.Response(status=307, headers={"location": "/elsewhere"})

    error, seen = ask([handler])
    assert type(error) is RequestError
    assert "Redirects are not followed" in str(error.hint)
    assert (paths, seen) == (["/completion"], 1)


def test_gzip_is_decoded() -> None:
    """A compressed reply is read like any other."""
    assert ask([reply(200, gzip.compress(b"[1, 2]"), content_encoding="gzip")]) == ([1, 2], 1)


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_a_reply_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Neither a long body nor a small one that unpacks to a long one is read to its end."""
    monkeypatch.setattr(transport, "MAX_REPLY_BYTES", 10_000)
    body = b"[" + b" " * 1_000_000 + b"]"
    packed = gzip.compress(body) if encoding == "gzip" else body
    error, seen = ask([reply(200, packed, content_encoding=encoding)])
    assert type(error) is MalformedResponseError
    assert "longer than 10000 bytes" in error.message
    assert seen == 1


def test_a_reply_of_the_limit_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit itself is allowed."""
    monkeypatch.setattr(transport, "MAX_REPLY_BYTES", 10_000)
    body = b"[" + b" " * 9_998 + b"]"
    assert ask([reply(200, body)]) == ([], 1)


def test_hang_ends_at_the_deadline() -> None:
    """A server that never answers costs the deadline, and counts as a time-out of this expert."""

    async def hang(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    error, seen = ask([hang], timeout_s=0.2)
    assert type(error) is ProviderTimeoutError
    assert "within 0.2 s" in error.message
    assert error.expert == "short"
    assert seen == 1


def test_deadline_covers_all_retries_and_names_the_last_failure() -> None:
    """Waiting for a retry ends at the deadline too, and the message tells why there was a retry."""
    error, seen = ask([reply(503, b"loading model", retry_after="100")], timeout_s=0.3)
    assert type(error) is ProviderTimeoutError
    assert "loading model" in error.message
    assert seen == 1


FULL = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\ncontent-type: application/json\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "is_reset"),
    [
        (FULL + b'{"half', True),
        (FULL + b'{"half', False),
        (CHUNKED + b"5\r\n[1,2,\r\n", False),
        (b"", False),
        (b"", True),
        (b"HTTP/1.1 20", False),
    ],
    ids=["reset in body", "closed in body", "closed in chunks", "closed", "reset", "closed in status"],
)
def test_broken_connection_is_retried(data: bytes, is_reset: bool) -> None:
    """A connection that breaks before the whole reply is a connection error, and is tried again."""

    async def run() -> None:
        async with serving_bytes(data, is_reset=is_reset) as url, make_client(url) as client:
            with pytest.raises(ProviderConnectionError):
                await client.get_json("/props")
            assert client.num_requests == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    "data",
    [
        b"220 mail.example ESMTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}",
        CHUNKED + b"zz\r\n[]\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n{}",
    ],
    ids=["not HTTP", "bad length", "bad chunk", "huge header"],
)
def test_broken_protocol_is_a_provider_error(data: bytes) -> None:
    """Bytes that are no HTTP reply never escape as an exception of a library."""

    async def run() -> None:
        async with serving_bytes(data) as url, make_client(url) as client:
            with pytest.raises(ProviderError):
                await client.get_json("/props")

    asyncio.run(run())


def test_refused_connection() -> None:
    """A port where nobody listens is a connection error that names the address."""

    async def run() -> None:
        async with serving_bytes(b"") as url:
            pass
        async with make_client(url) as client:
            with pytest.raises(ProviderConnectionError, match=url) as caught:
                await client.get_json("/props")
            assert caught.value.expert == "short"
            assert client.num_requests == 3

    asyncio.run(run())


def test_cancellation_is_not_retried_and_closes_the_connection() -> None:
    """A cancelled request ends at once: no second request, and the server sees the connection close."""

    async def run() -> None:
        num_connections, arrived, closed = 0, asyncio.Event(), asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_connections
            num_connections += 1
            await reader.readuntil(b"\r\n\r\n")
            arrived.set()
            with suppress(ConnectionError):
                await reader.read()
            closed.set()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with make_client(url) as client:
                asking = asyncio.create_task(client.get_json("/props"))
                await asyncio.wait_for(arrived.wait(), 5)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                # The client is still open: it is the request's own connection that is closed.
                await asyncio.wait_for(closed.wait(), 5)
                assert (num_connections, client.num_requests) == (1, 1)

    asyncio.run(run())


def test_environment_proxies_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint is the address that the user wrote, whatever the environment says."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask([reply()]) == ({"ok": True}, 1)
