"""Record the replies of vLLM and `transformers serve` in tests/unit/bodies: see the README there.

MOPE_BB_HOME=/tmp/mope-home python -m tests.engines.record_bodies
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mope_bb.providers.completions import build_draw_request
from mope_bb.providers.dialects import COMPLETIONS
from mope_bb.providers.drawing import DrawAsk
from mope_bb.zoo.build import Zoo, build_zoo
from tests.engines.adapters import build_adapter
from tests.engines.servers import API_KEY, exchange, serve_transformers, serve_vllm

BODIES = Path(__file__).resolve().parents[1] / "unit" / "bodies"
QUESTION = {"role": "user", "content": "Where does the key hang?"}
ANSWERED = [QUESTION, {"role": "assistant", "content": "Above the door."}]
MAX_MODEL_LEN = 512
FORCE = 100
"""A `logit_bias` that decides what is sampled; the list that is returned stays raw."""
_RUN_ID = re.compile(r"[0-9a-f]{16}$|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
"""What a server appends to its ids: it differs from run to run."""
_LONG_PROMPT = 100
"""Ids or characters above which a prompt is only described."""


class Recorder:
    """Asks one server and writes what it says."""

    def __init__(self, url: str, prefix: str, folders: Mapping[Path, str], **facts: Any) -> None:
        self._url = url
        self._prefix = prefix
        self._folders = folders
        self._facts = facts

    def record(
        self, name: str, path: str, sent: dict[str, Any] | None = None, *, api_key: str | None = None, **facts: Any
    ) -> Any:
        """Send one request, write `PREFIX_NAME.json` with its reply, and return the reply.

        facts: what a test must know of the model beside what this server's bodies have in common.
        """
        status, reply = exchange(self._url + path, sent, api_key=api_key)
        document = {
            "facts": self._facts | facts,
            "path": path,
            "sent": None if sent is None else self._scrubbed(_described(sent)),
            "status": status,
            "reply": self._scrubbed(reply),
        }
        text = json.dumps(document, indent=1, ensure_ascii=False)
        text = re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda found: f"[{_one_line(found[1])}]", text)
        (BODIES / f"{self._prefix}_{name}.json").write_text(text + "\n", encoding="utf-8")
        return reply

    def _scrubbed(self, value: Any) -> Any:
        """Without folders of this machine, times and ids of this run: they say nothing about the protocol."""
        if isinstance(value, dict):
            return {
                key: 0 if key in ("created", "created_at") else self._scrubbed(inner) for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self._scrubbed(inner) for inner in value]
        if isinstance(value, str):
            for folder, shown in self._folders.items():
                value = value.replace(str(folder), shown)
            value = re.sub(r'"created":\d+', '"created":0', value)  # in a stream, which is text
            value = re.sub(r'("id":"[a-z-]*)[0-9a-f]{16}"', rf'\g<1>{"0" * 16}"', value)
            return _RUN_ID.sub(lambda found: re.sub("[0-9a-f]", "0", found[0]), value)
        return value


def main() -> None:
    """Ask four servers of a nano zoo, one after the other."""
    zoo = build_zoo(size="nano")
    with tempfile.TemporaryDirectory(prefix="mope-adapter-") as folder:
        adapter = Path(folder) / "one"
        build_adapter(zoo.folder("base"), adapter, seed=0)
        record_vllm(zoo, adapter)
    record_locked(zoo)
    record_scorer(zoo)
    record_transformers(zoo)


def record_vllm(zoo: Zoo, adapter: Path) -> None:
    """A server with an adapter: what is asked of an expert."""
    base = zoo.folder("base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    half = tokenizer.encode("🦄", add_special_tokens=False)[0]
    tail = tokenizer.encode("The key", add_special_tokens=False)
    with serve_vllm(
        base, name="base", lora={"one": adapter}, max_model_len=MAX_MODEL_LEN, extra=["--enable-scale-out"]
    ) as url:
        _, told = exchange(url + "/tokenize", {"model": "base", "messages": [QUESTION]})
        ids: list[int] = told["tokens"]
        asked = Recorder(
            url,
            "vllm",
            {base: "/models/base", adapter: "/adapters/one"},
            num_ids=len(ids),
            end_id=tokenizer.eos_token_id,
            half_id=half,
            vocab=len(tokenizer),
            max_model_len=MAX_MODEL_LEN,
        )
        _record_tokenizer(asked, tokenizer)
        _record_completions(asked, ids, half=half, end=tokenizer.eos_token_id, tail=tail)
        _record_chat(asked, half=half, end=tokenizer.eos_token_id)
        _record_generate(asked, ids, end=tokenizer.eos_token_id)
        _record_errors(asked, ids)


def _record_tokenizer(asked: Recorder, tokenizer: Any) -> None:
    asked.record("models", "/v1/models")
    asked.record("version", "/version")
    asked.record("tokenize", "/tokenize", {"model": "base", "messages": [QUESTION], "return_token_strs": True})
    prefilled = {"add_generation_prompt": False, "continue_final_message": True, "return_token_strs": True}
    for name, text in (("empty", ""), ("space", "The key ")):
        messages = [QUESTION, {"role": "assistant", "content": text}]
        asked.record(f"tokenize_prefill_{name}", "/tokenize", {"model": "base", "messages": messages, **prefilled})
    plain = {"model": "base", "add_special_tokens": False, "return_token_strs": True}
    asked.record("tokenize_text", "/tokenize", {**plain, "prompt": "Café 🦄<|end|>"})
    ids = tokenizer.encode("Café 🦄<|end|>", add_special_tokens=False)
    asked.record("detokenize", "/detokenize", {"model": "base", "tokens": ids})
    asked.record("detokenize_half", "/detokenize", {"model": "base", "tokens": ids[-3:-2]})


def _record_completions(asked: Recorder, ids: list[int], *, half: int, end: int, tail: list[int]) -> None:
    path = "/v1/completions"
    plain = {"model": "base", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    sent = {**plain, "return_tokens_as_token_ids": True, "return_token_ids": True}
    asked.record("completion", path, {**sent, "logprobs": 20})
    asked.record("completion_adapter", path, {**sent, "model": "one"})
    asked.record("completion_three", path, {**sent, "max_tokens": 3})
    prefixes = [ids + tail[:count] for count in range(len(tail) + 1)]
    asked.record("completion_list", path, {**sent, "prompt": prefixes})
    asked.record("completion_end", path, {**sent, "max_tokens": 3, "logit_bias": {str(end): FORCE}})
    asked.record("completion_half", path, {**sent, "logit_bias": {str(half): FORCE}})
    asked.record("completion_half_by_text", path, {**plain, "logit_bias": {str(half): FORCE}})
    asked.record("completion_after_half", path, {**sent, "prompt": [*ids, half]})
    asked.record("completion_by_text", path, {**plain, "logprobs": 20, "prompt": [*ids, half]})
    asked.record("completion_chosen_ids", path, {**sent, "logprob_token_ids": [3, 4, 5]})
    asked.record("completion_stream", path, {**sent, "max_tokens": 2, "stream": True})
    asked.record("completion_echo", path, {**sent, "prompt": ids[:4], "max_tokens": 0, "echo": True, "logprobs": 2})


def _record_chat(asked: Recorder, *, half: int, end: int) -> None:
    path = "/v1/chat/completions"
    sent = {"model": "base", "messages": [QUESTION], "max_tokens": 1, "temperature": 0, "logprobs": True}
    sent |= {"top_logprobs": 5}
    with_ids = {**sent, "return_tokens_as_token_ids": True, "return_token_ids": True}
    asked.record("chat", path, sent)
    asked.record("chat_ids", path, with_ids)
    for name, text in (("prefill", "The key"), ("prefill_space", "The key ")):
        messages = [QUESTION, {"role": "assistant", "content": text}]
        prefilled = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
        asked.record(f"chat_{name}", path, {**with_ids, **prefilled, "return_prompt_text": True})
    asked.record("chat_end", path, {**sent, "logit_bias": {str(end): FORCE}})
    asked.record("chat_half", path, {**sent, "logit_bias": {str(half): FORCE}})
    messages = [QUESTION, {"role": "assistant", "content": "The key"}]
    contradiction = {"messages": messages, "add_generation_prompt": True, "continue_final_message": True}
    asked.record("error_prefill", path, {**sent, **contradiction})
    # The generation prompt is the default: leaving it out contradicts as well, in other words.
    asked.record("error_prefill_default", path, {**sent, "messages": messages, "continue_final_message": True})
    asked.record("error_context_chat", path, {**sent, "messages": [{**QUESTION, "content": "a " * 2000}]})
    asked.record("error_top_logprobs", path, {**sent, "logprobs": False})


def _record_generate(asked: Recorder, ids: list[int], *, end: int) -> None:
    path = "/inference/v1/generate"
    wanted = {"max_tokens": 1, "temperature": 0, "logprobs": 5}
    asked.record("generate", path, {"model": "base", "token_ids": ids, "sampling_params": wanted})
    forced = {**wanted, "max_tokens": 3, "logit_bias": {str(end): FORCE}}
    asked.record("generate_end", path, {"model": "base", "token_ids": ids, "sampling_params": forced})


def _record_errors(asked: Recorder, ids: list[int]) -> None:
    path = "/v1/completions"
    sent = {"model": "base", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    asked.record("error_cap", path, {**sent, "logprobs": 101})
    asked.record("error_model", path, {**sent, "model": "nobody"})
    asked.record("error_context", path, {**sent, "prompt": [5] * 1000})
    # One token less than too long: there is no room for an answer, and the message speaks of max_tokens.
    asked.record("error_context_full", path, {**sent, "prompt": [5] * MAX_MODEL_LEN})
    asked.record("error_vocabulary", path, {**sent, "prompt": [50_000]})
    asked.record("error_route", "/v1/nothing", {})
    asked.record("error_field", path, {**sent, "prompt": {"text": "?"}})


def record_locked(zoo: Zoo) -> None:
    """A server that wants a key, without the routes for scaling out."""
    base = zoo.folder("base")
    with serve_vllm(base, name="base", max_logprobs=20, extra=["--api-key", API_KEY]) as url:
        asked = Recorder(url, "vllm", {base: "/models/base"})
        sent = {"model": "base", "prompt": [5], "max_tokens": 1, "logprobs": 5}
        asked.record("error_key", "/v1/completions", sent, api_key="wrong")
        asked.record("error_key_models", "/v1/models")
        wanted = {"model": "base", "token_ids": [5], "sampling_params": {"max_tokens": 1, "logprobs": 5}}
        asked.record("error_generate_closed", "/inference/v1/generate", wanted, api_key=API_KEY)


def record_scorer(zoo: Zoo) -> None:
    """A reward model."""
    folder = zoo.reward_model("concise")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    judge = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    rendered = tokenizer.apply_chat_template(ANSWERED, tokenize=False)
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    with torch.no_grad():
        logit = judge(torch.tensor([ids])).logits[0, 0].item()
    with serve_vllm(folder, name="scorer", runner="pooling", max_model_len=MAX_MODEL_LEN) as url:
        asked = Recorder(url, "vllm", {folder: "/models/scorer"}, logit=logit, num_ids=len(ids))
        sent = {"model": "scorer", "messages": ANSWERED, "add_generation_prompt": False}
        asked.record("classify", "/classify", {**sent, "use_activation": False})
        asked.record("classify_activated", "/classify", sent)
        several = {"model": "scorer", "input": [ids, ids[:5]], "use_activation": False}
        asked.record("classify_list", "/classify", several)
        asked.record("pooling", "/pooling", {**sent, "use_activation": False})
        asked.record("error_context_classify", "/classify", {"model": "scorer", "input": [5] * 1000})
        asked.record("error_model_classify", "/classify", {**sent, "model": "nobody"})
        asked.record("error_scorer_completes", "/v1/completions", {"model": "scorer", "prompt": [5], "max_tokens": 1})


def record_transformers(zoo: Zoo) -> None:
    """A server without logprobs."""
    base = zoo.folder("base")
    with serve_transformers(base) as url:
        asked = Recorder(url, "transformers_serve", {base: "/models/base"})
        asked.record("models", "/v1/models")
        chat = {"model": str(base), "messages": [QUESTION], "max_tokens": 1, "temperature": 0}
        asked.record("chat_logprobs", "/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 5})
        completion = {"model": str(base), "prompt": "Where?", "max_tokens": 1, "temperature": 0, "logprobs": 5}
        asked.record("completion_logprobs", "/v1/completions", completion)
        asked.record("error_ids", "/v1/completions", {**completion, "prompt": [5, 6]})
        asked.record("error_model", "/v1/chat/completions", {**chat, "model": "nobody"})
        prefilled = {"messages": ANSWERED, "add_generation_prompt": False, "continue_final_message": True}
        asked.record("error_prefill", "/v1/chat/completions", {**chat, **prefilled})
        asked.record("error_bias", "/v1/chat/completions", {**chat, "logit_bias": {"0": FORCE}})
        _record_draws(asked, str(base), end=AutoTokenizer.from_pretrained(base).eos_token_id)


def _record_draws(asked: Recorder, model: str, *, end: int) -> None:
    """A token, and the end, as they are drawn without logprobs; and the end where it is the last token."""
    greedy, dialect = DrawAsk(temperature=0.0), COMPLETIONS["transformers"]
    body = build_draw_request("Where?", greedy, dialect=dialect, model=model, end_ids=[end])
    asked.record("draw", "/v1/completions", body)
    config = json.loads(body["generation_config"]) | {"sequence_bias": [[[end], float(FORCE)]]}
    ended = body | {"generation_config": json.dumps(config)}
    asked.record("draw_end", "/v1/completions", ended)
    asked.record("draw_hidden_end", "/v1/completions", ended | {"max_tokens": 1})


def _described(sent: dict[str, Any]) -> dict[str, Any]:
    """The request with an overlong prompt in words."""
    shown = dict(sent)
    for key in ("prompt", "input"):
        if isinstance(sent.get(key), list) and len(sent[key]) > _LONG_PROMPT:
            shown[key] = f"{len(sent[key])} ids"
    if any(len(message["content"]) > _LONG_PROMPT for message in sent.get("messages", ())):
        shown["messages"] = "more text than the context holds"
    return shown


def _one_line(numbers: str) -> str:
    return re.sub(r"\s+", " ", numbers)


if __name__ == "__main__":
    main()
