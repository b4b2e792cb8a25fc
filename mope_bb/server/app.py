"""The routes of `mope-bb serve`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from mope_bb import __version__
from mope_bb.config import ServerConfig
from mope_bb.errors import MopeError, PreferenceError
from mope_bb.keys import Key
from mope_bb.logs import ChatLog, build_entry, new_conversation
from mope_bb.preferences import Preference
from mope_bb.server.answers import Answering, Keep, OpenAnswers
from mope_bb.server.failures import RefusalError, error_response, refusal_of
from mope_bb.server.guard import Guard, is_loopback, parse_json, read_body
from mope_bb.server.metrics import CountRequests, Metrics
from mope_bb.server.openapi import describe_api
from mope_bb.server.page_files import PageFiles
from mope_bb.server.protocol import (
    MODEL,
    ChatRequest,
    Sampling,
    SteerRequest,
    TextRequest,
    check_limits,
    parse_body,
    preference_in,
)
from mope_bb.server.replies import ChatWriter, TextWriter, Writer, model_entry, weights_of
from mope_bb.server.run import RunFolder
from mope_bb.server.token_details import Wanted
from mope_bb.session import Session
from mope_bb.streams import AnswerStream

REPORT_POLICY: Final = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LARGE_BODY: Final = 2**15
_LOGGED: Final = {
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "merge"),
    *("tools", "tool_choice", "parallel_tool_calls", "response_format", "continue_final_message"),
}
_Prompt = tuple[list[dict[str, Any]], Callable[[int | None], AnswerStream]]
"""What is answered, for the log, and what begins an answer with a seed."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a server has besides its session."""

    settings: ServerConfig
    key: Key | None = None
    run: RunFolder | None = None
    log: ChatLog | None = None


