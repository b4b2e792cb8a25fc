"""OpenAI's chat API and Azure's, through OpenAI's own SDK, with our transport, deadlines, retries and errors.

The SDK says where a request goes and what it looks like. What it would take from the environment (keys, organisation,
further headers), and what it would tell of this machine, stays here: an endpoint gets what the configuration says.
Importing the SDK takes a second or two, so this module is imported by those who open a client, when they open it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self, cast

import aiohttp
import httpx
import openai

from mope_bb.errors import (
    MalformedResponseError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    RequestError,
)
from mope_bb.keys import Key, redacted, redacted_body
from mope_bb.limits import MAX_IN_FLIGHT
from mope_bb.transport import (
    CONNECT_TIMEOUT_S,
    Endpoint,
    ReplyTooLongError,
    build_client,
    read_limited,
    split_credentials,
)
from mope_bb.usage import Meter

OPENAI_URL: Final = "https://api.openai.com/v1"
_NOT_FOUND_HINT: Final = 'Is `model` right, and does `base_url` end where the API begins, such as in "/v1"?'
_UNUSED_KEY: Final = "unused"
"""With a key, whichever, the SDK does not look for one in the environment; `_WholeReplies` sends our own."""
_FORWARDED: Final = ("host", "content-type", "content-length")
"""What the SDK's requests keep of their headers."""
_READ: Final = ("content-type", "retry-after", "retry-after-ms", "x-request-id")
"""What is read of a reply's headers."""
_KINDS: Final[tuple[tuple[type[Exception], type[ProviderError]], ...]] = (
    (openai.APITimeoutError, ProviderTimeoutError),
    (openai.APIConnectionError, ProviderConnectionError),
    (openai.WebSocketConnectionClosedError, ProviderConnectionError),
    (openai.APIResponseValidationError, MalformedResponseError),
    (openai.LengthFinishReasonError, MalformedResponseError),
    (openai.InvalidWebhookSignatureError, MalformedResponseError),
)
"""The first that fits counts; whatever else the SDK raises is a request that was refused or could not be made."""


