"""Stand-ins for the dialects of OpenAI's text completions: bodies as those servers write them.

Faults, for `doctor` to find: "short" gives at most 5 entries whatever is asked, "scaled" takes logprobs after the
temperature, "collisions" keys lists by text although ids were asked for, "unsorted" shuffles them, "drawn first" puts
the drawn token in front and drops the last one, "null" gives none.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from tests.endpoints.engine import Drawn, Handler, Reply, StandIn, TinyEngine

WriteLogprobs = Callable[[TinyEngine, Sequence[Drawn], int, Mapping[str, Any]], Any]


def error(status: int, message: str, **facts: Any) -> Reply:
    """An error in OpenAI's shape."""
    return status, {"error": {"message": message, "code": status, **facts}}


def completions(
    write: WriteLogprobs, *, k_of: Callable[[Mapping[str, Any]], int | None], takes_ids: bool = True, bos: bool = False
) -> Handler:
    """POST /v1/completions; `write` makes the `logprobs` of one choice."""

    def handler(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
        engine = stand_in.engine(body.get("model"))
        if engine is None:
            return error(404, f"The model `{body.get('model')}` does not exist.", type="NotFoundError")
        k = k_of(body)
        if k is not None and stand_in.max_logprobs is not None and k > stand_in.max_logprobs:
            return error(
                400,
                f"Requested sample logprobs of {k}, which is greater than max allowed: {stand_in.max_logprobs}",
                param="logprobs",
                type="BadRequestError",
            )
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompts = [engine.encode(prompt)]
        elif not takes_ids:
            return error(422, "prompt: Input should be a valid string")
        else:
            prompts = [prompt] if isinstance(prompt[0], int) else prompt
        choices = []
        for index, ids in enumerate(prompts):
            if len(ids) + body["max_tokens"] > engine.max_length:
                return error(
                    400,
                    f"This model's maximum context length is {engine.max_length} tokens. However, your prompt contains "
                    f"{len(ids)} input tokens.",
                    type="BadRequestError",
                )
            bias = {int(key): value for key, value in (body.get("logit_bias") or {}).items()}
            seed = None if k is not None else len(stand_in.requests)
            drawn = engine.generate(ids, body["max_tokens"], temperature=body["temperature"], bias=bias, seed=seed)
            ended = drawn[-1].token_id == engine.end_id
            echoed = range(len(ids) - body.get("echo_last", 0), len(ids))
            drawn = [*(Drawn(ids[at], engine.row(ids[:at])) for at in echoed), *drawn]
            drawn = [damage(one, stand_in.faults, body["temperature"]) for one in drawn]
            short = 5 if "short" in stand_in.faults and k is not None else k
            choices.append(
                {
                    "index": index,
                    "text": engine.decode([one.token_id for one in drawn]),
                    "logprobs": None
                    if k is None or short is None or "null" in stand_in.faults
                    else write(engine, drawn, short, {**body, "faults": stand_in.faults}),
                    "finish_reason": "stop" if ended else "length",
                    "token_ids": [one.token_id for one in drawn] if body.get("return_token_ids") else None,
                }
            )
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": len(choices)}
        choices.reverse()  # servers promise no order: `index` tells
        return 200, {"object": "text_completion", "model": body["model"], "choices": choices, "usage": usage}

    return handler


def transformers_completions(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /v1/completions of `transformers serve`: no logprobs, greedy unless it is told to sample, and an end that is
    the last token that it may write is told as "length".
    """
    known = {"model", "prompt", "max_tokens", "temperature", "top_p", "generation_config"}
    if strange := set(body) - known:
        return 422, {"detail": f"Unexpected fields in the request: {strange}"}
    engine = stand_in.engine(body["model"])
    if engine is None:
        return 400, {"detail": f"Server is pinned to 'tiny'; requested {body['model']!r}."}
    config = json.loads(body.get("generation_config", "{}"))
    ids, num_tokens = engine.encode(body["prompt"]), body["max_tokens"]
    temperature = body["temperature"] if config.get("do_sample") else 0.0
    drawn = engine.generate(ids, num_tokens, temperature=temperature, seed=len(stand_in.requests))
    written = [one.token_id for one in drawn]
    if "forced_eos_token_id" in config and len(written) == num_tokens:
        written[-1] = config["forced_eos_token_id"][0]
    text = engine.decode(written)
    choice = {"index": 0, "text": text, "finish_reason": "length" if len(written) == num_tokens else "stop"}
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(written)}
    return 200, {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}


def damage(drawn: Drawn, faults: frozenset[str], temperature: float) -> Drawn:
    """What a server that takes logprobs after the temperature reports."""
    if "scaled" not in faults or temperature == 1.0:
        return drawn
    if temperature == 0.0:
        return Drawn(drawn.token_id, [0.0 if one == drawn.token_id else -9999.0 for one in range(len(drawn.logprobs))])
    scaled = [value / temperature for value in drawn.logprobs]
    total = math.log(math.fsum(map(math.exp, scaled)))
    return Drawn(drawn.token_id, [value - total for value in scaled])


def listed(one: Drawn, k: int, faults: frozenset[str]) -> list[tuple[int, float]]:
    """The k best, with the faults of order."""
    entries = one.top(k)
    if "drawn first" in faults:
        rest = [entry for entry in entries if entry[0] != one.token_id]
        entries = [(one.token_id, one.logprobs[one.token_id]), *rest][:k]
    elif one.token_id not in dict(entries):
        entries.append((one.token_id, one.logprobs[one.token_id]))
    if "unsorted" in faults:
        random.Random(len(entries)).shuffle(entries)
    return entries


def dictionary(engine: TinyEngine, drawn: Sequence[Drawn], k: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """The legacy shape, keyed by text; by id for a server that is asked to (`return_tokens_as_token_ids`)."""
    by_id = body.get("return_tokens_as_token_ids") and "collisions" not in body["faults"]
    show = (lambda token: f"token_id:{token}") if by_id else _text_of(engine, body)
    return {
        "text_offset": [0] * len(drawn),
        "tokens": [show(one.token_id) for one in drawn],
        "token_logprobs": [one.logprobs[one.token_id] for one in drawn],
        # A dictionary: tokens of equal text fall together, as they do on the real wire.
        "top_logprobs": [{show(token): value for token, value in listed(one, k, body["faults"])} for one in drawn],
    }


def _text_of(engine: TinyEngine, body: Mapping[str, Any]) -> Callable[[int], str]:
    if body.get("style") == "latin-1":  # SGLang: parts of characters, byte by byte

        def show(token: int) -> str:
            data = engine.data(token)
            try:
                return data.decode() or engine.text(token)
            except UnicodeDecodeError:
                return data.decode("latin-1")

        return show
    return engine.text


def content(engine: TinyEngine, drawn: Sequence[Drawn], k: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat shape with ids and bytes: llama.cpp's (`id`) and, with "token_id", Fireworks'."""
    name = "token_id" if "top_logprobs" in body else "id"

    def entry(token: int, value: float) -> dict[str, Any]:
        data = engine.data(token)
        return {name: token, "token": data.decode(errors="ignore"), "bytes": list(data), "logprob": value}

    return {
        "content": [
            {
                **entry(one.token_id, one.logprobs[one.token_id]),
                "top_logprobs": [entry(*each) for each in listed(one, k, body["faults"])],
            }
            for one in drawn
        ]
    }


def models(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """GET /v1/models as vLLM and SGLang write it."""
    cards = [
        {
            "id": name,
            "object": "model",
            "owned_by": "vllm",
            "root": str(engine.folder),
            "parent": None,
            "max_model_len": engine.max_length,
        }
        for name, engine in stand_in.engines.items()
    ]
    return 200, {"object": "list", "data": cards}


def number(body: Mapping[str, Any]) -> int | None:
    """`logprobs: k`."""
    value = body.get("logprobs")
    return value if type(value) is int else None


def switch(body: Mapping[str, Any]) -> int | None:
    """`logprobs: true, top_logprobs: k`."""
    return int(body["top_logprobs"]) if body.get("logprobs") is True else None


ROUTES: Mapping[str, Mapping[tuple[str, str], Handler]] = {
    "vllm": {("POST", "/v1/completions"): completions(dictionary, k_of=number), ("GET", "/v1/models"): models},
    "sglang-completions": {
        ("POST", "/v1/completions"): completions(
            lambda engine, drawn, k, body: dictionary(engine, drawn, k, {**body, "style": "latin-1"}), k_of=number
        ),
        ("GET", "/v1/models"): models,
    },
    "llamacpp-completions": {("POST", "/v1/completions"): completions(content, k_of=number)},
    "tensorrt-llm": {("POST", "/v1/completions"): completions(dictionary, k_of=number)},
    "fireworks": {("POST", "/inference/v1/completions"): completions(content, k_of=switch)},
    "together": {("POST", "/v1/completions"): completions(dictionary, k_of=number, takes_ids=False)},
    "deepseek-completions": {("POST", "/beta/completions"): completions(dictionary, k_of=number, takes_ids=False)},
    "transformers": {("POST", "/v1/completions"): transformers_completions},
    "completions": {("POST", "/v1/completions"): completions(dictionary, k_of=number)},
}
"""Provider -> its routes."""
BASE_PATHS: Mapping[str, str] = {"fireworks": "/inference/v1", "deepseek-completions": "/beta"}
"""Where it is not "/v1"."""
FAULTS: Mapping[str, frozenset[str]] = {"deepseek-completions": frozenset({"scaled"})}
"""What these do of their own accord."""
