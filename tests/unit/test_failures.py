"""Which failure becomes which error: exceptions, statuses, and what servers say beside them."""

from __future__ import annotations

import email.utils
import inspect
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import pytest

from mope_bb.errors import (
    AuthenticationError,
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
from mope_bb.failures import classify_status, map_aiohttp_error, map_httpx_error, parse_retry_after

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


EXPECTED_OF_AIOHTTP: dict[str, type[ProviderError]] = {
    "ClientError": RequestError,
    "ClientConnectionError": ProviderConnectionError,
    "ClientConnectionResetError": ProviderConnectionError,
    "ClientConnectorCertificateError": ProviderConnectionError,
    "ClientConnectorDNSError": ProviderConnectionError,
    "ClientConnectorError": ProviderConnectionError,
    "ClientConnectorSSLError": ProviderConnectionError,
    "ClientHttpProxyError": MalformedResponseError,
    "ClientOSError": ProviderConnectionError,
    "ClientPayloadError": ProviderConnectionError,
    "ClientProxyConnectionError": ProviderConnectionError,
    "ClientResponseError": MalformedResponseError,
    "ClientSSLError": ProviderConnectionError,
    "ConnectionTimeoutError": ProviderConnectionError,
    "ContentTypeError": MalformedResponseError,
    "InvalidURL": RequestError,
    "InvalidUrlClientError": RequestError,
    "InvalidUrlRedirectClientError": RequestError,
    "NonHttpUrlClientError": RequestError,
    "NonHttpUrlRedirectClientError": RequestError,
    "RedirectClientError": RequestError,
    "ServerConnectionError": ProviderConnectionError,
    "ServerDisconnectedError": ProviderConnectionError,
    "ServerFingerprintMismatch": ProviderConnectionError,
    "ServerTimeoutError": ProviderTimeoutError,
    "SocketTimeoutError": ProviderTimeoutError,
    "TooManyRedirects": MalformedResponseError,
    "UploadAbortedError": RequestError,
    "WSServerHandshakeError": MalformedResponseError,
}


def client_errors() -> list[type[aiohttp.ClientError]]:
    """Every public exception of aiohttp that a request can raise."""
    found = (getattr(aiohttp, name) for name in aiohttp.__all__)
    return [value for value in found if inspect.isclass(value) and issubclass(value, aiohttp.ClientError)]


@pytest.mark.parametrize("kind", client_errors(), ids=lambda kind: kind.__name__)
def test_every_aiohttp_error_is_mapped(kind: type[aiohttp.ClientError]) -> None:
    """Each exception of aiohttp becomes one specific error, and one that it adds fails here until it is decided."""
    place: Any = SimpleNamespace(host="what", port=1, ssl=True, is_ssl=True, real_url="what")
    arguments: tuple[Any, ...] = ("what",)
    if issubclass(kind, aiohttp.ClientConnectorError | aiohttp.ClientConnectorCertificateError):
        arguments = (place, OSError(1, "what"))
    elif issubclass(kind, aiohttp.ClientResponseError):
        arguments = (place, ())
    elif issubclass(kind, aiohttp.ServerFingerprintMismatch):
        arguments = (b"what", b"else", "x", 1)
    name = kind.__name__
    assert name in EXPECTED_OF_AIOHTTP, f"aiohttp has a new exception {name}: decide what it becomes"
    found, message = map_aiohttp_error(kind(*arguments), "http://x/y")
    assert found is EXPECTED_OF_AIOHTTP[name]
    assert "http://x/y" in message
    assert "what" in message


def test_error_without_a_message_is_named_by_its_class() -> None:
    """Some exceptions are silent; the message then says their class."""
    assert map_aiohttp_error(aiohttp.ClientOSError(), "http://x")[1].endswith("ClientOSError")
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
