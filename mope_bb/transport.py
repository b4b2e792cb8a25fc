"""The one place that speaks HTTP: clients, deadlines, retries, limits and what is counted against a budget.

One retry layer, this one: tenacity in block form with a fresh object per request, entered after a first failure. A
deadline covers a request with all its retries and always wins. `CancelledError` is never retried. Redirects are not
followed: an endpoint is the address that the user wrote.
"""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp
import httpx
import httpx_aiohttp
import orjson
import tenacity

from mope_bb.connections import open_connector
from mope_bb.errors import (
    BrokenReplyError,
    ConfigError,
    MalformedResponseError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    ServerError,
)
from mope_bb.failures import (
    classify_status,
    excerpt,
    map_aiohttp_error,
    map_httpx_error,
    parse_retry_after,
    server_message,
)
from mope_bb.keys import Key, keep_password, keep_secret, redacted, redacted_body
from mope_bb.limits import MAX_IN_FLIGHT, MAX_RETRY_AFTER_S, AdaptiveLimit, Outcome, RequestQueue
from mope_bb.usage import Meter

T = TypeVar("T")
Client = TypeVar("Client", bound=httpx.AsyncClient)
CONNECT_TIMEOUT_S: Final = 5.0
MAX_REPLY_BYTES: Final = 4 * 2**20
"""Of a reply that holds no lists. As Python's objects JSON can take twenty times its own size."""
BYTES_PER_ENTRY: Final = 512
"""Room for one entry of a list: a token of the longest kind as text, as numbers, and its logprob."""
BACKOFF_INITIAL_S: Final = 0.5
BACKOFF_MAX_S: Final = 8.0
_JSON: Final = {"content-type": "application/json"}
_HEADERS: Final = ("content-encoding", "retry-after", "retry-after-ms", "x-request-id")
"""What is read of a reply's headers."""
_GZIP: Final = 31
"""zlib's number for the format of gzip."""


