"""How endpoints of one family differ on the wire, as data. The documentation's table is made from these.

Sources: S the released source or the vendor's SDK types, D documentation, R a real server run here, U not verified
(`mope-bb doctor` finds out). What each field does stands in the module of the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from mope_bb.providers.base import Capabilities
from mope_bb.providers.llamacpp_wire import NOTHING_FILTERED as LLAMACPP_UNFILTERED


@dataclass(frozen=True, slots=True)
class Dialect:
    """What all families share."""

    capabilities: Capabilities
    source: str
    """Where the facts come from."""
    base_url: str | None = None
    """The default address, of hosted APIs."""
    temperature: float = 0.0
    """At which the endpoint returns the model's own logprobs. 0 where it can be: the drawn token is then on top."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Constant fields of every request."""
    nothing_filtered: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a draft, and of a token that is drawn without logprobs, that switch off all that stands between the
    model and what is drawn: servers take defaults for them from the model's generation_config."""
    shows_drawn: Mapping[str, Any] = field(default_factory=dict)
    """Fields with which a token that is drawn without logprobs comes with its id."""


@dataclass(frozen=True, slots=True)
class CompletionsDialect(Dialect):
    """OpenAI's text completions."""

    logprobs: Literal["number", "switch"] = "number"
    """`logprobs: k`, or `logprobs: true` with `top_logprobs: k`."""
    takes_lists: bool = False
    """Several prompts in one request."""
    tells_tokenizer: bool = False
    """`root` of GET /v1/models is the model's folder or hub name."""
    forces_token: bool = False
    """A harmless token must be forced, since a drawn half character costs the list; the list itself stays raw."""
    reports_usage: bool = True
    """`usage.prompt_tokens` counts all that was sent."""
    takes_generation_config: bool = False
    """It is greedy unless a `generation_config` says otherwise, and tells an end only where it may write one token
    more."""


@dataclass(frozen=True, slots=True)
class ChatDialect(Dialect):
    """OpenAI's chat completions."""

    repeats_answer: bool | None = False
    """The answer so far stands before what was drawn; None: on some servers."""
    prefill: Literal["continue_final_message", "prefix", "trailing", "none"] = "none"
    """How a last message of the assistant is continued: by a flag of the request, of the message, or as it is."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    id_fields: Mapping[str, Any] = field(default_factory=dict)
    """Sent where a tokenizer is configured: the list then names tokens by id, and no longer by text."""
    forces_token: bool = False
    """A harmless token must be forced, since a drawn half character costs the list; the list itself stays raw."""
    needs_tokenizer: bool = False
    """The end of the answer is told by its id alone."""
    writes_pieces: bool = False
    """Lists are written from our own pieces: with true bytes, and the end of the answer as the token without any."""
    has_one_tokenizer: bool = False
    """All models of one address have the same, whatever is asked of them."""
    needs_version: bool = False
    """Azure's addresses: the deployment and `api_version` stand in them."""
    hint: str | None = None
    """What to do where there are no logprobs."""


