"""Stand-ins for the routes that are no OpenAI route: SGLang, vLLM with ids, Ollama, TGI and Gemini.

Faults: "null" gives no lists, "scaled" takes logprobs after the temperature, "no scale-out" is vLLM without its flag,
"truncating" cuts prompts that are too long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from tests.endpoints.engine import Drawn, Handler, Reply, StandIn, TinyEngine
from tests.endpoints.openai_completions import damage, error, models

SCALE_OUT = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."


def only_engine(stand_in: StandIn) -> TinyEngine:
    """The model of a server that has one."""
    (engine,) = stand_in.engines.values()
    return engine


def draw(
    stand_in: StandIn,
    engine: TinyEngine,
    ids: Sequence[int],
    num_tokens: int,
    temperature: float,
    *,
    seed: int | None = None,
) -> list[Drawn]:
    """What is generated, with the logprobs that the server reports."""
    drawn = engine.generate(ids, num_tokens, temperature=temperature, seed=seed)
    return [damage(one, stand_in.faults, temperature) for one in drawn]


def sglang_generate(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /generate of SGLang."""
    engine = only_engine(stand_in)
    if body.get("lora_path") is not None:
        return error(400, f"The following requested LoRA adapters are not loaded: {body['lora_path']}")
    prompts = body["input_ids"] if isinstance(body["input_ids"][0], list) else [body["input_ids"]]
    replies = []
    for ids in prompts:
        read = ids[-engine.max_length + 1 :] if "truncating" in stand_in.faults else ids
        num_new = body["sampling_params"]["max_new_tokens"]
        if len(read) >= engine.max_length:
            return error(
                400,
                f"The input ({len(ids)} tokens) is longer than the model's context length ({engine.max_length}).",
            )
        if len(read) + num_new > engine.max_length:
            return error(
                400,
                f"Requested token count exceeds the model's maximum context length of {engine.max_length} tokens. You "
                f"requested a total of {len(read) + num_new} tokens.",
            )
        replies.append(sglang_reply(stand_in, engine, read, body))
    return 200, replies if isinstance(body["input_ids"][0], list) else replies[0]


def sglang_reply(stand_in: StandIn, engine: TinyEngine, ids: Sequence[int], body: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to one prompt: logprobs follow the temperature, a greedy request is computed at 1."""
    sampling = body["sampling_params"]
    drawn = engine.generate(ids, sampling["max_new_tokens"], temperature=sampling["temperature"])
    if sampling["temperature"] != 0.0:
        drawn = [damage(one, frozenset({"scaled"}), sampling["temperature"]) for one in drawn]
    output_ids = [one.token_id for one in drawn]
    ended = output_ids[-1] == engine.end_id
    finish = {"type": "stop", "matched": engine.end_id} if ended else {"type": "length", "length": len(drawn)}
    meta: dict[str, Any] = {"id": "0f3c", "finish_reason": finish, "cached_tokens": 0}
    meta |= {"prompt_tokens": len(ids), "completion_tokens": len(drawn)}
    if body["return_logprob"] and "null" not in stand_in.faults:
        k = body["top_logprobs_num"]
        start = len(ids) if body["logprob_start_len"] == -1 else body["logprob_start_len"]
        # The first token of all that are scored has no list.
        given = [Drawn(ids[at], engine.row(ids[:at])) for at in range(start + 1, len(ids))]
        first_token, first_list = ([[None, ids[start], None]], [None]) if start < len(ids) else ([], [])
        meta |= {
            "input_token_logprobs": [
                *first_token,
                *([one.logprobs[one.token_id], one.token_id, None] for one in given),
            ],
            "input_top_logprobs": [
                *first_list,
                *([[value, token, None] for token, value in one.top(k)] for one in given),
            ],
            "output_token_logprobs": [[one.logprobs[one.token_id], one.token_id, None] for one in drawn],
            "output_top_logprobs": [[[value, token, None] for token, value in one.top(k)] for one in drawn],
        }
    return {"text": engine.decode(output_ids), "output_ids": output_ids, "meta_info": meta}


def sglang_model_info(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """GET /model_info."""
    folder = str(only_engine(stand_in).folder)
    return 200, {"model_path": folder, "tokenizer_path": folder, "is_generation": True}


def sglang_models(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """GET /v1/models as SGLang writes it: `root` repeats the served name."""
    _, found = models(stand_in, body, request)
    return 200, {**found, "data": [{**card, "root": card["id"]} for card in found["data"]]}


def vllm_generate(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /inference/v1/generate."""
    if "no scale-out" in stand_in.faults:
        return error(403, SCALE_OUT, type="PermissionDeniedError", param=None)
    engine = stand_in.engine(body.get("model"))
    if engine is None:
        return error(404, f"The model `{body.get('model')}` does not exist.", type="NotFoundError")
    ids, sampling = body["token_ids"], body["sampling_params"]
    if len(ids) >= engine.max_length:
        return error(
            400,
            f"This model's maximum context length is {engine.max_length} tokens. However, your prompt contains "
            f"{len(ids)} input tokens.",
            type="BadRequestError",
        )
    room = engine.max_length - len(ids)
    drawn = draw(stand_in, engine, ids, min(room, sampling["max_tokens"]), sampling["temperature"])
    choice = {
        "index": 0,
        "finish_reason": "stop" if drawn[-1].token_id == engine.end_id else "length",
        "stop_reason": None,
        "token_ids": [one.token_id for one in drawn],
        "logprobs": None
        if "null" in stand_in.faults
        else {"content": [vllm_content(one, sampling["logprobs"]) for one in drawn]},
    }
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(drawn), "total_tokens": len(ids) + len(drawn)}
    reply = {"request_id": "generate-tokens-1", "output_mode": "tokens", "model": body["model"], "usage": usage}
    return 200, {**reply, "choices": [choice], "prompt_logprobs": None}


