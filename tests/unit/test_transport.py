"""HTTP: how the client behaves before a server that fails in every way, or that is asked by many at once."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

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
from mope_bb.limits import MAX_RETRY_AFTER_S
from mope_bb.transport import HttpClient


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

    ask([handler], api_key=None if api_key is None else Key(api_key))
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
    assert ask([reply(503, retry_after="7"), reply(503, retry_after_ms="1e8"), reply()])[1] == 3
    assert waits == [7.0, MAX_RETRY_AFTER_S]


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
        (reply(200, b"{}", content_encoding="br"), MalformedResponseError),
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


def test_a_key_and_a_user_name_are_refused() -> None:
    """Both would stand in the same header."""
    with pytest.raises(ConfigError, match="user name"):
        HttpClient("http://me:secret@localhost", provider="p", expert="short", api_key=Key("sk-1"))


def test_many_at_once_wait_for_their_turn() -> None:
    """No more requests, nor connections, at a time than allowed; those that wait succeed as well."""
    peers: set[tuple[str, int]] = set()
    running = most = 0

    async def run() -> None:
        all_there = asyncio.Event()

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            nonlocal running, most
            assert request.transport is not None
            peers.add(request.transport.get_extra_info("peername"))
            running += 1
            most = max(most, running)
            if running == 8:
                all_there.set()
            await all_there.wait()
            running -= 1
            return web.json_response(await request.json())

        async with serving(handler) as url, make_client(url, max_in_flight=8, max_retries=0) as client:
            found = await asyncio.gather(*(client.post_json("/completion", {"n": n}) for n in range(300)))
        assert found == [{"n": n} for n in range(300)]

    asyncio.run(run())
    assert (most, len(peers)) == (8, 8)


def test_retry_after_holds_new_requests_back_until_their_deadline() -> None:
    """After a 429 that asks to wait nobody else is sent meanwhile, and who cannot wait so long is told why."""

    async def run() -> None:
        seen = 0

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            nonlocal seen
            seen += 1
            return await reply(429, retry_after="100")(request)

        async with serving(handler) as url, make_client(url, timeout_s=0.2, max_retries=0) as client:
            with pytest.raises(RateLimitError):
                await client.get_json("/props")
            with pytest.raises(
                ProviderTimeoutError, match=r"could not be asked within 0.2 s.* wait another (100|99) s"
            ):
                await client.get_json("/props")
        assert seen == 1

    asyncio.run(run())


def test_cancellation_frees_the_place() -> None:
    """Of a request under way and of one that waits: the next one is sent."""

    async def run() -> None:
        arrived = asyncio.Event()
        seen = 0

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            nonlocal seen
            seen += 1
            if seen == 1:
                arrived.set()
                await asyncio.Event().wait()
            return web.json_response(seen)

        async with serving(handler) as url, make_client(url, max_in_flight=1) as client:
            asking = asyncio.create_task(client.get_json("/props"))
            await asyncio.wait_for(arrived.wait(), 5)
            waiting, last = (asyncio.create_task(client.get_json("/props")) for _ in range(2))
            await asyncio.sleep(0)
            waiting.cancel()
            asking.cancel()
            assert await last == 2
            assert client.num_requests == 2

    asyncio.run(run())


def test_environment_proxies_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint is the address that the user wrote, whatever the environment says."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask([reply()]) == ({"ok": True}, 1)