class Server:
    """The routes of one application."""

    def __init__(self, session: Session, surroundings: Surroundings) -> None:
        self._session = session
        self._settings = surroundings.settings
        self._run = surroundings.run
        self._log = surroundings.log
        self._has_key = surroundings.key is not None
        self._began = int(time.time())
        roster = session.roster
        self._rules = ["linear"]
        if all(expert.logprobs for expert in session.config.experts):
            self._rules += ["geometric", *(["product"] if roster.base is not None else [])]
        styled = next((name for name in roster.dimension_of if name != roster.base), roster.base)
        # Wrong settings are an error here, at the start.
        self._rule = session.plan({styled or "": 1.0}).rule.name
        self._reads_sentences = _reads_sentences(session)
        self.metrics: Final = Metrics(session.account)
        self.open_answers: Final = OpenAnswers(self._settings.max_open_answers, self.metrics)

    def routes(self) -> list[Route | Mount]:
        """All of them."""
        page = PageFiles()
        return [
            Route("/", page.index),
            Mount("/page", page, name="page"),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{model}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/chat/completions/{answer_id}/preference", self.steer, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/openapi.json", self.describe),
            Route("/mope/info", self.info),
            Route("/mope/run", self.run),
            Route("/mope/run/report", self.report),
        ]

    async def health(self, request: Request) -> Response:
        """Whether the server runs; no expert is asked."""
        return _json({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """Ours, and one for each preset."""
        names = [MODEL, *(f"{MODEL}:{preset}" for preset in self._session.config.presets)]
        return _json({"object": "list", "data": [model_entry(name, self._began) for name in names]})

    async def model(self, request: Request) -> Response:
        """One of them, or ours with any other preference."""
        name = request.path_params["model"]
        if (preference := preference_in(name)) is not None:
            self._session.plan(preference)
        return _json(model_entry(name, self._began))

    async def chat(self, request: Request) -> Answering:
        """Answer a conversation."""
        asked = await self._read(request, ChatRequest)
        check_limits(asked, self._settings)
        messages, begun = asked.conversation()
        preference = asked.asked_preference

        def begin(seed: int | None) -> AnswerStream:
            return self._session.stream(
                messages,
                preference=preference,
                merge=asked.merge,
                seed=seed,
                tools=asked.tools,
                tool_choice=asked.tool_choice,
                parallel_tool_calls=bool(asked.parallel_tool_calls),
                response_format=asked.response_format,
                answer_so_far=begun,
                **self._sampling(asked),
            )

        shown = [*messages, {"role": "assistant", "content": begun}] if begun else messages
        return self._answering(asked, [(shown, begin)], "chatcmpl", ChatWriter)

    async def complete(self, request: Request) -> Answering:
        """Continue texts."""
        asked = await self._read(request, TextRequest)
        check_limits(asked, self._settings, num_prompts=len(asked.prompts))
        preference = asked.asked_preference

        def beginning(text: str) -> _Prompt:
            shown = [{"role": "user", "content": text}]
            return shown, lambda seed: self._session.stream_text(
                text, preference=preference, merge=asked.merge, seed=seed, **self._sampling(asked)
            )

        return self._answering(asked, [beginning(text) for text in asked.prompts], "cmpl", TextWriter)

    async def steer(self, request: Request) -> Response:
        """Let an open answer go on with another preference."""
        asked = await self._read(request, SteerRequest)
        plan = self.open_answers.steer(request.path_params["answer_id"], asked.index, asked.preference)
        return _json({"weights": weights_of(plan)})

    async def describe(self, request: Request) -> Response:
        """OpenAPI's description of all this."""
        return _json(describe_api(has_key=self._has_key))

    async def info(self, request: Request) -> Response:
        """What the page needs to know."""
        config, settings = self._session.config, self._settings
        roster, texts = self._session.roster, config.dimension_texts()
        served = dict.fromkeys(dimension for dimension in roster.dimension_of.values() if dimension is not None)
        return _json(
            {
                "version": __version__,
                "experts": [
                    {"name": name, "dimension": dimension, "is_base": name == roster.base}
                    for name, dimension in roster.dimension_of.items()
                ],
                "dimensions": [{"name": name, "text": texts.get(name)} for name in served],
                "presets": config.presets,
                "merge_rules": self._rules,
                "merge": self._rule,
                "pcm": {"is_trained": self._reads_sentences},
                "reads_sentences": self._reads_sentences,
                "has_run": self._run is not None,
                "max_tokens": settings.max_tokens,
                "default_max_tokens": min(settings.default_max_tokens, settings.max_tokens),
            }
        )

    async def run(self, request: Request) -> Response:
        """The training run that the page shows."""
        return _json(await asyncio.to_thread(self._shown_run().describe))

    async def report(self, request: Request) -> Response:
        """Its evaluation's report, a page that may do nothing but be looked at."""
        found = self._shown_run().report
        if found is None:
            raise RefusalError(404, "not_found", "the run has no report", hint="`mope-bb eval` writes one.")
        return FileResponse(
            found,
            media_type="text/html",
            headers={"content-security-policy": REPORT_POLICY, "cache-control": "no-cache"},
        )

    def _shown_run(self) -> RunFolder:
        if self._run is None:
            raise RefusalError(404, "not_found", "no run is shown here", hint="Start the server with --run DIR.")
        return self._run

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        body = await read_body(request, self._settings.max_body_bytes)
        # A large one may take long: not on the event loop, where answers are waiting for it.
        if len(body) > LARGE_BODY:
            return await asyncio.to_thread(lambda: parse_body(kind, parse_json(body)))
        return parse_body(kind, parse_json(body))

    def _sampling(self, asked: Sampling) -> dict[str, Any]:
        settings = self._settings
        return {
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "max_tokens": asked.length or min(settings.default_max_tokens, settings.max_tokens),
            "stop": asked.stop or (),
        }

    def _answering(
        self, asked: ChatRequest | TextRequest, prompts: Sequence[_Prompt], prefix: str, writer: type[Writer]
    ) -> Answering:
        answer_id = f"{prefix}-{secrets.token_hex(12)}"
        number = asked.n or 1
        streams = [
            begin(None if asked.seed is None else asked.seed + offset)
            for _, begin in prompts
            for offset in range(number)
        ]
        tells_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return Answering(
            answer_id,
            streams,
            writer(answer_id, asked.model, told_seed=asked.seed, tells_usage=tells_usage, plan=streams[0].plan),
            Wanted(asked.top, asked.trace),
            self.open_answers,
            num_prompts=len(prompts),
            is_streaming=bool(asked.stream),
            tells_usage=tells_usage,
            keep=None if self._log is None else self._keeper(self._log, asked, prompts),
        )

    def _keeper(self, log: ChatLog, asked: ChatRequest | TextRequest, prompts: Sequence[_Prompt]) -> Keep:
        conversation, started_at = asked.conversation_name or new_conversation(), datetime.now(UTC)
        number = asked.n or 1

        def keep(index: int, stream: AnswerStream, error: BaseException | None) -> None:
            log.record(
                build_entry(
                    stream,
                    source="serve",
                    conversation=conversation,
                    started_at=started_at,
                    model=asked.model,
                    messages=prompts[index // number][0],
                    preference=asked.asked_preference,
                    options=asked.model_dump(exclude_none=True, include=_LOGGED),
                    pcm=self._session.config.pcm.path,
                    error=error,
                )
            )

        return keep


def _reads_sentences(session: Session) -> bool:
    try:
        session.plan(Preference(text="?"))
    except PreferenceError:
        return False
    return True


def build_app(session: Session, surroundings: Surroundings, *, host: str) -> tuple[ASGIApp, OpenAnswers]:
    """The application for an open session that will listen at `host`, and its answers, to end them by."""
    settings = surroundings.settings
    server = Server(session, surroundings)
    middleware = [Middleware(CountRequests, server.metrics)]
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    middleware.append(Middleware(Guard, key=surroundings.key, checks_host=is_loopback(host)))
    app = Starlette(
        routes=server.routes(),
        middleware=middleware,
        exception_handlers={MopeError: _tell, HTTPException: _tell_router, Exception: _tell},
    )
    app.router.redirect_slashes = False
    return app, server.open_answers


async def _tell(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _tell_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(refusal_of(error))


def _json(data: Any) -> Response:
    return Response(orjson.dumps(data), media_type="application/json", headers={"cache-control": "no-store"})