def vllm_content(one: Drawn, k: int) -> dict[str, Any]:
    """One token: the drawn one stands first, then come the best, k in all."""
    ranks = {token: rank for rank, (token, _) in enumerate(one.top(len(one.logprobs)), start=1)}
    order = [one.token_id, *(token for token, _ in one.top(k) if token != one.token_id)][:k]
    entries = [{"token_id": token, "logprob": one.logprobs[token], "rank": ranks[token]} for token in order]
    return {**entries[0], "top_logprobs": entries}


def ollama_generate(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /api/generate: no ids, bytes made from text, nothing where no whole character was drawn."""
    engine = stand_in.engine(body.get("model"))
    if engine is None:
        return 404, {"error": f"model '{body.get('model')}' not found"}
    if not 0 <= body.get("top_logprobs", 0) <= 20:
        return 400, {"error": "top_logprobs must be between 0 and 20"}
    ids = engine.encode(body["prompt"])
    if len(ids) >= engine.max_length:
        message = f"request ({len(ids)} tokens) exceeds the available context size ({engine.max_length} tokens)"
        return 400, {"error": f'{{"error":{{"code":400,"message":"{message}, try increasing it"}}}}'}
    options = body["options"]
    seed = None if "logprobs" in body else len(stand_in.requests)
    drawn = draw(stand_in, engine, ids, options["num_predict"], options["temperature"], seed=seed)
    logprobs, pending, text = [], b"", ""
    for one in drawn:
        pending += engine.data(one.token_id)
        whole = pending.decode(errors="ignore").encode() == pending
        if whole and pending:
            text, pending = text + pending.decode(), b""
            if "logprobs" in body:
                logprobs.append(ollama_entry(engine, one, body["top_logprobs"]))
    ended = drawn[-1].token_id == engine.end_id
    reply = {"model": body["model"], "created_at": "2026-11-24T21:54:00Z", "response": text, "done": True}
    reply |= {"done_reason": "stop" if ended else "length", "prompt_eval_count": len(ids), "eval_count": len(drawn)}
    return 200, reply | ({"logprobs": logprobs} if logprobs and "null" not in stand_in.faults else {})


def ollama_entry(engine: TinyEngine, one: Drawn, k: int) -> dict[str, Any]:
    """One token as Ollama writes it."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = engine.text(token, special=False)
        return {"token": text, "logprob": value} | ({"bytes": list(text.encode())} if text else {})

    top = [entry(token, value) for token, value in one.top(k)]
    return {**entry(one.token_id, one.logprobs[one.token_id]), "top_logprobs": top}


def tgi_generate(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST /generate of Text Generation Inference."""
    engine, parameters = only_engine(stand_in), body["parameters"]
    k, limit = parameters.get("top_n_tokens", 0), stand_in.max_logprobs
    if limit is not None and k > limit:
        return tgi_invalid(f"`top_n_tokens` must be >= 0 and <= {limit}. Given: {k}")
    ids, num_tokens = engine.encode(body["inputs"]), parameters["max_new_tokens"]
    if len(ids) + num_tokens > engine.max_length:
        return tgi_invalid(
            f"`inputs` tokens + `max_new_tokens` must be <= {engine.max_length}. Given: {len(ids)} `inputs` tokens and "
            f"{num_tokens} `max_new_tokens`"
        )
    temperature = parameters.get("temperature", 1.0) if parameters["do_sample"] else 0.0
    drawn = engine.generate(ids, num_tokens, temperature=temperature, seed=None if k else len(stand_in.requests))
    if temperature:
        drawn = [damage(one, frozenset({"scaled"}), temperature) for one in drawn]
    ended = drawn[-1].token_id == engine.end_id
    details: dict[str, Any] = {"finish_reason": "eos_token" if ended else "length", "seed": None, "prefill": []}
    details |= {"generated_tokens": len(drawn), "tokens": [tgi_token(engine, one, one.token_id) for one in drawn]}
    if k and "null" not in stand_in.faults:
        details["top_tokens"] = [[tgi_token(engine, one, token) for token in with_ties(one, k)] for one in drawn]
    return 200, {"generated_text": engine.decode([one.token_id for one in drawn]), "details": details}


def tgi_invalid(message: str) -> Reply:
    """A request that TGI does not take."""
    return 422, {"error": f"Input validation error: {message}", "error_type": "validation"}


def tgi_token(engine: TinyEngine, one: Drawn, token: int) -> dict[str, Any]:
    """One token as TGI writes it."""
    own = {"id": token, "text": engine.text(token), "special": not engine.data(token)}
    return {**own, "logprob": one.logprobs[token]}


def with_ties(one: Drawn, k: int) -> list[int]:
    """The k best, and all that equal the last of them."""
    last = one.top(k)[-1][1]
    return [token for token, value in one.top(len(one.logprobs)) if value >= last]


def gemini_generate(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """POST models/MODEL:generateContent."""
    engine, settings = only_engine(stand_in), body["generationConfig"]
    roles = {"system": "system", "user": "user", "model": "assistant"}
    turns = [{"role": "system", **body["systemInstruction"]}] if "systemInstruction" in body else []
    turns += body["contents"]
    messages = [{"role": roles[turn["role"]], "content": turn["parts"][0]["text"]} for turn in turns]
    ids = engine.encode(engine.render(messages))
    if len(ids) >= engine.max_length:
        message = f"The input token count ({len(ids)}) exceeds the maximum number of tokens allowed "
        return error(400, f"{message}({engine.max_length}).", type="INVALID_ARGUMENT")
    if "null" in stand_in.faults:
        return error(400, "Logprobs is not enabled for models/tiny", type="INVALID_ARGUMENT")
    drawn = draw(stand_in, engine, ids, settings["maxOutputTokens"], settings["temperature"])
    ended = drawn[-1].token_id == engine.end_id
    shown = drawn[:-1] if ended else drawn
    text = engine.decode([one.token_id for one in drawn])
    candidate: dict[str, Any] = {"index": 0, "finishReason": "STOP" if ended else "MAX_TOKENS"}
    candidate["content"] = {"role": "model", "parts": [{"text": text}]} if text else {"role": "model"}
    if shown:
        candidate["logprobsResult"] = {
            "chosenCandidates": [gemini_entry(engine, one, one.token_id) for one in shown],
            "topCandidates": [gemini_top(engine, one, settings["logprobs"]) for one in shown],
        }
    return 200, {"candidates": [candidate], "usageMetadata": {"promptTokenCount": len(ids)}, "modelVersion": "tiny"}


def gemini_entry(engine: TinyEngine, one: Drawn, token: int) -> dict[str, Any]:
    """One token as Gemini writes it."""
    return {"token": engine.text(token, special=False), "tokenId": token, "logProbability": one.logprobs[token]}


def gemini_top(engine: TinyEngine, one: Drawn, k: int) -> dict[str, Any]:
    """One position."""
    return {"candidates": [gemini_entry(engine, one, token) for token, _ in one.top(k)]}


def ollama_tags(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """GET /api/tags: what was pulled."""
    return 200, {"models": [{"name": name, "model": name} for name in stand_in.engines]}


def tgi_info(stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
    """GET /info of TGI."""
    return 200, {"model_id": next(iter(stand_in.engines)), "model_pipeline_tag": "text-generation"}


ROUTES: Mapping[str, Mapping[tuple[str, str], Handler]] = {
    "sglang": {
        ("POST", "/generate"): sglang_generate,
        ("GET", "/model_info"): sglang_model_info,
        ("GET", "/v1/models"): sglang_models,
    },
    "vllm-generate": {("POST", "/inference/v1/generate"): vllm_generate, ("GET", "/v1/models"): models},
    "ollama": {("POST", "/api/generate"): ollama_generate, ("GET", "/api/tags"): ollama_tags},
    "tgi": {("POST", "/generate"): tgi_generate, ("GET", "/info"): tgi_info},
    "gemini": {("POST", "/v1beta/models/tiny:generateContent"): gemini_generate},
}
"""Provider -> its routes."""
BASE_PATHS: Mapping[str, str] = {"vllm-generate": "", "ollama": "", "tgi": "", "gemini": "/v1beta"}
"""Where it is not "/v1"."""