@dataclass(slots=True)
class Endpoint:
    """How long, how often and how much an endpoint is asked, whoever sends the request, and what its failures are."""

    provider: str
    expert: str
    timeout_s: float
    """Deadline of a request with all its retries, the wait for its turn among them."""
    attempt_timeout_s: float
    """Deadline of each try, once it is sent."""
    max_retries: int
    max_in_flight: int = MAX_IN_FLIGHT
    meter: Meter | None = None
    """Counts every request, and the tokens that replies tell."""
    queue: RequestQueue = field(init=False)
    _last_failure: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.queue = RequestQueue(AdaptiveLimit(self.max_in_flight))

    @property
    def is_down(self) -> bool:
        """It has failed several times in a row, and another request would have to wait until it is tried again."""
        return not self.queue.circuit.allows()

    async def run(self, send: Callable[[], Awaitable[T]], *, url: str) -> T:
        """The value of `send()`, which is called again after a retryable ProviderError.

        Raises a ProviderError, and BudgetError before anything is sent that the budget does not allow.
        """
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        try:
            return await self._try(send, url, deadline)
        except TimeoutError:
            raise self._late(url) from None
        except ProviderError as error:
            if not error.retryable or not self.max_retries:
                raise
            failures = [error]
        try:
            async with asyncio.timeout_at(deadline):
                return await retry(partial(self._try, send, url), after=failures, max_retries=self.max_retries)
        except TimeoutError:
            raise self._late(url, f"; the last failure was: {failures[-1].message}") from None

    def _late(self, url: str, cause: str = "") -> ProviderError:
        return self.error(ProviderTimeoutError, f"no complete reply from {url} within {self.timeout_s:g} s{cause}")

    async def _try(self, send: Callable[[], Awaitable[T]], url: str, deadline: float | None = None) -> T:
        """Send once. `deadline` is that of the whole request at the first try; later the caller watches over it.

        Raises a ProviderError, and TimeoutError at `deadline`.
        """
        queue = self.queue
        begun = queue.begin_now()
        if begun is None:
            begun = await self._wait_for_turn(url, deadline)
        outcome, retry_after_s = Outcome.ABANDONED, None
        try:
            if self.meter is not None:
                self.meter.begin_call()
            ends = asyncio.get_running_loop().time() + self.attempt_timeout_s
            # One timer for both deadlines.
            async with asyncio.timeout_at(ends if deadline is None else min(ends, deadline)):
                value = await send()
            outcome = Outcome.SUCCEEDED
            return value
        except RateLimitError as error:
            outcome, retry_after_s = Outcome.THROTTLED, error.retry_after_s
            raise
        except ProviderError as error:
            is_down = isinstance(error, ProviderConnectionError | ProviderTimeoutError | ServerError)
            outcome = Outcome.DOWN if is_down else Outcome.FAILED
            self._last_failure = error.message
            raise
        except TimeoutError:
            outcome = Outcome.DOWN
            self._last_failure = f"{url} did not answer in time"
            if deadline is not None and deadline <= ends:
                raise
            raise self.error(
                ProviderTimeoutError, f"{url} did not answer within {self.attempt_timeout_s:g} s"
            ) from None
        finally:
            queue.end(begun, outcome, retry_after_s)

    async def _wait_for_turn(self, url: str, deadline: float | None) -> int:
        if deadline is None:
            return await self.queue.begin(is_retry=True)
        try:
            async with asyncio.timeout_at(deadline):
                return await self.queue.begin()
        except TimeoutError:
            raise self.error(
                ProviderTimeoutError, f"{url} could not be asked within {self.timeout_s:g} s: {self._obstacle()}"
            ) from None

    def _obstacle(self) -> str:
        """Why requests have to wait."""
        limit, circuit = self.queue.limit, self.queue.circuit
        if circuit.is_open:
            return (
                f"it is down, and tried again every {circuit.break_s:g} s; the last failure was: {self._last_failure}"
            )
        paused = f", and it asked to wait another {limit.pause_s:.0f} s" if limit.pause_s else ""
        return f"{limit.in_flight} other requests are under way{paused}"

    def error(self, kind: type[ProviderError], message: str, **facts: Any) -> ProviderError:
        """An error of this endpoint; `facts` are the further arguments of ProviderError."""
        return kind(message, provider=self.provider, expert=self.expert, **facts)

    def failure(self, error: aiohttp.ClientError | httpx.HTTPError | ReplyTooLongError, url: str) -> ProviderError:
        """What it means that no reply could be read."""
        if isinstance(error, ReplyTooLongError):
            return self.error(MalformedResponseError, f"the reply of {url} is longer than {error.max_bytes} bytes")
        if isinstance(error, httpx.HTTPError):
            return self.error(*map_httpx_error(error, url))
        return self.error(*map_aiohttp_error(error, url))

    def status_error(self, status: int, headers: Mapping[str, str], body: bytes, url: str) -> ProviderError:
        """What a reply means that is not 200; `headers` may be asked for in lower case."""
        kind, hint = classify_status(status, body)
        return self.error(
            kind,
            f"{url} answered {status}: {server_message(body)}",
            hint=hint,
            status_code=status,
            request_id=headers.get("x-request-id"),
            retry_after_s=parse_retry_after(headers),
        )

    def decode(self, body: bytes, url: str) -> Any:
        """The JSON of a good reply, whose tokens are counted. Raises MalformedResponseError."""
        try:
            reply = orjson.loads(body)
            if self.meter is not None:
                self.meter.read(reply)
            return reply
        except orjson.JSONDecodeError as error:
            # What begins as JSON, or not at all, was cut or garbled on its way; anything else is another server's.
            kind = BrokenReplyError if body.lstrip()[:1] in (b"", b"{", b"[") else MalformedResponseError
            raise self.error(kind, f"the reply of {url} is not JSON ({error}): {excerpt(body)!r}") from None


