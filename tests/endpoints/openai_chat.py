"""Stand-ins for the dialects of OpenAI's chat completions: what each makes of messages, and bodies as it writes them.

Faults, beside those of `openai_completions`: "drawn only" gives no lists.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from tests.endpoints.engine import Drawn, Handler, Reply, StandIn, TinyEngine
from tests.endpoints.openai_completions import damage, error, listed

Message = Mapping[str, Any]
Refusal = tuple[int, dict[str, Any]]
ReadMessages = Callable[[TinyEngine, Mapping[str, Any]], Sequence[int] | Refusal]
"""The ids that a server makes of a request's messages, or an error."""
WriteEntry = Callable[[TinyEngine, int, float, Mapping[str, Any]], dict[str, Any]]
"""One token of a list: engine, id, logprob, request."""
AZURE_KEY: Final = "azure-key"
KNOWN: Final = ("model", "messages", "logprobs", "top_logprobs", "temperature", "top_p", "n", "logit_bias", "seed")
"""Fields of servers that refuse what they do not know, beside their own."""


def _is_assistants(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def as_history(engine: TinyEngine, body: Mapping[str, Any]) -> Sequence[int]:
    """OpenAI, Azure, xAI: a last message of the assistant is history, after which a new turn begins."""
    return engine.encode(engine.render(body["messages"]))


def as_trailing(engine: TinyEngine, body: Mapping[str, Any]) -> Sequence[int] | Refusal:
    """llama.cpp and many behind OpenRouter: a last message of the assistant is continued."""
    messages = body["messages"]
    if len(messages) > 1 and _is_assistants(messages[-1]) and _is_assistants(messages[-2]):
        return error(400, "Cannot have 2 or more assistant messages at the end of the list.")
    return engine.encode(engine.render(messages, continue_final=_is_assistants(messages[-1])))


def as_vllm(engine: TinyEngine, body: Mapping[str, Any]) -> Sequence[int] | Refusal:
    """vLLM: continued if `continue_final_message`, which must not stand beside `add_generation_prompt`."""
    continues = body.get("continue_final_message", False)
    if continues and body.get("add_generation_prompt", True):
        return error(
            400, "continue_final_message and add_generation_prompt are not compatible.", type="BadRequestError"
        )
    return engine.encode(engine.render(body["messages"], continue_final=continues))


def as_sglang(engine: TinyEngine, body: Mapping[str, Any]) -> Sequence[int]:
    """SGLang: continued, and tokenized on its own, if `continue_final_message`; else it becomes the user's."""
    *before, last = body["messages"]
    if not _is_assistants(last):
        return as_history(engine, body)
    if body.get("continue_final_message"):
        return [*engine.encode(engine.render(before)), *engine.encode(last["content"])]
    return engine.encode(engine.render([*before, {**last, "role": "user"}]))


def as_mope(engine: TinyEngine, body: Mapping[str, Any]) -> Sequence[int]:
    """`mope-bb serve`: continued if `continue_final_message`, else history."""
    return engine.encode(engine.render(body["messages"], continue_final=body.get("continue_final_message", False)))


def as_mistral(engine: TinyEngine, body: Mapping[str, Any]) -> Sequence[int] | Refusal:
    """Mistral: continued if the message says `prefix`, else refused."""
    last = body["messages"][-1]
    if _is_assistants(last) and last.get("prefix") is not True:
        text = "Expected last role User or Tool (or Assistant with prefix True) for serving but got assistant"
        return 400, {"object": "error", "message": text, "type": "invalid_request_message_order", "code": "3230"}
    return engine.encode(engine.render(body["messages"], continue_final=_is_assistants(last)))


def as_deepseek(engine: TinyEngine, body: Mapping[str, Any]) -> Sequence[int]:
    """DeepSeek's beta: continued if the message says `prefix`, else history."""
    continues = body["messages"][-1].get("prefix") is True
    return engine.encode(engine.render(body["messages"], continue_final=continues))


def _shown(engine: TinyEngine, token: int) -> str:
    """OpenAI's way: half characters as escapes, control tokens by name."""
    data = engine.data(token)
    try:
        return data.decode() or engine.text(token)
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)


def openai_entry(engine: TinyEngine, token: int, value: float, body: Mapping[str, Any]) -> dict[str, Any]:
    """True bytes; null for control tokens."""
    return {"token": _shown(engine, token), "logprob": value, "bytes": list(engine.data(token)) or None}


def text_entry(engine: TinyEngine, token: int, value: float, body: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of the decoded text, so U+FFFD for half characters: Ollama and others."""
    text = engine.text(token, special=False)
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def bare_entry(engine: TinyEngine, token: int, value: float, body: Mapping[str, Any]) -> dict[str, Any]:
    """No bytes at all, as many upstreams of OpenRouter."""
    return {"token": engine.text(token), "logprob": value, "bytes": None}


def vllm_entry(engine: TinyEngine, token: int, value: float, body: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of the decoded text, "" for half characters; with ids "token_id:17", which `bytes` spells as well."""
    text = engine.text(token, special=True)
    text = "" if "\ufffd" in text else text
    if body.get("return_tokens_as_token_ids") and "collisions" not in body["faults"]:
        text = f"token_id:{token}"
    return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode())}