_VLLM_UNFILTERED: Final = {
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""SGLang has the same names."""

COMPLETIONS: Final[Mapping[str, CompletionsDialect]] = {
    "vllm": CompletionsDialect(
        Capabilities(score="prefixes", logprob_noise=1e-4, drafts="exact", max_named=128),
        source="R vLLM 0.32 on CPU; S vLLM 0.33",
        extra={
            # Without it the list is keyed by text, and tokens of equal text fall together.
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        },
        nothing_filtered=_VLLM_UNFILTERED,
        shows_drawn={"return_token_ids": True},
        takes_lists=True,
        tells_tokenizer=True,
    ),
    "sglang-completions": CompletionsDialect(
        Capabilities(
            logprob_scale="scaled",
            ids_out=False,
            byte_exact=False,
            score="prefixes",
            logprob_noise=1e-2,
            drafts="lists",
        ),
        source="S SGLang 0.5.23: 0 is computed as 1; keys are text, parts of characters as latin-1; prefer `sglang`",
        nothing_filtered=_VLLM_UNFILTERED,
        takes_lists=True,
        tells_tokenizer=True,
    ),
    "llamacpp-completions": CompletionsDialect(
        Capabilities(logprob_noise=0.02, drafts="lists"),
        source="R llama.cpp 2026.10: answers in the chat shape, with ids and bytes; prefer `llamacpp`",
        temperature=1.0,
        nothing_filtered=LLAMACPP_UNFILTERED,
        takes_lists=False,
        forces_token=True,
    ),
    "tensorrt-llm": CompletionsDialect(
        Capabilities(ids_out=False, byte_exact=False, logprob_scale="unknown", drafts="lists"),
        source="S trtllm-serve: unknown fields are refused; more than one logprob with the PyTorch backend only",
        takes_lists=True,
    ),
    "fireworks": CompletionsDialect(
        Capabilities(max_top_k=5, score="echo", drafts="lists"),
        source="S fireworks-ai 1.2.30",
        base_url="https://api.fireworks.ai/inference/v1",
        extra={"context_length_exceeded_behavior": "error"},
        logprobs="switch",
        takes_lists=True,
    ),
    "together": CompletionsDialect(
        Capabilities(
            max_top_k=20,
            prefill="text",
            logprob_scale="unknown",
            ids_in=False,
            ids_out=False,
            byte_exact=False,
            drafts="lists",
        ),
        source="S together 3.1.1: both shapes of logprobs are live",
        base_url="https://api.together.ai/v1",
    ),
    "deepseek-completions": CompletionsDialect(
        Capabilities(
            max_top_k=20,
            prefill="text",
            logprob_scale="scaled",
            ids_in=False,
            ids_out=False,
            byte_exact=False,
            drafts="lists",
        ),
        source="D api-docs.deepseek.com (FIM, beta); I logprobs after temperature, so 1 is sent",
        base_url="https://api.deepseek.com/beta",
        temperature=1.0,
    ),
    "transformers": CompletionsDialect(
        Capabilities(
            prefill="text", ids_in=False, ids_out=False, byte_exact=False, eos_visible=False, gives_lists=False
        ),
        source="R `transformers serve` 5.19: needs `logprobs = false`",
        temperature=1.0,
        takes_generation_config=True,
    ),
    "completions": CompletionsDialect(
        Capabilities(
            prefill="text", logprob_scale="unknown", ids_in=False, ids_out=False, byte_exact=False, drafts="lists"
        ),
        source="U any other server with OpenAI's text completions",
    ),
}

NATIVE: Final[Mapping[str, Dialect]] = {
    "llamacpp": Dialect(
        Capabilities(score="forced", logprob_noise=0.02, drafts="exact"),
        source="R llama.cpp 2026.10",
        temperature=1.0,
    ),
    "sglang": Dialect(
        Capabilities(logprob_scale="scaled", score="start_len", logprob_noise=1e-2, drafts="exact"),
        source="S SGLang 0.5.23: logprobs follow the temperature, but 0 is computed as 1",
    ),
    "vllm-generate": Dialect(
        # The drawn piece stands on its list in the place of the last one: only a greedy draft leaves lists as they are.
        Capabilities(logprob_noise=1e-4, drafts="lists", max_named=128),
        source="R vLLM 0.32 on CPU; S vLLM 0.33: for servers started with --enable-scale-out",
    ),
    "ollama": Dialect(
        Capabilities(
            max_top_k=20,
            prefill="text",
            ids_in=False,
            ids_out=False,
            byte_exact=False,
            eos_visible=False,
            logprob_noise=0.02,
            drafts="lists",
        ),
        source="S Ollama 0.33: llama.cpp's logprobs without ids, bytes and the end; prefer `llamacpp`",
    ),
    "tgi": Dialect(
        Capabilities(prefill="text", logprob_scale="scaled", ids_in=False, logprob_noise=1e-2, drafts="lists"),
        source="S TGI 3: lists of at most `--max-top-n-tokens`, 5 by default; no longer developed",
    ),
    "gemini": Dialect(
        Capabilities(
            max_top_k=20,
            prefill="none",
            logprob_scale="unknown",
            ids_in=False,
            ids_out=False,
            byte_exact=False,
            eos_visible=False,
        ),
        source="S google-genai; I many models refuse logprobs, on Vertex fewer; U whether anything is continued",
        base_url="https://generativelanguage.googleapis.com/v1beta",
    ),
}

_CHAT: Final = Capabilities(
    prefill="messages",
    logprob_scale="unknown",
    ids_in=False,
    ids_out=False,
    byte_exact=True,
    eos_visible=True,
    drafts="lists",
)
_OPENAI: Final = replace(_CHAT, max_top_k=20, prefill="none", drafts="none")
_OPENAI_HINT: Final = (
    'Models from gpt-5.1 on give logprobs only where they do not reason: set extra_body = {reasoning_effort = "none"}. '
    "gpt-5 and the o-series give none."
)

CHAT: Final[Mapping[str, ChatDialect]] = {
    "openai": ChatDialect(
        _OPENAI,
        source="S openai 3.54; U logprobs raw, the end of an answer on the list",
        base_url="https://api.openai.com/v1",
        max_tokens_field="max_completion_tokens",
        hint=_OPENAI_HINT,
    ),
    "azure": ChatDialect(
        _OPENAI,
        source="S openai 3.54: OpenAI's bodies, other addresses and another header for the key",
        max_tokens_field="max_completion_tokens",
        needs_version=True,
        hint=_OPENAI_HINT,
    ),
    "xai": ChatDialect(
        replace(_OPENAI, max_top_k=8),
        source="S xai-sdk 1.21; U scale, so 1 is sent",
        base_url="https://api.x.ai/v1",
        temperature=1.0,
    ),
    "openrouter": ChatDialect(
        # Each upstream is another server: what bytes and which scale depends on it.
        replace(_CHAT, max_top_k=20, byte_exact=False),
        source="D openrouter.ai/docs; I upstreams differ in all else, so 1 is sent",
        repeats_answer=None,
        base_url="https://openrouter.ai/api/v1",
        temperature=1.0,
        extra={"provider": {"allow_fallbacks": False, "require_parameters": True}},
        prefill="trailing",
        hint='Pin an upstream that gives logprobs: extra_body = {provider = {only = ["NAME"]}}.',
    ),
    "mistral": ChatDialect(
        replace(_CHAT, ids_out=True),
        source="S mistralai 3.7; U scale (so 1 is sent) and k",
        repeats_answer=True,
        base_url="https://api.mistral.ai/v1",
        temperature=1.0,
        prefill="prefix",
    ),
    "deepseek": ChatDialect(
        replace(_CHAT, max_top_k=20, logprob_scale="scaled", eos_visible=False),
        source="D api-docs.deepseek.com (beta); I logprobs after temperature, so 1 is sent; U end on the list",
        base_url="https://api.deepseek.com/beta",
        temperature=1.0,
        extra={"thinking": {"type": "disabled"}},
        prefill="prefix",
    ),
    "vllm-chat": ChatDialect(
        replace(_CHAT, logprob_scale="raw", ids_out=True, logprob_noise=1e-4),
        source="R vLLM 0.32 on CPU; S vLLM 0.33; prefer `vllm`",
        extra={"add_special_tokens": False, "skip_special_tokens": False},
        prefill="continue_final_message",
        # Without them `bytes` are those of the decoded text, and half characters are "".
        id_fields={"return_tokens_as_token_ids": True},
        nothing_filtered=_VLLM_UNFILTERED,
        shows_drawn={"return_token_ids": True},
    ),
    "sglang-chat": ChatDialect(
        replace(_CHAT, logprob_scale="scaled", logprob_noise=1e-2),
        source="S SGLang 0.5.23: 0 is computed as 1; prefer `sglang`",
        nothing_filtered=_VLLM_UNFILTERED,
        # Without the flag a last message of the assistant becomes one of the user.
        prefill="continue_final_message",
    ),
    "llamacpp-chat": ChatDialect(
        replace(_CHAT, logprob_scale="raw", ids_out=True, logprob_noise=0.02),
        source="R llama.cpp 2026.10; prefer `llamacpp`",
        temperature=1.0,
        nothing_filtered=LLAMACPP_UNFILTERED,
        repeats_answer=True,
        prefill="trailing",
        forces_token=True,
        needs_tokenizer=True,
    ),
    "mope": ChatDialect(
        # Ids and noise are those of the experts behind it.
        replace(_CHAT, max_top_k=256, logprob_scale="raw", logprob_noise=0.02),
        source="R `mope-bb serve`: the merged distribution, with ids where its experts have them",
        prefill="continue_final_message",
        writes_pieces=True,
        has_one_tokenizer=True,
    ),
    "chat": ChatDialect(
        replace(_CHAT, byte_exact=False, eos_visible=False),
        source="U any other server with OpenAI's chat completions",
        repeats_answer=None,
        prefill="trailing",
    ),
}
