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
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

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
    ModelNotFoundError,
    PrefillError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    RequestError,
    ServerError,
    TopKError,
)

T = TypeVar("T")
Client = TypeVar("Client", bound=httpx.AsyncClient)
CONNECT_TIMEOUT_S: Final = 5.0
MAX_REPLY_BYTES: Final = 64 * 2**20
MAX_RETRY_AFTER_S: Final = 120.0
BACKOFF_INITIAL_S: Final = 0.5
BACKOFF_MAX_S: Final = 8.0

_CONTEXT = re.compile(
    r"maximum context length|context length|exceeds? the available context|longer than the (model|maximum)"
    r"|exceed_context_size|context_length_exceeded|input length exceeds"
    # vLLM's words for a prompt that fills the context to the last token.
    r"|max_tokens must be at least 1, got"
    r"|`inputs` (tokens \+|must have less than)|input token count.{0,20}exceeds",  # TGI, Gemini
    re.IGNORECASE,
)
_NO_LOGPROBS = re.compile(
    r"logprobs.{0,40}not supported|logprobs is not (enabled|supported)|unsupported parameter: 'logprobs'"
    r"|not allowed to request logprobs",
    re.IGNORECASE,
)
_TOP_K = re.compile(
    r"(?:greater than max allowed:?|between \d+ and|<=|less than or equal to|at most|maximum(?: value)?(?: is| of|:)?)"
    r"\s*(\d+)",
    re.IGNORECASE,
)
_PREFILL = re.compile(
    r"does not support assistant message prefill|must end with a user message|cannot set both.{0,80}final_message"
    r"|continue_final_message.{0,60}not compatible"
    r"|(prefix|prefill|continue_final_message).{0,60}(not supported|not allowed|unsupported)",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(
    r"model_not_found|\bmodel\b.{0,200}(does not exist|not found|is not available)|no such model|unknown model"
    r"|invalid model",
    re.IGNORECASE | re.DOTALL,
)
_NO_QUOTA = re.compile(r"insufficient_quota")
_KIND_OF_STATUS: Final[dict[int, type[ProviderError]]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    408: ServerError,
    409: ServerError,
    424: ServerError,  # TGI: the model failed
    429: RateLimitError,
    501: RequestError,
}
_REDIRECT_HINT: Final = "Redirects are not followed: write the final address into `base_url`."
_HINT_OF_STATUS: Final = {
    404: "Does `provider` name the software that serves `base_url`, and is `model` right?",
    **dict.fromkeys((301, 302, 303, 307, 308), _REDIRECT_HINT),
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How long and how often an endpoint is asked, whoever sends the request, and what its failures are."""

    provider: str
    expert: str
    timeout_s: float
    """Deadline of a request with all its retries."""
    attempt_timeout_s: float
    """Deadline of each try."""
    max_retries: int

    async def run(self, send: Callable[[], Awaitable[T]], *, url: str) -> T:
        """The value of `send()`, which is called again after a retryable ProviderError. Raises a ProviderError."""
        last: list[ProviderError] = []
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._with_retries(send, url, last)
        except TimeoutError:
            cause = f"; the last failure was: {last[-1].message}" if last else ""
            raise self.error(
                ProviderTimeoutError, f"no complete reply from {url} within {self.timeout_s:g} s{cause}"
            ) from None

    async def _with_retries(self, send: Callable[[], Awaitable[T]], url: str, last: list[ProviderError]) -> T:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, ProviderError) and error.retryable),
            wait=_wait_before_retry,
            stop=tenacity.stop_after_attempt(self.max_retries + 1),
            reraise=True,
        ):
            with attempt:
                try:
                    return await self._send_once(send, url)
                except ProviderError as error:
                    last.append(error)
                    raise
        raise AssertionError("tenacity ends with a value or an exception")

    async def _send_once(self, send: Callable[[], Awaitable[T]], url: str) -> T:
        try:
            async with asyncio.timeout(self.attempt_timeout_s):
                return await send()
        except TimeoutError:
            raise self.error(
                ProviderTimeoutError, f"{url} did not answer within {self.attempt_timeout_s:g} s"
            ) from None

    def error(self, kind: type[ProviderError], message: str, **facts: Any) -> ProviderError:
        """An error of this endpoint; `facts` are the further arguments of ProviderError."""
        return kind(message, provider=self.provider, expert=self.expert, **facts)

    def failure(self, error: aiohttp.ClientError | httpx.HTTPError | ReplyTooLongError, url: str) -> ProviderError:
        """What it means that no reply could be read."""
        if isinstance(error, ReplyTooLongError):
            message = f"the reply of {url} is longer than {MAX_REPLY_BYTES} bytes"
            return self.error(MalformedResponseError, message)
        if isinstance(error, httpx.HTTPError):
            return self.error(*map_httpx_error(error, url))
        # httpx_aiohttp lets those through that have no counterpart in httpx: replies that are not HTTP.
        what = " ".join(str(error).split())[:200]
        return self.error(MalformedResponseError, f"the reply of {url} is not HTTP: {what}")

    def status_error(self, status: int, headers: Mapping[str, str], body: bytes, url: str) -> ProviderError:
        """What a reply means that is not 200; `headers` may be asked for in lower case."""
        kind, hint = classify_status(status, body)
        return self.error(
            kind,
            f"{url} answered {status}: {_server_message(body)}",
            hint=hint,
            status_code=status,
            request_id=headers.get("x-request-id"),
            retry_after_s=parse_retry_after(headers),
        )

    def decode(self, body: bytes, url: str) -> Any:
        """The JSON of a good reply. Raises MalformedResponseError."""
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            # What begins as JSON, or not at all, was cut or garbled on its way; anything else is another server's.
            kind = BrokenReplyError if body.lstrip()[:1] in (b"", b"{", b"[") else MalformedResponseError
            raise self.error(kind, f"the reply of {url} is not JSON ({error}): {_excerpt(body)!r}") from None


class HttpClient:
    """JSON over HTTP to one endpoint. Its errors carry `provider` and `expert`."""

    def __init__(
        self,
        base_url: str,
        *,
        provider: str,
        expert: str,
        api_key: str | None = None,
        key_header: str | None = None,
        timeout_s: float = 60.0,
        attempt_timeout_s: float = 20.0,
        max_retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout_s` is the deadline of a request with all its retries, `attempt_timeout_s` that of each try.

        `key_header` is the header in which the key stands alone, where it is not "Authorization: Bearer".
        """
        self.provider = provider
        self.expert = expert
        self._endpoint = Endpoint(provider, expert, timeout_s, attempt_timeout_s, max_retries)
        headers: dict[str, str] = {}
        if api_key:
            headers = {key_header: api_key} if key_header else {"authorization": f"Bearer {api_key}"}
        self._client = build_client(base_url, headers, timeout_s, transport, kind=httpx.AsyncClient)
        self.num_requests = 0
        """Requests sent, retries included."""

    async def get_json(self, path: str) -> Any:
        """GET `path`; the decoded JSON. Raises a ProviderError."""
        return await self._request("GET", path, None)

    async def post_json(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST `body` as JSON to `path`; the decoded JSON. Raises a ProviderError."""
        return await self._request("POST", path, orjson.dumps(body))

    async def _request(self, method: str, path: str, content: bytes | None) -> Any:
        url = self._url(path)

        async def send() -> Any:
            self.num_requests += 1
            response, body = await self._exchange(method, path, content)
            if response.status_code != 200:
                raise self._endpoint.status_error(response.status_code, response.headers, body, url)
            return self._endpoint.decode(body, url)

        return await self._endpoint.run(send, url=url)

    async def _exchange(self, method: str, path: str, content: bytes | None) -> tuple[httpx.Response, bytes]:
        try:
            request = self._client.build_request(
                method, path, content=content, headers={"content-type": "application/json"} if content else None
            )
            response = await self._client.send(request, stream=True)
            try:
                return response, await read_limited(response)
            finally:
                await response.aclose()
        except (aiohttp.ClientError, httpx.HTTPError, ReplyTooLongError) as error:
            raise self._endpoint.failure(error, self._url(path)) from None

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


def build_client(
    base_url: str,
    headers: Mapping[str, str],
    timeout_s: float,
    transport: httpx.AsyncBaseTransport | None,
    *,
    kind: type[Client],
) -> Client:
    """The one factory of HTTP clients, of the class `kind`. Raises ConfigError for what is no URL."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"base_url {base_url!r} is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"base_url {base_url!r} is not an http(s) URL", hint='Expected "http://host:port".')
    return kind(
        base_url=url,
        headers={"accept": "application/json", "user-agent": "mope-bb", **headers},
        # httpx's own connection pool is slow with many requests in flight; aiohttp's is not (docs/design-notes.md).
        transport=transport or httpx_aiohttp.AiohttpTransport(limits=httpx.Limits(max_connections=256)),
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
        follow_redirects=False,
        trust_env=False,
    )


class ReplyTooLongError(Exception):
    """A body of more than MAX_REPLY_BYTES; `Endpoint.failure` makes a ProviderError of it."""


async def read_limited(response: httpx.Response) -> bytes:
    """The decoded body of a streamed `response`. Raises ReplyTooLongError, httpx.HTTPError or aiohttp.ClientError."""
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise ReplyTooLongError
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
    if (refused := _refusal(status, text)) is not None:
        return refused
    if (kind := _KIND_OF_STATUS.get(status)) is not None:
        return kind, None
    if status >= 500:
        return ServerError, None
    for pattern, kind in ((_CONTEXT, ContextLengthError), (_NO_MODEL, ModelNotFoundError)):
        if pattern.search(text):
            return kind, None
    return RequestError, _HINT_OF_STATUS.get(status)


def _refusal(status: int, text: str) -> tuple[type[ProviderError], str | None] | None:
    """What the words of a refusal say, where they say more than its status."""
    if status == 402 or (status == 429 and _NO_QUOTA.search(text)):
        return RequestError, "The quota of this key is used up; waiting does not help."
    if status < 500 and _NO_LOGPROBS.search(text):
        return LogprobsUnavailableError, None
    if status in (400, 422):
        if re.search("logprobs|top_n_tokens", text) and (limit := _TOP_K.search(text)):
            return TopKError, f"Set top_k = {limit[1]}, or raise the server's own limit."
        if _PREFILL.search(text):
            return PrefillError, None
    return None


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
    metadata = inner.get("metadata") if isinstance(inner, dict) else None
    # OpenRouter's own message is "Provider returned error"; what the provider said stands here.
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return str(message)[:300] + (f": {raw}"[:300] if raw else "")


def _excerpt(body: bytes) -> str:
    return " ".join(body[:200].decode("utf-8", "replace").split())
