"""The one place that speaks HTTP: client factory, deadline, retries, limits, and the mapping of failures to our errors.

One retry layer, this one: tenacity in block form with a fresh object per request. A deadline covers a request with all
its retries and always wins. `CancelledError` is never retried. Redirects are not followed: an endpoint is the address
that the user wrote.
"""

from __future__ import annotations

import asyncio
import email.utils
import re
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import httpx
import httpx_aiohttp
import orjson
import tenacity

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

CONNECT_TIMEOUT_S: Final = 5.0
MAX_REPLY_BYTES: Final = 64 * 2**20
MAX_RETRY_AFTER_S: Final = 120.0
BACKOFF_INITIAL_S: Final = 0.5
BACKOFF_MAX_S: Final = 8.0

_CONTEXT = re.compile(
    r"maximum context length|context length|exceeds? the available context|longer than the (model|maximum)"
    r"|exceed_context_size|context_length_exceeded|input length exceeds",
    re.IGNORECASE,
)
_NO_LOGPROBS = re.compile(
    r"logprobs.{0,40}not supported|logprobs is not (enabled|supported)|unsupported parameter: 'logprobs'"
    r"|not allowed to request logprobs",
    re.IGNORECASE,
)
_NO_QUOTA = re.compile(r"insufficient_quota")
_KIND_OF_STATUS: Final[dict[int, type[ProviderError]]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    408: ServerError,
    409: ServerError,
    429: RateLimitError,
    501: RequestError,
}
_REDIRECT_HINT: Final = "Redirects are not followed: write the final address into `base_url`."
_HINT_OF_STATUS: Final = {
    404: "Does `provider` name the software that serves `base_url`, and is `model` right?",
    **dict.fromkeys((301, 302, 303, 307, 308), _REDIRECT_HINT),
}


