"""The published description of the endpoint (OpenAPI 3.1), made from the models by which requests are checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from mope_bb import __version__
from mope_bb.server.protocol import ChatRequest, SteerRequest, TextRequest


class _Reply(BaseModel):
    """What we send; the fields that are named are always there unless they have a default."""

    model_config = ConfigDict(extra="allow")


class ErrorDetails(_Reply):
    """What went wrong, in words and with what to do."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(_Reply):
    """Every error has this shape."""

    error: ErrorDetails


class Usage(_Reply):
    """Tokens: read once for each prompt, drawn for every choice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Mixture(_Reply):
    """How the experts were merged."""

    merge: str
    weights: dict[str, float]
    seed: int | None
    dropped: list[str]
    effort: dict[str, int]


class TopLogprob(_Reply):
    """A candidate for the place of a token."""

    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token under the merged distribution, before temperature and top_p."""

    top_logprobs: list[TopLogprob]


class Logprobs(_Reply):
    """Of all tokens of a choice, its end among them."""

    content: list[TokenLogprob]


class TraceEntry(_Reply):
    """What one token tells of the experts."""

    text: str
    bytes: list[int]
    logprob: float | None
    is_forced: bool
    weights: dict[str, float]
    carriers: dict[str, float]
    missed_mass: float | None


class ReplyMessage(_Reply):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None


class ChatChoice(_Reply):
    """One answer."""

    index: int
    message: ReplyMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: Logprobs | None
    trace: list[TraceEntry] | None = None


class TextChoice(_Reply):
    """One continuation."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None
    trace: list[TraceEntry] | None = None


class _Completion(_Reply):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    mope: Mixture


class ChatReply(_Completion):
    """The whole answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextReply(_Completion):
    """The whole continuation of a text."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelEntry(_Reply):
    """A name by which to ask."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Reply):
    """All names."""

    object: Literal["list"]
    data: list[ModelEntry]


class WeightsReply(_Reply):
    """The weight that each styled expert has from the next token on."""

    weights: dict[str, float]


class HealthReply(_Reply):
    """The server runs."""

    status: Literal["ok"]


class ExpertEntry(_Reply):
    """An expert."""

    name: str
    dimension: str | None
    is_base: bool


class DimensionEntry(_Reply):
    """A dimension that an expert serves."""

    name: str
    text: str | None


class PcmEntry(_Reply):
    """The Preference Control Model."""

    is_trained: bool


class InfoReply(_Reply):
    """What a page needs to know."""

    version: str
    experts: list[ExpertEntry]
    dimensions: list[DimensionEntry]
    presets: dict[str, dict[str, float]]
    merge_rules: list[str]
    merge: str
    pcm: PcmEntry
    reads_sentences: bool
    has_run: bool
    max_tokens: int
    default_max_tokens: int


class RunReply(_Reply):
    """A training run."""

    name: str
    metrics: list[dict[str, float]]
    has_report: bool


_ERRORS: Final = {
    400: "A value that is not allowed here.",
    401: "No key, or a wrong one.",
    404: "There is nothing of this name.",
    408: "The body has not come whole in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    421: "The Host header is not one of this machine.",
    422: "The body is malformed.",
    429: "Too many answers are open, or the budget is used up.",
    502: "An expert's endpoint failed.",
    503: "An expert's endpoint is overloaded, the PCM failed, or the server is being stopped.",
    504: "An expert's endpoint did not answer in time.",
}
_BODY_ERRORS: Final = (400, 408, 413, 415, 422)
_EXPERT_ERRORS: Final = (429, 502, 503, 504)
_REQUESTS: Final = (ChatRequest, TextRequest, SteerRequest)
_REPLIES: Final = (ErrorReply, ChatReply, TextReply, ModelList, WeightsReply, HealthReply, InfoReply, RunReply)
_STREAM: Final = {
    "schema": {
        "description": "Server-sent events: chunks, then [DONE]; an error ends it earlier.",
        "properties": {"data": {"type": "string"}},
    }
}


def describe_api(*, has_key: bool) -> dict[str, Any]:
    """The document; `has_key` = clients must send one."""
    _, schemas = models_json_schema(
        [*((model, "validation") for model in _REQUESTS), *((model, "serialization") for model in _REPLIES)],
        ref_template="#/components/schemas/{model}",
    )
    html = {"text/html": {"schema": {"type": "string"}}}
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "mope-bb",
            "version": __version__,
            "description": "Merged experts as one OpenAI-compatible model. Unknown fields are ignored, unless they "
            "would change what is said: those are refused (400).",
        },
        "paths": {
            "/": {"get": _operation("The page", html, is_open=True)},
            "/page/{name}": {
                "get": _operation("Its files", {"*/*": {}}, 404, is_open=True, parameters=(_in_path("name"),)),
            },
            "/health": {"get": _operation("Whether the server runs", _json(HealthReply), is_open=True)},
            "/metrics": {"get": _operation("For Prometheus", {"text/plain": {"schema": {"type": "string"}}})},
            "/openapi.json": {"get": _operation("This description", {"application/json": {"schema": {}}})},
            "/v1/models": {"get": _operation("The models: ours, and one for each preset", _json(ModelList))},
            "/v1/models/{model}": {
                "get": _operation("One of them", _json(ModelEntry), 400, 404, parameters=(_in_path("model"),))
            },
            "/v1/chat/completions": {
                "post": _operation(
                    "Answer a conversation",
                    {**_json(ChatReply), "text/event-stream": _STREAM},
                    *(404, *_BODY_ERRORS, *_EXPERT_ERRORS),
                    body=ChatRequest,
                )
            },
            "/v1/chat/completions/{answer_id}/preference": {
                "post": _operation(
                    "Go on with another preference",
                    _json(WeightsReply),
                    *(404, *_BODY_ERRORS),
                    body=SteerRequest,
                    parameters=(_in_path("answer_id"),),
                )
            },
            "/v1/completions": {
                "post": _operation(
                    "Continue a text as it is",
                    {**_json(TextReply), "text/event-stream": _STREAM},
                    *(404, *_BODY_ERRORS, *_EXPERT_ERRORS),
                    body=TextRequest,
                )
            },
            "/mope/info": {"get": _operation("Experts, dimensions, presets, limits", _json(InfoReply))},
            "/mope/run": {"get": _operation("The training run that is shown", _json(RunReply), 404)},
            "/mope/run/report": {"get": _operation("The report of its evaluation", html, 404)},
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return document | ({"security": [{"key": []}]} if has_key else {})


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _operation(
    summary: str,
    content: dict[str, Any],
    *errors: int,
    body: type[BaseModel] | None = None,
    parameters: Sequence[dict[str, Any]] = (),
    is_open: bool = False,
) -> dict[str, Any]:
    statuses = sorted({*errors, 421, *(() if is_open else (401,))})
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "As asked.", "content": content},
            **{str(status): {"description": _ERRORS[status], "content": _json(ErrorReply)} for status in statuses},
        },
    }
    if parameters:
        operation["parameters"] = list(parameters)
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation | ({"security": []} if is_open else {})