class _WholeReplies(httpx.AsyncClient):
    """Our client in the SDK's hands: our headers only, and no reply longer than the limit."""

    num_requests = 0

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send `request` and read the reply. Raises httpx.HTTPError, aiohttp.ClientError or ReplyTooLongError."""
        self.num_requests += 1
        kept = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        # A copy, since the SDK reads in the headers of its own request what it wants to do with the reply.
        sent = httpx.Request(
            request.method,
            request.url,
            headers={**self.headers, **kept},
            content=await request.aread(),
            extensions=request.extensions,
        )
        # The SDK asks for the whole reply (stream=False), of any length: it gets one that is read already.
        response = await super().send(sent, **{**options, "stream": True})
        try:
            body = redacted_body(await read_limited(response))
        finally:
            await response.aclose()
        # The SDK logs what it gets, and an endpoint may repeat the key in its headers.
        kept_headers = {name: redacted(response.headers[name]) for name in _READ if name in response.headers}
        return httpx.Response(response.status_code, headers=kept_headers, content=body, request=request)


class OpenAIClient:
    """Chat completions of one endpoint. Its errors carry `provider` and `expert`."""

    def __init__(
        self,
        base_url: str = OPENAI_URL,
        *,
        provider: str,
        expert: str,
        api_key: Key | None = None,
        api_version: str | None = None,
        timeout_s: float = 60.0,
        attempt_timeout_s: float = 20.0,
        max_retries: int = 4,
        max_in_flight: int = MAX_IN_FLIGHT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout_s` is the deadline of a request with all its retries, `attempt_timeout_s` that of each try.

        `max_in_flight` is the most requests, and connections, at a time. Without `api_version`, `base_url` is what
        "/chat/completions" is added to. With it, `base_url` is that of an Azure resource, and `model` in a body is the
        name of a deployment. Raises ConfigError for what is no URL.
        """
        self._endpoint = Endpoint(provider, expert, timeout_s, attempt_timeout_s, max_retries, max_in_flight)
        base_url, headers = split_credentials(base_url, api_key, "api-key" if api_version else None)
        base_url = base_url.rstrip("/")
        self._url = f"{base_url}/chat/completions"
        self._http = build_client(base_url, headers, timeout_s, max_in_flight, transport, kind=_WholeReplies)
        # The SDK's types name httpx2, its successor of httpx, but an httpx.AsyncClient is documented to be accepted.
        # test_openai_client.py fails when that ends.
        http_client = cast("Any", self._http)
        # Not the SDK's ten minutes; one retry layer, ours.
        timeout = openai.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        if api_version is None:
            self._sdk = openai.AsyncOpenAI(
                base_url=base_url, api_key=_UNUSED_KEY, http_client=http_client, timeout=timeout, max_retries=0
            )
        else:
            self._sdk = openai.AsyncAzureOpenAI(
                azure_endpoint=base_url.removesuffix("/openai"),
                api_version=api_version,
                api_key=_UNUSED_KEY,
                http_client=http_client,
                timeout=timeout,
                max_retries=0,
            )

    @property
    def num_requests(self) -> int:
        """Requests sent, retries included."""
        return self._http.num_requests

    @property
    def is_down(self) -> bool:
        """See `Endpoint.is_down`."""
        return self._endpoint.is_down

    def charge(self, meter: Meter) -> None:
        """Count every request from now on."""
        self._endpoint.meter = meter

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST one chat completion, not streamed; the JSON of the reply as it was on the wire. Raises a ProviderError.

        `body` needs "messages" and "model"; all its fields are sent as they are, also those the SDK does not know.
        """
        found = await self._endpoint.run(lambda: self._send(body), url=self._url)
        if isinstance(found, dict):
            return found
        message = f"the reply of {self._url} is {type(found).__name__}, expected a JSON object"
        raise self._endpoint.error(MalformedResponseError, message)

    async def _send(self, body: Mapping[str, Any]) -> Any:
        try:
            # The SDK would read the fields that it knows by its own types; those in extra_body it lets be.
            reply = await self._sdk.chat.completions.with_raw_response.create(
                messages=[], model=body["model"], extra_body=dict(body)
            )
        except (aiohttp.ClientError, httpx.HTTPError, ReplyTooLongError) as error:
            raise self._endpoint.failure(error, self._url) from None
        except openai.OpenAIError as error:
            raise map_openai_error(error, self._endpoint, self._url) from None
        if reply.status_code != 200:
            raise self._endpoint.status_error(reply.status_code, reply.headers, reply.content, self._url)
        found = self._endpoint.decode(reply.content, self._url)
        if (status := _status_within(found)) is not None:
            raise self._endpoint.status_error(status, reply.headers, reply.content, self._url)
        return found

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _status_within(data: Any) -> int | None:
    """The status of an error that came with 200: OpenRouter's, where an upstream fails."""
    if not isinstance(data, dict):
        return None
    choices = data.get("choices")
    places = [data, choices[0] if isinstance(choices, list) and choices else None]
    for place in places:
        error = place.get("error") if isinstance(place, dict) else None
        if isinstance(error, dict):
            code = error.get("code")
            return code if type(code) is int and 400 <= code < 600 else 500
    return None


def map_openai_error(error: Exception, endpoint: Endpoint, url: str) -> ProviderError:
    """Which of our errors an exception of the SDK is; a failure of the transport is told by what caused it."""
    if isinstance(error, openai.APIStatusError):
        response = error.response
        found = endpoint.status_error(response.status_code, response.headers, response.content, url)
        if response.status_code == 404 and type(found) is RequestError:
            found.hint = _NOT_FOUND_HINT
        return found
    if isinstance(error, openai.APIConnectionError) and isinstance(error.__cause__, httpx.HTTPError):
        return endpoint.failure(error.__cause__, url)
    what = str(error) or type(error).__name__
    kind = next((ours for theirs, ours in _KINDS if isinstance(error, theirs)), RequestError)
    return endpoint.error(kind, f"the request to {url} failed: {what}")