class HttpClient:
    """JSON over HTTP to one endpoint. Its errors carry `provider` and `expert`."""

    def __init__(
        self,
        base_url: str,
        *,
        provider: str,
        expert: str,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        attempt_timeout_s: float = 20.0,
        max_retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout_s` is the deadline of a request with all its retries, `attempt_timeout_s` that of each try."""
        self.provider = provider
        self.expert = expert
        self._timeout_s = timeout_s
        self._attempt_timeout_s = attempt_timeout_s
        self._max_retries = max_retries
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = _build_client(base_url, headers, timeout_s, transport)
        self.num_requests = 0
        """Requests sent, retries included."""

    async def get_json(self, path: str) -> Any:
        """GET `path`; the decoded JSON. Raises a ProviderError."""
        return await self._request("GET", path, None)

    async def post_json(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST `body` as JSON to `path`; the decoded JSON. Raises a ProviderError."""
        return await self._request("POST", path, orjson.dumps(body))

    async def _request(self, method: str, path: str, content: bytes | None) -> Any:
        last: list[ProviderError] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._with_retries(method, path, content, last)
        except TimeoutError:
            cause = f"; the last failure was: {last[-1].message}" if last else ""
            raise self._error(
                ProviderTimeoutError, f"no complete reply from {self._url(path)} within {self._timeout_s:g} s{cause}"
            ) from None

    async def _with_retries(self, method: str, path: str, content: bytes | None, last: list[ProviderError]) -> Any:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, ProviderError) and error.retryable),
            wait=_wait_before_retry,
            stop=tenacity.stop_after_attempt(self._max_retries + 1),
            reraise=True,
        ):
            with attempt:
                try:
                    return await self._send_once(method, path, content)
                except ProviderError as error:
                    last.append(error)
                    raise
        raise AssertionError("tenacity ends with a value or an exception")

    async def _send_once(self, method: str, path: str, content: bytes | None) -> Any:
        self.num_requests += 1
        try:
            async with asyncio.timeout(self._attempt_timeout_s):
                response, body = await self._exchange(method, path, content)
        except TimeoutError:
            raise self._error(
                ProviderTimeoutError, f"{self._url(path)} did not answer within {self._attempt_timeout_s:g} s"
            ) from None
        if response.status_code != 200:
            raise self._status_error(response, body, path)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            # What begins as JSON, or not at all, was cut or garbled on its way; anything else is another server's.
            kind = BrokenReplyError if body.lstrip()[:1] in (b"", b"{", b"[") else MalformedResponseError
            raise self._error(
                kind, f"the reply of {self._url(path)} is not JSON ({error}): {_excerpt(body)!r}"
            ) from None

    async def _exchange(self, method: str, path: str, content: bytes | None) -> tuple[httpx.Response, bytes]:
        try:
            request = self._client.build_request(
                method, path, content=content, headers={"content-type": "application/json"} if content else None
            )
            response = await self._client.send(request, stream=True)
            try:
                return response, await _read_limited(response)
            finally:
                await response.aclose()
        except aiohttp.ClientError as error:
            # httpx_aiohttp lets those through that have no counterpart in httpx: replies that are not HTTP.
            raise self._error(
                MalformedResponseError,
                f"the reply of {self._url(path)} is not HTTP: {' '.join(str(error).split())[:200]}",
            ) from None
        except httpx.HTTPError as error:
            raise self._error(*map_httpx_error(error, self._url(path))) from None
        except _ReplyTooLongError:
            raise self._error(
                MalformedResponseError, f"the reply of {self._url(path)} is longer than {MAX_REPLY_BYTES} bytes"
            ) from None

    def _status_error(self, response: httpx.Response, body: bytes, path: str) -> ProviderError:
        kind, hint = classify_status(response.status_code, body)
        return self._error(
            kind,
            f"{self._url(path)} answered {response.status_code}: {_server_message(body)}",
            hint=hint,
            status_code=response.status_code,
            request_id=response.headers.get("x-request-id"),
            retry_after_s=parse_retry_after(response.headers),
        )

    def _error(self, kind: type[ProviderError], message: str, **facts: Any) -> ProviderError:
        return kind(message, provider=self.provider, expert=self.expert, **facts)

    def _url(self, path: str) -> str:
        return str(self._client.base_url).rstrip("/") + path

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _build_client(
    base_url: str, headers: Mapping[str, str], timeout_s: float, transport: httpx.AsyncBaseTransport | None
) -> httpx.AsyncClient:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"base_url {base_url!r} is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"base_url {base_url!r} is not an http(s) URL", hint='Expected "http://host:port".')
    return httpx.AsyncClient(
        base_url=url,
        headers={"accept": "application/json", "user-agent": "mope-bb", **headers},
        # httpx's own connection pool is slow with many requests in flight; aiohttp's is not (docs/design-notes.md).
        transport=transport or httpx_aiohttp.AiohttpTransport(limits=httpx.Limits(max_connections=256)),
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
        follow_redirects=False,
        trust_env=False,
    )


class _ReplyTooLongError(Exception):
    pass


async def _read_limited(response: httpx.Response) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise _ReplyTooLongError
        parts.append(part)
    return b"".join(parts)


def map_httpx_error(error: httpx.HTTPError, url: str) -> tuple[type[ProviderError], str]:
    """Which of our errors a transport failure is, and its message."""
    what = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout | httpx.ConnectError):
        return ProviderConnectionError, f"no connection to {url}: {what}"
    if isinstance(error, httpx.TimeoutException):
        return ProviderTimeoutError, f"{url} did not answer in time: {what}"
    if isinstance(error, httpx.NetworkError | httpx.ProxyError | httpx.RemoteProtocolError):
        return ProviderConnectionError, f"the connection to {url} broke: {what}"
    if isinstance(error, httpx.DecodingError):
        return MalformedResponseError, f"the reply of {url} cannot be decoded: {what}"
    return RequestError, f"the request to {url} could not be sent: {what}"


def classify_status(status: int, body: bytes) -> tuple[type[ProviderError], str | None]:
    """Which of our errors an HTTP status is, and a hint where the class's own does not fit."""
    text = body[:4096].decode("utf-8", "replace")
    if status == 402 or (status == 429 and _NO_QUOTA.search(text)):
        return RequestError, "The quota of this key is used up; waiting does not help."
    if status < 500 and _NO_LOGPROBS.search(text):
        return LogprobsUnavailableError, None
    if (kind := _KIND_OF_STATUS.get(status)) is not None:
        return kind, None
    if status >= 500:
        return ServerError, None
    if _CONTEXT.search(text):
        return ContextLengthError, None
    return RequestError, _HINT_OF_STATUS.get(status)


def parse_retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """How long the server asks to wait, in seconds: `retry-after-ms`, or `Retry-After` as seconds or as a date."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return max(0.0, milliseconds / 1000)
    value = headers.get("retry-after")
    if value is None:
        return None
    if (seconds := _number(value)) is not None:
        return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - now())


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < 1e9 else None


_backoff = tenacity.wait_random_exponential(multiplier=BACKOFF_INITIAL_S, max=BACKOFF_MAX_S)


def _wait_before_retry(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after_s if isinstance(error, ProviderError) else None
    return min(asked, MAX_RETRY_AFTER_S) if asked is not None else _backoff(state)


def _server_message(body: bytes) -> str:
    """The human part of an error body: OpenAI's shape, a flat message, or the beginning of the text."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _excerpt(body)
    inner = data.get("error", data) if isinstance(data, dict) else data
    message = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(message)[:300]


def _excerpt(body: bytes) -> str:
    return " ".join(body[:200].decode("utf-8", "replace").split())
