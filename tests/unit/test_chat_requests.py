"""The exact request of every dialect of OpenAI's chat completions."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from mope_bb.providers.chat import FORCE_BIAS, build_request
from mope_bb.providers.dialects import CHAT
from mope_bb.providers.endpoint import Ask
from mope_bb.types import Message

USER = Message("user", "How do I fix a bike?")
BASE: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "How do I fix a bike?"}],
    "max_tokens": 1,
    "temperature": 0.0,
    "logprobs": True,
    "top_logprobs": 5,
}
OPENAI = {name: value for name, value in BASE.items() if name != "max_tokens"} | {"max_completion_tokens": 1}
VLLM = BASE | {"add_special_tokens": False, "skip_special_tokens": False}
EXPECTED: dict[str, dict[str, Any]] = {
    "openai": OPENAI,
    "azure": OPENAI,
    "xai": BASE | {"temperature": 1.0},
    "openrouter": BASE | {"temperature": 1.0, "provider": {"allow_fallbacks": False, "require_parameters": True}},
    "mistral": BASE | {"temperature": 1.0},
    "deepseek": BASE | {"temperature": 1.0, "thinking": {"type": "disabled"}},
    "vllm-chat": VLLM,
    "sglang-chat": BASE,
    "llamacpp-chat": BASE | {"temperature": 1.0},
    "mope": BASE,
    "chat": BASE,
}
CONTINUED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openrouter": ({}, {}),
    "mistral": ({"prefix": True}, {}),
    "deepseek": ({"prefix": True}, {}),
    "vllm-chat": ({}, {"continue_final_message": True, "add_generation_prompt": False}),
    "sglang-chat": ({}, {"continue_final_message": True, "add_generation_prompt": False}),
    "llamacpp-chat": ({}, {}),
    "mope": ({}, {"continue_final_message": True, "add_generation_prompt": False}),
    "chat": ({}, {}),
}
"""What leaves the last message open: in the message, and beside it."""


def request(name: str, answer: str = "", *, ask: Ask | None = None, **options: Any) -> dict[str, Any]:
    """The body of a question in the dialect `name`."""
    messages = options.pop("messages", [USER])
    return build_request(messages, answer, ask or Ask(5), dialect=CHAT[name], model="m", **options)


@pytest.mark.parametrize("name", CHAT)
def test_first_question_of_each_dialect(name: str) -> None:
    """Nothing but what the dialect says, and no message of the assistant."""
    assert request(name) == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in CHAT if CHAT[name].prefill != "none"])
def test_continued_answer_of_each_dialect(name: str) -> None:
    """The answer so far is the last message, left open in the dialect's own way."""
    in_message, beside = CONTINUED[name]
    last = {"role": "assistant", "content": "Use it ", **in_message}
    assert request(name, "Use it ") == EXPECTED[name] | {"messages": [*BASE["messages"], last]} | beside


@pytest.mark.parametrize("name", CHAT)
def test_ways_to_continue_and_capabilities_agree(name: str) -> None:
    """An endpoint continues messages, or nothing; a list of ids promises bytes."""
    dialect = CHAT[name]
    assert dialect.capabilities.prefill == ("none" if dialect.prefill == "none" else "messages")
    assert not dialect.capabilities.ids_in
    assert dialect.source


def test_ids_are_asked_for_where_a_tokenizer_can_read_them() -> None:
    """Without a tokenizer "token_id:17" would say nothing."""
    assert request("vllm-chat", with_ids=True) == VLLM | {"return_tokens_as_token_ids": True}
    assert request("mistral", with_ids=True) == EXPECTED["mistral"]


def test_forced_token() -> None:
    """A bias in OpenAI's shape."""
    assert request("llamacpp-chat", forced_id=64) == EXPECTED["llamacpp-chat"] | {"logit_bias": {"64": FORCE_BIAS}}


def test_extra_body_is_merged_into_tables_and_changes_no_dialect() -> None:
    """Pinning a provider keeps the rest of `provider`; the user's own values win."""
    before = copy.deepcopy(CHAT["openrouter"].extra)
    body = request("openrouter", extra_body={"provider": {"only": ["X"], "allow_fallbacks": True}, "seed": 1})
    assert body["provider"] == {"only": ["X"], "allow_fallbacks": True, "require_parameters": True}
    assert body["seed"] == 1
    assert CHAT["openrouter"].extra == before
    assert request("openai", extra_body={"reasoning_effort": "none"}) == OPENAI | {"reasoning_effort": "none"}


def test_what_is_asked_goes_before_what_is_configured() -> None:
    """`doctor` compares temperatures: the one in `extra_body` is only the default."""
    extra = {"temperature": 0.7}
    assert request("chat", extra_body=extra)["temperature"] == 0.7
    asked = request("chat", ask=Ask(3, num_tokens=8, temperature=0.5), extra_body=extra)
    assert (asked["temperature"], asked["max_tokens"], asked["top_logprobs"]) == (0.5, 8, 3)


def test_tool_calls_keep_openais_shape() -> None:
    """An agent's history arrives as it was."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [USER, Message("assistant", "", (json.dumps(call),)), Message("tool", "rain", tool_call_id="c1")]
    assert request("openai", messages=messages)["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