def sglang_entry(engine: TinyEngine, token: int, value: float, body: Mapping[str, Any]) -> dict[str, Any]:
    """The decoded text with true bytes."""
    data = engine.data(token) or engine.text(token).encode()
    return {"token": engine.text(token), "logprob": value, "bytes": list(data)}


def mistral_entry(engine: TinyEngine, token: int, value: float, body: Mapping[str, Any]) -> dict[str, Any]:
    """Ids and bytes, control tokens by name."""
    return {**sglang_entry(engine, token, value, body), "token_id": token}


def mope_entry(engine: TinyEngine, token: int, value: float, body: Mapping[str, Any]) -> dict[str, Any]:
    """Ids and true bytes; the end is "<end>" without any, whatever the model calls it."""
    if token == engine.end_id:
        return {"token": "<end>", "bytes": [], "logprob": value, "token_id": -1}
    data = engine.data(token)
    return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": value, "token_id": token}


def llamacpp_entry(engine: TinyEngine, token: int, value: float, body: Mapping[str, Any]) -> dict[str, Any]:
    """Ids and true bytes; control tokens have neither text nor bytes."""
    data = engine.data(token)
    return {"id": token, "token": data.decode(errors="ignore"), "bytes": list(data), "logprob": value}


def draw(
    engine: TinyEngine, ids: Sequence[int], body: Mapping[str, Any], num_tokens: int, source: random.Random
) -> list[Drawn]:
    """What the server generates; every request draws anew."""
    temperature = body.get("temperature", 1.0)
    bias = {int(token): value for token, value in (body.get("logit_bias") or {}).items()}
    found: list[Drawn] = []
    while len(found) < num_tokens and not (found and found[-1].token_id == engine.end_id):
        (one,) = engine.generate([*ids, *(before.token_id for before in found)], 1, temperature=0.0, bias=bias)
        if temperature:
            scores = [value + bias.get(token, 0.0) for token, value in enumerate(one.logprobs)]
            highest = max(scores)
            weights = [math.exp((value - highest) / temperature) for value in scores]
            one = Drawn(source.choices(range(len(weights)), weights)[0], one.logprobs)
        found.append(one)
    return found


@dataclass(frozen=True)
class Dialect:
    """How one server differs."""

    read: ReadMessages
    write: WriteEntry
    too_long: str = (
        "This model's maximum context length is {limit} tokens. However, your messages resulted in {length}."
    )
    max_k: int | None = None
    too_many: str = "Invalid 'top_logprobs': integer above maximum value. Expected a value <= {limit}, but got {k}."
    max_tokens: str = "max_tokens"
    known: Collection[str] | None = None
    """More fields that it knows; None: it ignores those it does not."""
    lists_end: bool = True
    """The end stands on the lists."""
    loses_list: bool = False
    """A token that ends inside a character has no list; without any, logprobs are null."""
    repeats: bool = False
    """The answer so far stands in `content`."""
    has_flat_errors: bool = False
    is_azure: bool = False

    def __call__(self, stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply:
        """Answer one request."""
        if (refused := self._refusal(stand_in, body, request)) is not None:
            return refused
        engine = stand_in.engine(body["model"])
        assert engine is not None
        ids = self.read(engine, body)
        if isinstance(ids, tuple):
            return ids
        if len(ids) + body[self.max_tokens] > engine.max_length:
            text = self.too_long.format(length=len(ids), limit=engine.max_length)
            return (400, {"object": "error", "message": text}) if self.has_flat_errors else error(400, text)
        drawn = draw(engine, ids, body, body[self.max_tokens], random.Random(len(stand_in.requests)))
        text = engine.decode([one.token_id for one in drawn])
        last = body["messages"][-1]
        if self.repeats and _is_assistants(last):
            text = last["content"] + text
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(engine, drawn, body, stand_in.faults),
            "finish_reason": "stop" if drawn[-1].token_id == engine.end_id else "length",
            "token_ids": [one.token_id for one in drawn] if body.get("return_token_ids") else None,
        }
        if "thinking" in (self.known or ()) and body.get("thinking") != {"type": "disabled"}:
            choice |= {"message": {"role": "assistant", "content": "", "reasoning_content": "Hm"}, "logprobs": None}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(drawn), "total_tokens": len(ids) + len(drawn)}
        return 200, {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}

    def _refusal(self, stand_in: StandIn, body: Mapping[str, Any], request: web.Request) -> Reply | None:
        if self.is_azure and (refused := _azure_refusal(request)) is not None:
            return refused
        if stand_in.engine(body.get("model")) is None:
            return error(404, f"The model `{body.get('model')}` does not exist.", code="model_not_found")
        strange = set() if self.known is None else set(body) - {*KNOWN, *self.known, self.max_tokens}
        if strange:
            return error(400, f"Unrecognized request argument supplied: {min(strange)}")
        k, limit = body.get("top_logprobs"), self.max_k or stand_in.max_logprobs
        if body.keys() & {"logprobs", "top_logprobs"} and (body.get("logprobs") is not True or type(k) is not int):
            return error(
                400, f"logprobs {body.get('logprobs')}, top_logprobs {k}: the tests ask for lists, or for none"
            )
        if limit is not None and k is not None and k > limit:
            return error(400, self.too_many.format(limit=limit, k=k), param="top_logprobs")
        return None

    def _logprobs(
        self, engine: TinyEngine, drawn: Sequence[Drawn], body: Mapping[str, Any], faults: frozenset[str]
    ) -> dict[str, Any] | None:
        visible = [one for one in drawn if self.lists_end or one.token_id != engine.end_id]
        if "null" in faults or "logprobs" not in body:
            return None
        if self.loses_list:
            visible = [one for at, one in enumerate(visible) if _ends_whole(engine, visible[: at + 1])]
            if not visible:
                return None
        k = min(5, body["top_logprobs"]) if "short" in faults else body["top_logprobs"]
        asked = {**body, "faults": faults}
        content = []
        for raw in visible:
            one = damage(raw, faults, body.get("temperature", 1.0))
            # A list holds k entries, the drawn one among them only where it belongs there.
            entries = listed(one, k if self.lists_end else k + 1, faults)
            entries = [entry for entry in entries if self.lists_end or entry[0] != engine.end_id][:k]
            content.append(
                {
                    **self.write(engine, one.token_id, one.logprobs[one.token_id], asked),
                    "top_logprobs": []
                    if "drawn only" in faults
                    else [self.write(engine, token, value, asked) for token, value in entries],
                }
            )
        return {"content": content, "refusal": None}


