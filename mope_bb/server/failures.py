"""Errors as HTTP answers, in OpenAI's shape, in words and with what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mope_bb.errors import (
    AlignmentError,
    BudgetError,
    ConfigError,
    ConstraintError,
    ContextLengthError,
    ModelNotFoundError,
    MopeError,
    PcmError,
    PreferenceError,
    PrefillError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    RateLimitError,
    RequestError,
    TopKError,
)

INVALID: Final = "invalid_request_error"


class RefusalError(MopeError):
    """What this server itself does not accept, or cannot do now."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Failure:
    """How an error is told to a client."""

    status: int
    group: str
    """OpenAI's `type`."""
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


_KINDS: Final[tuple[tuple[type[MopeError], Failure], ...]] = (
    (PreferenceError, Failure(400, INVALID, "invalid_preference", "preference")),
    (ConfigError, Failure(400, INVALID, "invalid_value")),
    (ContextLengthError, Failure(400, INVALID, "context_length_exceeded", "messages")),
    (TopKError, Failure(502, "expert_error", "expert_failed")),
    (PrefillError, Failure(502, "expert_error", "expert_failed")),
    (ModelNotFoundError, Failure(502, "expert_error", "expert_failed")),
    # Such as a conversation that an expert's chat template does not take, or raw text where it takes only messages.
    (RequestError, Failure(400, INVALID, "expert_refused")),
    (ProviderTimeoutError, Failure(504, "expert_error", "expert_timeout")),
    (RateLimitError, Failure(503, "expert_error", "expert_rate_limited")),
    (ProviderConnectionError, Failure(502, "expert_error", "expert_unreachable")),
    (ProviderError, Failure(502, "expert_error", "expert_failed")),
    (AlignmentError, Failure(502, "expert_error", "experts_do_not_fit")),
    (ConstraintError, Failure(502, "expert_error", "form_not_reached")),
    (BudgetError, Failure(429, "insufficient_quota", "insufficient_quota")),
    (PcmError, Failure(503, "pcm_error", "pcm_failed")),
)
"""The first that fits."""
_BUG: Final = Failure(500, "server_error", "internal_error")


def failure_of(error: BaseException) -> Failure:
    """How `error` is told."""
    if isinstance(error, RefusalError):
        group = INVALID if error.status < 429 else "server_error"
        return Failure(error.status, group, error.code, error.param, error.headers)
    for kind, failure in _KINDS:
        if isinstance(error, kind):
            return replace(failure, headers=_advice(error))
    return _BUG


def _advice(error: MopeError) -> dict[str, str]:
    """When to try again, or that it is no use: OpenAI's clients would do so after every 5xx and 429."""
    wait = error.retry_after_s if isinstance(error, ProviderError) else None
    told = {} if wait is None or not math.isfinite(wait) else {"retry-after": str(math.ceil(wait))}
    return told if error.retryable else {"x-should-retry": "false"}


def error_body(error: BaseException) -> dict[str, Any]:
    """`error` in OpenAI's shape. Of one that is not ours nothing is told but that it happened."""
    failure = failure_of(error)
    message = error.in_words if isinstance(error, MopeError) else "Internal error. The server's log has the details."
    return {"error": {"message": message, "type": failure.group, "param": failure.param, "code": failure.code}}


def error_response(error: BaseException) -> Response:
    """The whole HTTP answer."""
    failure = failure_of(error)
    return Response(
        orjson.dumps(error_body(error)), failure.status, dict(failure.headers), media_type="application/json"
    )


def refusal_of(error: HTTPException) -> RefusalError:
    """What Starlette's router refuses, in words."""
    known = {
        404: ("not_found", "there is nothing at this address", "GET /openapi.json lists what there is."),
        405: ("method_not_allowed", "this address does not take this method", "The header Allow names those it takes."),
    }
    code, message, hint = known.get(error.status_code, ("refused", str(error.detail), None))
    return RefusalError(error.status_code, code, message, hint=hint, headers=error.headers)


def malformed(error: ValidationError) -> RefusalError:
    """The first thing that is wrong with a body."""
    # Of the branches of a union the one that got furthest is the one that was meant.
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    where = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    message = first["msg"].removeprefix("Value error, ")
    found = first.get("input")
    shown = f" (found {str(found)[:80]!r})" if isinstance(found, str | int | float | bool) else ""
    where = where or "the body"
    return RefusalError(422, "malformed_body", f"{where}: {message[:1].lower()}{message[1:]}{shown}", param=where)


def _is_branch(part: int | str) -> bool:
    """Whether pydantic put this into the path of an error because a field has several types."""
    return isinstance(part, str) and (
        part in ("str", "float", "int") or part.startswith(("list[", "dict[", "function-"))
    )
