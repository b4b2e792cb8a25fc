"""What a server counts of itself, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mope_bb.types import Answer
from mope_bb.usage import Account

FIRST_TOKEN_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
TOKEN_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LEFT: Final = "left"
"""Stands as the status where the client went away before there was one."""


class Metrics:
    """The counters of one application; a registry of its own, so that several can live in one process."""

    def __init__(self, account: Account) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EndpointCalls(account))
        self.requests: Final = Counter(
            "mope_requests", "Requests answered.", ("route", "status"), registry=self._registry
        )
        self.open_answers: Final = Gauge("mope_open_answers", "Answers under way.", registry=self._registry)
        self._prompt_tokens = Counter("mope_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self._tokens = Counter("mope_completion_tokens", "Tokens of answers.", registry=self._registry)
        self._drawn = Counter(
            "mope_drawn_tokens", "Tokens that experts drew, unused ones among them.", registry=self._registry
        )
        self.first_token_s: Final = Histogram(
            "mope_first_token_seconds",
            "From the request to its first token.",
            (),
            buckets=FIRST_TOKEN_S,
            registry=self._registry,
        )
        self.token_s: Final = Histogram(
            "mope_token_seconds",
            "From one token of an answer to the next.",
            (),
            buckets=TOKEN_S,
            registry=self._registry,
        )

    def count(self, answer: Answer) -> None:
        """An answer is over, or was left."""
        self._prompt_tokens.inc(answer.num_prompt_tokens)
        self._tokens.inc(answer.num_completion_tokens)
        self._drawn.inc(answer.effort.num_generated)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class CountRequests:
    """Middleware that counts requests by route and status, and leaves their bodies alone."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._requests = metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = LEFT

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            # Starlette answers outside of all middleware.
            status = "500" if status == LEFT else status
            raise
        finally:
            # Addresses that do not exist are one label, or a stranger could make as many as memory holds.
            route = getattr(scope.get("route"), "path", "other")
            self._requests.labels(route, status).inc()


class _EndpointCalls(Collector):
    """What the session's own account says, at the time it is asked."""

    def __init__(self, account: Account) -> None:
        self._account = account

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        calls = CounterMetricFamily("mope_endpoint_calls", "HTTP requests to experts, retries too.", labels=("expert",))
        tokens = CounterMetricFamily(
            "mope_endpoint_tokens", "Tokens that experts' endpoints bill.", labels=("expert", "kind")
        )
        for name, usage in self._account.by_name.items():
            calls.add_metric((name,), usage.num_calls)
            tokens.add_metric((name, "read"), usage.input_tokens)
            tokens.add_metric((name, "generated"), usage.output_tokens)
        return (calls, tokens)