async def retry(
    send: Callable[[], Awaitable[T]],
    *,
    after: list[ProviderError],
    max_retries: int,
    at_once: Callable[[], bool] = lambda: False,
) -> T:
    """The value of `send()`, which failed once: `after` holds that failure, and further ones are added to it.

    Before each try it waits as long as the server asks, else as long as our backoff says; not where `at_once()`.
    """
    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, ProviderError) and error.retryable),
        wait=lambda state: 0.0 if at_once() else _wait_before_retry(state),
        stop=tenacity.stop_after_attempt(max_retries + 1),
        reraise=True,
    ):
        with attempt:
            if attempt.retry_state.attempt_number == 1:
                raise after[0]
            try:
                return await send()
            except ProviderError as error:
                after.append(error)
                raise
    raise AssertionError("tenacity ends with a value or an exception")


class HttpClient:
    """JSON over HTTP to one endpoint. Its errors carry `provider` and `expert`."""

    def __init__(
        self,
        base_url: str,
        *,
        provider: str,
        expert: str,
        api_key: Key | None = None,
        key_header: str | None = None,
        timeout_s: float = 60.0,
        attempt_timeout_s: float = 20.0,
        max_retries: int = 4,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        """`timeout_s` is the deadline of a request with all its retries, `attempt_timeout_s` that of each try.

        `key_header` is the header in which the key stands alone, where it is not "Authorization: Bearer".
        `max_in_flight` is the most requests, and connections, at a time. Raises ConfigError for what is no URL.
        """
        self.provider = provider
        self.expert = expert
        url, credentials = split_credentials(base_url, api_key, key_header)
        self.base_url = url.rstrip("/")
        self.headers = {"accept": "application/json", "user-agent": "mope-bb", "accept-encoding": "gzip", **credentials}
        self._endpoint = Endpoint(provider, expert, timeout_s, attempt_timeout_s, max_retries, max_in_flight)
        self._session: aiohttp.ClientSession | None = None
        self.num_requests = 0
        """Requests sent, retries included."""

    @property
    def is_down(self) -> bool:
        """See `Endpoint.is_down`."""
        return self._endpoint.is_down

    def charge(self, meter: Meter) -> None:
        """Count every request from now on."""
        self._endpoint.meter = meter

    async def get_json(self, path: str) -> Any:
        """GET `path`; the decoded JSON. Raises a ProviderError or BudgetError."""
        return await self._request("GET", path, None, MAX_REPLY_BYTES)

    async def post_json(self, path: str, body: Mapping[str, Any], *, num_entries: int = 0) -> Any:
        """POST `body` as JSON to `path`; the decoded JSON. Raises a ProviderError or BudgetError.

        `num_entries` is how many entries the lists of the reply may have in all: a reply may be longer by them.
        """
        max_bytes = MAX_REPLY_BYTES + num_entries * BYTES_PER_ENTRY
        return await self._request("POST", path, orjson.dumps(body), max_bytes)

    async def _request(self, method: str, path: str, content: bytes | None, max_bytes: int) -> Any:
        url = self.base_url + path
        return await self._endpoint.run(partial(self._send, method, url, content, max_bytes), url=url)

    async def _send(self, method: str, url: str, content: bytes | None, max_bytes: int) -> Any:
        self.num_requests += 1
        session = self._session or self._open_session()
        try:
            response = await session.request(
                method, url, data=content, headers=_JSON if content else None, allow_redirects=False
            )
            try:
                status = response.status
                headers = {name: redacted(response.headers[name]) for name in _HEADERS if name in response.headers}
                body = redacted_body(await _read_body(response, max_bytes))
            finally:
                # Of a reply that was not read to its end it closes the connection; else that is back in the pool.
                response.close()
                # It holds all headers, which may repeat the key, and would be written out with a traceback's locals.
                del response
        except (aiohttp.ClientError, ReplyTooLongError) as error:
            raise self._endpoint.failure(error, url) from None
        if "content-encoding" in headers:
            body = redacted_body(self._unpack(body, headers["content-encoding"], url, max_bytes))
        if status != 200:
            raise self._endpoint.status_error(status, headers, body, url)
        return self._endpoint.decode(body, url)

    def _open_session(self) -> aiohttp.ClientSession:
        """Opened by the first request, since it belongs to the running loop."""
        self._session = aiohttp.ClientSession(
            connector=open_connector(self._endpoint.max_in_flight, is_encrypted=self.base_url.startswith("https:")),
            headers=self.headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            # Requests have their deadlines from `Endpoint`; a host that cannot be reached shall not use them up.
            timeout=aiohttp.ClientTimeout(sock_connect=min(CONNECT_TIMEOUT_S, self._endpoint.timeout_s)),
            auto_decompress=False,  # `_unpack` stops at the limit
        )
        return self._session

    def _unpack(self, body: bytes, encoding: str, url: str, max_bytes: int) -> bytes:
        """The body without its encoding. Raises MalformedResponseError."""
        if encoding.lower() == "identity":
            return body
        try:
            if encoding.lower() != "gzip":
                raise zlib.error(f"{encoding!r} was not asked for")
            unpacked = zlib.decompressobj(_GZIP).decompress(body, max_bytes + 1)
        except zlib.error as error:
            message = f"the reply of {url} cannot be decoded: {error}"
            raise self._endpoint.error(MalformedResponseError, message) from None
        if len(unpacked) > max_bytes:
            raise self._endpoint.failure(ReplyTooLongError(max_bytes), url)
        return unpacked

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body as it was sent. Raises ReplyTooLongError or aiohttp.ClientError."""
    parts: list[bytes] = []
    size = 0
    while part := await response.content.readany():
        size += len(part)
        if size > max_bytes:
            raise ReplyTooLongError(max_bytes)
        parts.append(part)
    return b"".join(parts)


def parse_url(base_url: str) -> httpx.URL:
    """An address of HTTP. Raises ConfigError for anything else."""
    keep_password(base_url)
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"base_url {base_url!r} is not a URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"base_url {base_url!r} is not an http(s) URL", hint='Expected "http://host:port".')
    return url


def split_credentials(base_url: str, key: Key | None, key_header: str | None) -> tuple[str, dict[str, str]]:
    """The address without user name and password, and the headers that these and the key are sent in.

    In an address they would stand in every log. Raises ConfigError for what is no URL, and where both would be in
    `Authorization`.
    """
    url = parse_url(base_url)
    headers: dict[str, str] = {}
    if url.userinfo:
        if key and not key_header:
            raise ConfigError("`base_url` holds a user name, and there is a key as well: both would be `Authorization`")
        encoded = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
        keep_secret(encoded)
        headers["authorization"] = f"Basic {encoded}"
    if key:
        headers |= {key_header: key.reveal()} if key_header else {"authorization": f"Bearer {key.reveal()}"}
    return str(url.copy_with(userinfo=b"")), headers


def build_client(
    base_url: str,
    headers: Mapping[str, str],
    timeout_s: float,
    max_connections: int,
    transport: httpx.AsyncBaseTransport | None,
    *,
    kind: type[Client],
) -> Client:
    """A client of httpx for those who need one, of the class `kind`. Raises ConfigError for what is no URL."""
    url = parse_url(base_url)

    def open_session() -> aiohttp.ClientSession:
        connector = open_connector(max_connections, is_encrypted=url.scheme == "https")
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    return kind(
        base_url=url,
        headers={"accept": "application/json", "user-agent": "mope-bb", **headers},
        # httpx's own connection pool is slow with many requests in flight; aiohttp's is not (docs/design-notes.md).
        transport=transport or httpx_aiohttp.AiohttpTransport(client=open_session),
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
        follow_redirects=False,
        trust_env=False,
    )


class ReplyTooLongError(Exception):
    """A body of more than `max_bytes`; `Endpoint.failure` makes a ProviderError of it."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.max_bytes = max_bytes


async def read_limited(response: httpx.Response) -> bytes:
    """The decoded body of a streamed `response`. Raises ReplyTooLongError, httpx.HTTPError or aiohttp.ClientError."""
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise ReplyTooLongError(MAX_REPLY_BYTES)
        parts.append(part)
    return b"".join(parts)


_backoff = tenacity.wait_random_exponential(multiplier=BACKOFF_INITIAL_S, max=BACKOFF_MAX_S)


def _wait_before_retry(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after_s if isinstance(error, ProviderError) else None
    return min(asked, MAX_RETRY_AFTER_S) if asked is not None else _backoff(state)
