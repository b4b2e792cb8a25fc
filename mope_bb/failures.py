"""What it means that a request failed: exceptions of aiohttp and httpx, statuses and the words beside them.

Pure: nothing is sent here, and nothing is raised.
"""

from __future__ import annotations

import email.utils
import re
import reprlib
import time
from collections.abc import Callable, Mapping
from typing import Final

import aiohttp
import httpx
import orjson

from mope_bb.errors import (
    AuthenticationError,
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
from mope_bb.keys import redacted


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redacted(x), level)


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
    r"|continue_final_message.{0,60}not compatible|unexpected fields.{0,300}continue_final_message"
    r"|(prefix|prefill|continue_final_message).{0,60}(not supported|not allowed|unsupported)",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(
    r"model_not_found|\bmodel\b.{0,200}(does not exist|not found|is not available)|no such model|unknown model"
    r"|invalid model",
    re.IGNORECASE | re.DOTALL,
)
_SHORT: Final = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 4, 100, 200
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


def map_aiohttp_error(error: aiohttp.ClientError, url: str) -> tuple[type[ProviderError], str]:
    """Which of our errors a failure of aiohttp is, and its message."""
    what = readable(str(error), 200) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return ProviderConnectionError, f"no connection to {url}: {what}"
    if isinstance(error, aiohttp.ServerTimeoutError):
        return ProviderTimeoutError, f"{url} did not answer in time: {what}"
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError):
        return ProviderConnectionError, f"the connection to {url} broke: {what}"
    if isinstance(error, aiohttp.ClientResponseError):
        return MalformedResponseError, f"the reply of {url} is not HTTP: {what}"
    return RequestError, f"the request to {url} could not be sent: {what}"


def map_httpx_error(error: httpx.HTTPError, url: str) -> tuple[type[ProviderError], str]:
    """Which of our errors a failure of httpx is, and its message."""
    what = readable(str(error), 200) or type(error).__name__
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
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
    except (ValueError, OverflowError):  # no date, or one that no clock reaches
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < 1e9 else None


def server_message(body: bytes) -> str:
    """The human part of an error body: OpenAI's shape, FastAPI's, a flat message, or the beginning of the text."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return excerpt(body)
    inner = data.get("error", data) if isinstance(data, dict) else data
    message = inner.get("message", inner.get("detail", inner)) if isinstance(inner, dict) else inner
    metadata = inner.get("metadata") if isinstance(inner, dict) else None
    # OpenRouter's own message is "Provider returned error"; what the provider said stands here.
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return ": ".join(readable(one) if isinstance(one, str) else shown(one) for one in (message, raw) if one)


def excerpt(body: bytes) -> str:
    """The beginning of a body, on one line."""
    return readable(body.decode("utf-8", "replace"), 200)


def readable(text: str, limit: int = 300) -> str:
    """The beginning of a text of others on one line, without what a terminal would obey instead of showing it."""
    # Redacted before it is cut: half a key is too much.
    line = " ".join(redacted(text)[:limit].split())
    return line if line.isprintable() else "".join(char if char.isprintable() else "\ufffd" for char in line)


def shown(value: object) -> str:
    """A value of others as Python writes it, cut off where it is long or deep."""
    return _SHORT.repr(value)