def _azure_refusal(request: web.Request) -> Reply | None:
    if "authorization" in request.headers or request.headers.get("api-key", AZURE_KEY) != AZURE_KEY:
        return 401, {"error": {"code": "401", "message": "Access denied due to invalid subscription key."}}
    if "api-version" not in request.query:
        return 404, {"error": {"code": "404", "message": "Resource not found"}}
    return None


def _ends_whole(engine: TinyEngine, drawn: Sequence[Drawn]) -> bool:
    data = b"".join(engine.data(one.token_id) for one in drawn)
    return data == data.decode(errors="ignore").encode()


_DIALECTS: Final[Mapping[str, Dialect]] = {
    "openai": Dialect(as_history, openai_entry, max_k=20, max_tokens="max_completion_tokens", known=()),
    "azure": Dialect(as_history, openai_entry, max_k=20, max_tokens="max_completion_tokens", known=(), is_azure=True),
    "xai": Dialect(as_history, openai_entry, max_k=8, known=()),
    "openrouter": Dialect(as_trailing, bare_entry, max_k=20, known=("provider",)),
    "mistral": Dialect(as_mistral, mistral_entry, known=(), repeats=True),
    "deepseek": Dialect(as_deepseek, openai_entry, max_k=20, known=("thinking",), lists_end=False),
    "vllm-chat": Dialect(as_vllm, vllm_entry, too_many="sample logprobs of {k}, greater than max allowed: {limit}"),
    "sglang-chat": Dialect(
        as_sglang,
        sglang_entry,
        too_long="The input ({length} tokens) is longer than the model's context length ({limit} tokens).",
        has_flat_errors=True,
    ),
    "llamacpp-chat": Dialect(
        as_trailing,
        llamacpp_entry,
        too_long="request ({length} tokens) exceeds the available context size ({limit} tokens), try increasing it",
        loses_list=True,
        repeats=True,
    ),
    "mope": Dialect(as_mope, mope_entry, max_k=256, known=("continue_final_message", "add_generation_prompt")),
    "chat": Dialect(as_trailing, text_entry, lists_end=False, loses_list=True),
}
_PATHS: Final = {
    "azure": "/openai/deployments/tiny/chat/completions",
    "openrouter": "/api/v1/chat/completions",
    "deepseek": "/beta/chat/completions",
}
ROUTES: Final[Mapping[str, Mapping[tuple[str, str], Handler]]] = {
    name: {("POST", _PATHS.get(name, "/v1/chat/completions")): dialect} for name, dialect in _DIALECTS.items()
}
"""Provider -> its routes."""
BASE_PATHS: Final[Mapping[str, str]] = {"azure": "", "openrouter": "/api/v1", "deepseek": "/beta"}
"""Where it is not "/v1"."""
FAULTS: Final = {"deepseek": frozenset({"scaled"}), "vllm-chat": frozenset({"drawn first"})}
"""What these do of their own accord."""
SETTINGS: Final[Mapping[str, Mapping[str, object]]] = {
    "azure": {"api_version": "2024-10-21", "tokenizer": None},
    **{name: {"tokenizer": None} for name in ("openai", "xai", "openrouter", "deepseek", "chat")},
}
"""What else an expert needs; nobody has the tokenizers of these."""
