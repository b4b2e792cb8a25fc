"""The servers come up, say what is asked of them, and are gone afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mope_bb.zoo.build import Zoo
from tests.engines.adapters import load_merged
from tests.engines.servers import (
    API_KEY,
    EngineServer,
    ServerFailedError,
    exchange,
    is_healthy,
    serve_transformers,
    serve_vllm,
)

MESSAGES = [{"role": "user", "content": "Where does the key hang?"}]


def ask(server: EngineServer, path: str, body: dict[str, Any], **options: Any) -> Any:
    """The reply to one POST that must succeed."""
    status, reply = exchange(server.base_url + path, body, **options)
    assert status == 200, reply
    return reply


def next_token(server: EngineServer, ids: list[int], *, model: str) -> dict[int, float]:
    """The whole distribution after `ids`: token id -> logprob."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": -1}
    reply = ask(server, "/v1/completions", {**body, "return_tokens_as_token_ids": True})
    entries = reply["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(key.removeprefix("token_id:")): value for key, value in entries.items()}


@pytest.mark.parametrize("model", ["base", "one", "two"])
def test_vllm_agrees_with_transformers(vllm: EngineServer, model: str) -> None:
    """Base and adapters give whole vocabularies equal to those of transformers in float32, to 1e-4."""
    ids = ask(vllm, "/tokenize", {"model": "base", "messages": MESSAGES})["tokens"]
    if model in vllm.adapters:
        truth = load_merged(vllm.folder, vllm.adapters[model])
    else:
        truth = AutoModelForCausalLM.from_pretrained(vllm.folder, dtype=torch.float32)
    with torch.no_grad():
        expected = truth(torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()

    assert dict(enumerate(expected)) == pytest.approx(next_token(vllm, ids, model=model), abs=1e-4)


def test_vllm_names_base_and_adapters(vllm: EngineServer) -> None:
    """One server lists the base and, as its children, the adapters."""
    _, reply = exchange(vllm.base_url + "/v1/models")

    assert {entry["id"]: entry["parent"] for entry in reply["data"]} == {"base": None, "one": "base", "two": "base"}


def test_vllm_generates_from_ids(vllm: EngineServer) -> None:
    """`/inference/v1/generate` is open and speaks in ids."""
    wanted = {"max_tokens": 1, "temperature": 0, "logprobs": 5}
    reply = ask(vllm, "/inference/v1/generate", {"model": "base", "token_ids": [2, 0, 3], "sampling_params": wanted})

    assert [entry["rank"] for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]] == [1, 2, 3, 4, 5]


def test_vllm_can_be_locked(vllm_locked: EngineServer) -> None:
    """Without the key the answer is 401; with it a list longer than the server's limit is refused."""
    body = {"model": "base", "prompt": [2, 0, 3], "max_tokens": 1, "logprobs": 21}
    refused, _ = exchange(vllm_locked.base_url + "/v1/completions", body)
    capped, reply = exchange(vllm_locked.base_url + "/v1/completions", body, api_key=API_KEY)

    assert (refused, capped) == (401, 400)
    assert "greater than max allowed: 20" in reply["error"]["message"]


def test_vllm_scores_as_transformers_does(vllm_scorer: EngineServer) -> None:
    """`/classify` without activation is the logit of the reward model, to 1e-5."""
    conversation = [*MESSAGES, {"role": "assistant", "content": "On the hook."}]
    tokenizer = AutoTokenizer.from_pretrained(vllm_scorer.folder)
    judge = AutoModelForSequenceClassification.from_pretrained(vllm_scorer.folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(conversation, return_dict=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = judge(ids).logits[0, 0].item()
    body = {"model": "scorer", "messages": conversation, "add_generation_prompt": False, "use_activation": False}

    assert ask(vllm_scorer, "/classify", body)["data"][0]["probs"] == pytest.approx([expected], abs=1e-5)


def test_transformers_serve_gives_no_logprobs(transformers_server: EngineServer) -> None:
    """Logprobs are ignored without a word: the status is 200 and the answer has none."""
    body = {"model": transformers_server.name, "messages": MESSAGES, "max_tokens": 1}
    reply = ask(transformers_server, "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 5})

    assert "logprobs" not in reply["choices"][0]


def test_a_failed_start_shows_the_log(tmp_path: Path) -> None:
    """A folder without a model is an error that ends with what the server printed."""
    told = pytest.raises(ServerFailedError, match=r"(?s)vLLM ended with status \d+; its log ends with:.*config")
    with told, serve_vllm(tmp_path, name="nothing"):
        pass


def test_a_missing_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment the error says how to build it."""
    monkeypatch.setenv("MOPE_BB_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(ServerFailedError, match="run `make vllm-env`"), serve_transformers(tmp_path):
        pass


def test_an_exception_ends_the_server(nano: Zoo) -> None:
    """Nobody listens any more when the block is left by an exception."""
    with pytest.raises(KeyboardInterrupt), serve_transformers(nano.folder("base")) as url:
        raise KeyboardInterrupt

    assert not is_healthy(url)
