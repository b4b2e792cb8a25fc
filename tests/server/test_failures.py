"""What each error becomes; errors that are not ours are told without details, and in the log with all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from mope_bb import errors
from mope_bb.errors import MopeError
from mope_bb.server.failures import error_body, error_response, failure_of
from mope_bb.server.token_details import Details, Wanted
from mope_bb.session import Session
from mope_bb.zoo.serving import ZooServer
from tests.server.serving import chat_body, served

CHAT = "/v1/chat/completions"
NOT_IN_ANSWERS = (MopeError, errors.RewardError, errors.TrainingError)


def kinds(base: type[MopeError]) -> Iterator[type[MopeError]]:
    """All of our errors."""
    yield base
    for one in base.__subclasses__():
        if one.__module__ == errors.__name__:
            yield from kinds(one)


@pytest.mark.parametrize("kind", list(kinds(MopeError)))
def test_every_error_has_a_status(kind: type[MopeError]) -> None:
    """Not that of a bug; and clients try again exactly where that may help."""
    error = kind("it went wrong", hint="Do this.")
    failure = failure_of(error)
    if issubclass(kind, NOT_IN_ANSWERS[1:]) or kind is MopeError:
        assert failure.status == 500
    else:
        assert failure.status in (400, 429, 502, 503, 504)
        is_final = failure.status >= 429 and not kind.retryable
        assert (error_response(error).headers.get("x-should-retry") == "false") == (is_final or failure.status == 400)
    assert error_body(error)["error"]["message"] == "it went wrong. Do this."


def test_wait() -> None:
    """What an endpoint says of when to ask again is passed on."""
    response = error_response(errors.RateLimitError("slow down", retry_after_s=2.5))
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert "retry-after" not in error_response(errors.RateLimitError("slow down", retry_after_s=float("inf"))).headers


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged."""
    caplog.set_level(logging.ERROR)
    # Another test's server in this process may have made it silent.
    caplog.set_level(logging.ERROR, logger="uvicorn.error")
    return caplog


def test_bug_before_the_answer(
    nano_experts: ZooServer, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """500, and counted as such."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an inner secret")

    with served(nano_experts.config()) as server:
        monkeypatch.setattr(Session, "stream", fail)
        response = server.post(CHAT, chat_body())
        metrics = server.get("/metrics").text
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "inner secret" not in response.text
    assert "inner secret" in log.text
    assert 'mope_requests_total{route="/v1/chat/completions",status="500"} 1.0' in metrics


def test_bug_in_mid_stream(
    nano_experts: ZooServer, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """An event that says so, as for our own errors."""
    calls = iter([Details()])
    with served(nano_experts.config()) as server:
        monkeypatch.setattr(Wanted, "of", lambda *_: next(calls))
        events = server.post(CHAT, chat_body(stream=True)).text.split("\n\n")
        assert "mope_open_answers 0.0" in server.get("/metrics").text
    assert len(events) == 4  # the role, a token, the error, nothing
    assert json.loads(events[2].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "StopIteration" in log.text
