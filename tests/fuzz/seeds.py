"""Good bodies that the fuzzer starts from: recorded ones of real engines, and some by hand where none can run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

BODIES: Final = Path(__file__).parents[1] / "unit" / "bodies"


def recorded(*names: str) -> tuple[Any, ...]:
    """Recorded replies by the names of their files."""
    return tuple(json.loads((BODIES / f"{name}.json").read_text(encoding="utf-8"))["reply"] for name in names)


def recorded_like(pattern: str) -> tuple[Any, ...]:
    """Recorded replies by a pattern of their files."""
    return recorded(*sorted(path.stem for path in BODIES.glob(f"{pattern}.json")))


SGLANG: Final = {
    "text": " x",
    "output_ids": [99],
    "meta_info": {
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "output_token_logprobs": [[-0.3, 99, None]],
        "output_top_logprobs": [[[-0.3, 99, None], [-2.0, 7, None], [-4.5, 0, None]]],
    },
}
SGLANG_ABORTED: Final = {
    "meta_info": {
        "finish_reason": {
            "type": "abort",
            "message": "The input is longer than the model's context",
            "status_code": 400,
        },
        "prompt_tokens": 3,
    }
}
SGLANG_SCORED: Final = {
    "text": "",
    "meta_info": {
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": 4,
        "input_token_logprobs": [[None, 5, None], [-0.3, 99, None], [-5.0, 7, None]],
        "input_top_logprobs": [None, [[-0.3, 99, None], [-2.0, 7, None]], [[-0.5, 8, None], [-1.5, 0, None]]],
        "output_token_logprobs": [[-0.9, 6, None]],
        "output_top_logprobs": [[[-0.9, 6, None], [-1.1, 8, None]]],
    },
}
OLLAMA: Final = {
    "response": "!",
    "done": True,
    "done_reason": "length",
    "prompt_eval_count": 3,
    "logprobs": [
        {
            "token": "!",
            "logprob": -0.3,
            "bytes": [33],
            "top_logprobs": [
                {"token": "!", "logprob": -0.3, "bytes": [33]},
                {"token": "?", "logprob": -2.0, "bytes": [63]},
                {"token": "\ufffd", "logprob": -3.0, "bytes": [239, 191, 189]},
                {"token": "", "logprob": -4.0},
            ],
        }
    ],
}
OLLAMA_ENDED: Final = {"response": "", "done": True, "done_reason": "stop", "prompt_eval_count": 3}
TGI: Final = {
    "generated_text": " x",
    "details": {
        "finish_reason": "length",
        "generated_tokens": 1,
        "tokens": [{"id": 99, "text": " x", "logprob": -0.3, "special": False}],
        "top_tokens": [
            [
                {"id": 99, "text": " x", "logprob": -0.3, "special": False},
                {"id": 7, "text": "y", "logprob": -2.0, "special": False},
                {"id": 0, "text": "", "logprob": -4.0, "special": True},
            ]
        ],
    },
}
GEMINI: Final = {
    "candidates": [
        {
            "content": {"role": "model", "parts": [{"text": "Use"}]},
            "finishReason": "MAX_TOKENS",
            "logprobsResult": {
                "chosenCandidates": [{"token": "Use", "tokenId": 7, "logProbability": -0.3}],
                "topCandidates": [
                    {
                        "candidates": [
                            {"token": "Use", "tokenId": 7, "logProbability": -0.3},
                            {"token": "<end_of_turn>", "tokenId": 8, "logProbability": -2.0},
                        ]
                    }
                ],
            },
        }
    ],
    "usageMetadata": {"promptTokenCount": 3, "thoughtsTokenCount": 5},
    "promptFeedback": {},
}
GEMINI_BLOCKED: Final = {"promptFeedback": {"blockReason": "SAFETY"}}
GEMINI_ENDED: Final = {"candidates": [{"finishReason": "STOP", "content": {}}], "usageMetadata": {}}
CHAT_MISTRAL: Final = {
    "choices": [
        {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": "a", "reasoning_content": None},
            "logprobs": {
                "content": [
                    {
                        "token": "a",
                        "bytes": [97],
                        "logprob": -0.5,
                        "top_logprobs": [
                            {"token": "a", "bytes": [97], "logprob": -0.5},
                            {"token": "b", "bytes": None, "logprob": -1.5},
                            {"token": "c", "id": 70, "logprob": -9999.0},
                        ],
                    }
                ]
            },
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "completion_tokens_details": {"reasoning_tokens": 0}},
}
CHAT_LEGACY: Final = {
    "choices": [
        {
            "finish_reason": "stop",
            "text": "a",
            "message": {"content": "<think>"},
            "logprobs": {
                "tokens": ["a", "b"],
                "token_logprobs": [-0.5, None],
                "token_ids": [5, 6],
                "top_logprobs": [{"a": -0.5, "b": -1.5}, None],
            },
        }
    ]
}
CHAT_REFUSED: Final = {"error": {"message": "upstream", "code": 429, "metadata": {"raw": "busy"}}, "choices": []}
DRAWN: Final = {
    "choices": [
        {"index": 0, "text": " bike", "message": {"content": " bike"}, "finish_reason": "eos", "token_ids": [5]}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}
LLAMACPP_ROUTES: Final = {
    "/tokenize": {"tokens": [17, 4]},
    "/tokenize of an end": {"tokens": [0]},
    "/apply-template": {"prompt": "<|user|>Hi"},
    "/detokenize": {"content": "<|user|>"},
    "/props": {"eos_token": "<|end|>", "default_generation_settings": {"n_ctx": 512}},
    "/v1/models": {"data": [{"id": "base", "meta": {"n_vocab": 1280}}]},
}
DISCOVERED: Final = (
    {"/model_info": {"tokenizer_path": "t", "is_generation": True}, "/v1/models": {"data": [{"id": "m"}]}},
    {"/props": {"default_generation_settings": {}}, "/v1/models": {"data": [{"id": "m", "parent": "m"}]}},
    {"/info": {"model_id": "m", "model_type": {"classifier": {}}}},
    {"/api/tags": {"models": [{"name": "m"}]}},
    {"/v1/models": {"data": [{"id": "m", "owned_by": "vllm"}]}, "/openapi.json": {"paths": {"/classify": {}}}},
)
ERRORS: Final = (
    {"error": {"message": "model_not_found", "type": "x", "code": 404}},
    {"message": "This model's maximum context length is 512 tokens"},
    {"detail": [{"loc": ["body"], "msg": "top_logprobs must be at most 20"}]},
    {"error": {"message": "Provider returned error", "metadata": {"raw": "logprobs is not supported"}}},
    {"error": "insufficient_quota"},
)
RETRY_AFTER: Final = (
    "30",
    "0.5",
    "Wed, 21 Oct 2026 07:28:00 GMT",
    "Fri, 31 Dec 9999 23:59:59 -0000",
    "1e9",
    "-1",
    "Mon, 01 Jan 2026 00:00:00 +9999",
)
REWARDS: Final = {
    "vllm": {"data": [{"index": 0, "label": "LABEL_0", "probs": [3.81], "num_classes": 1}]},
    "pooling": {"data": [{"index": 0, "object": "pooling", "data": [3.81]}]},
    "sglang": [{"embedding": [3.81], "meta_info": {"prompt_tokens": 3}}],
    "tei": [{"score": 3.81, "label": "LABEL_0"}],
}
JUDGED: Final = (
    '{"verdict": "A"}',
    '```json\n{"verdict": "TIE"}\n```',
    '{"grade": 7}',
    '{"grade": 7, "grade": 8}',
    'I think {"verdict": "B"}',
)
CONFIG: Final = {
    "experts": [
        {"name": "a", "dimension": "concise", "provider": "vllm", "base_url": "http://x/v1", "top_k": 5},
        {"name": "b", "provider": "chat", "base_url": ["http://x", "http://y"], "extra_body": {"n": {"m": 1}}},
        {"name": "c", "base": True, "provider": "scripted", "script": [{"a": 0.5, "<end>": 0.5}]},
    ],
    "dimensions": {
        "concise": {"text": "Be concise.", "reward": {"kind": "judge", "base_url": "http://x", "model": "m"}},
        "kind": {"reward": {"kind": "remote", "provider": "vllm", "base_url": "http://x"}},
    },
    "pcm": {"path": "p", "device": "cpu"},
    "merge": {"rule": "product", "product_scale": 1.5},
    "decoding": {"mode": "auto", "max_ahead": 8},
    "budget": {"max_calls": 10, "max_cost": 0.5},
    "cache": {"enabled": False, "max_bytes": 1000},
    "train": {"prompts": "p.txt", "eta": "auto", "preferences": {"axes": [["concise", "kind"]], "sizes": [1, 0, 0]}},
    "presets": {"short": {"concise": 1.0, "a": 0.5}},
}
PROMPTS: Final = (
    '{"prompt": "How do I fix a bike?"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n',
    '{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "?"}]}',
    "How do I fix a bike?\nHello\n",
)
CONVERSATIONS: Final = (
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "7", "tool_call_id": "call_1"},
        {"role": "user", "content": "And?"},
    ],
    "Hi",
)
PREFERENCES: Final = (
    "concise=0.7, friendly=0.3",
    "concise,friendly",
    "short and funny, please",
    "text: concise",
    "short",
    "a=1e300,b=1e300",
)
PCM_DOCUMENT: Final = {
    "format": 1,
    "experts": ["concise", "friendly"],
    "features": {"entropy": 0.0, "divergence": 0.1, "tail_mass": 0.0},
    "prompt_layout": "chat-2",
    "policy_version": 3,
    "rule": "product",
}
