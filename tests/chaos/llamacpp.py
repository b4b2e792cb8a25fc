"""A stand-in for llama.cpp's server: the routes that the adapter uses, with a model of this process behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiohttp import web

from tests.chaos.engine import QuickEngine, RankedDrawn
from tests.endpoints.engine import Drawn, Handler, Reply, StandIn
from tests.endpoints.native import only_engine

FORCED: Final = re.compile(r"<\[(\d+)\]>")
"""A token of a grammar."""


def engine_of(stand_in: StandIn) -> QuickEngine:
    """The model that is served."""
    engine = only_engine(stand_in)
    assert isinstance(engine, QuickEngine)
    return engine


def completion(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /completion, of one prompt or of several."""
    engine, prompt = engine_of(stand_in), body["prompt"]
    is_list = isinstance(prompt[0], list)
    prompts: list[list[int]] = prompt if is_list else [prompt]
    if longest := max((len(ids) for ids in prompts if len(ids) >= engine.max_length), default=0):
        message = f"request ({longest} tokens) exceeds the available context size ({engine.max_length} tokens)"
        return 400, {"error": {"code": 400, "message": message, "type": "exceed_context_size_error"}}
    replies = [_reply(engine, ids, index, body) for index, ids in enumerate(prompts)]
    return 200, replies if is_list else replies[0]


def _reply(engine: QuickEngine, ids: Sequence[int], index: int, body: Mapping[str, Any]) -> dict[str, Any]:
    drawn = _draw(engine, ids, body)
    listed, pending = [], b""
    for one in drawn:
        pending += engine.data(one.token_id)
        # A token that ends inside a character has no list; the next one's bytes begin with its own.
        if pending.decode(errors="ignore").encode() == pending:
            top = [_entry(token, value, engine.data(token)) for token, value in one.top(body["n_probs"])]
            entry = _entry(one.token_id, one.logprobs[one.token_id], pending)
            listed.append({**entry, "top_logprobs": top})
            pending = b""
    return {
        "index": index,
        "tokens": [one.token_id for one in drawn],
        "tokens_predicted": len(drawn),
        "tokens_evaluated": len(ids),
        "truncated": False,
        "stop_type": "eos" if drawn[-1].token_id == engine.end_id else "limit",
        **({"completion_probabilities": listed} if listed else {}),
    }


def _draw(engine: QuickEngine, ids: Sequence[int], body: Mapping[str, Any]) -> Sequence[Drawn]:
    if "grammar" in body:
        forced = [int(token) for token in FORCED.findall(body["grammar"])]
        return [RankedDrawn(token, engine.row((*ids, *forced[:at]))) for at, token in enumerate(forced)]
    bias = {int(token): float(value) for token, value in body["logit_bias"]}
    # What is forced is drawn whatever the temperature.
    temperature = 0.0 if bias else body["temperature"]
    return engine.generate(ids, body["n_predict"], temperature=temperature, bias=bias, seed=body.get("seed"))


def _entry(token: int, value: float, data: bytes) -> dict[str, Any]:
    return {"id": token, "token": data.decode(errors="ignore"), "bytes": list(data), "logprob": value}


def tokenize(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /tokenize."""
    engine = engine_of(stand_in)
    encode = engine.encode if body["parse_special"] else engine.chat.encode_text
    return 200, {"tokens": list(encode(body["content"]))}


def detokenize(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /detokenize, control tokens by name."""
    engine = engine_of(stand_in)
    return 200, {"content": "".join(engine.text(token) for token in body["tokens"])}


def apply_template(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /apply-template."""
    return 200, {"prompt": engine_of(stand_in).render(body["messages"])}


def props(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """GET /props."""
    engine = engine_of(stand_in)
    return 200, {
        "default_generation_settings": {"n_ctx": engine.max_length},
        "eos_token": engine.text(engine.end_id),
    }


def models(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """GET /v1/models."""
    return 200, {"data": [{"id": name, "meta": {"n_vocab": one.vocab_size}} for name, one in stand_in.engines.items()]}


ROUTES: Final[Mapping[tuple[str, str], Handler]] = {
    ("POST", "/completion"): completion,
    ("POST", "/tokenize"): tokenize,
    ("POST", "/detokenize"): detokenize,
    ("POST", "/apply-template"): apply_template,
    ("GET", "/props"): props,
    ("GET", "/v1/models"): models,
}
