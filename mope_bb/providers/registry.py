"""Which adapter a provider's name means. The only place that knows them; each is imported when first used."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mope_bb.cache import DistributionCache
from mope_bb.config import ExpertConfig
from mope_bb.errors import ConfigError
from mope_bb.providers.base import Expert
from mope_bb.providers.dialects import CHAT, COMPLETIONS

PROVIDERS: Final = {
    "llamacpp": "mope_bb.providers.llamacpp",
    "local": "mope_bb.providers.local",
    "scripted": "mope_bb.providers.scripted",
    "sglang": "mope_bb.providers.sglang",
    "vllm-generate": "mope_bb.providers.vllm_generate",
    "ollama": "mope_bb.providers.ollama",
    "tgi": "mope_bb.providers.tgi",
    "gemini": "mope_bb.providers.gemini",
    **dict.fromkeys(COMPLETIONS, "mope_bb.providers.completions"),
    **dict.fromkeys(CHAT, "mope_bb.providers.chat"),
}
"""Provider -> module with a function `open_expert(config, cache) -> Expert`."""
DRAWING: Final = frozenset(("ollama", "tgi", *COMPLETIONS, *CHAT))
"""Those that can be asked for a token without logprobs."""


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> Expert:
    """Build the adapter that `config.provider` names. Raises ConfigError."""
    module = PROVIDERS.get(config.provider)
    if module is None:
        nearest = difflib.get_close_matches(config.provider, PROVIDERS, n=1, cutoff=0.5)
        raise ConfigError(
            f"expert {config.name!r}: unknown provider {config.provider!r}",
            hint=(f"Did you mean {nearest[0]!r}? " if nearest else "") + f"Known: {', '.join(PROVIDERS)}.",
        )
    if not config.logprobs and config.provider not in DRAWING:
        raise ConfigError(
            f"expert {config.name!r}: `logprobs` is false, and provider {config.provider!r} always asks for logprobs",
            hint="Take the line out; or name the provider of an endpoint that gives none, such as chat or completions.",
        )
    open_one: Callable[[ExpertConfig, DistributionCache | None], Expert] = importlib.import_module(module).open_expert
    replicas = config.replicas()
    if len(replicas) == 1:
        return _as_configured(open_one(replicas[0], cache), config)
    from mope_bb.providers.replicas import ReplicatedExpert

    # One retry layer: what one address failed to answer is asked at the next.
    opened = [open_one(one.model_copy(update={"max_retries": 0}), cache) for one in replicas]
    replicated = ReplicatedExpert(opened, timeout_s=config.timeout_s, max_retries=config.max_retries)
    return _as_configured(replicated, config)


def _as_configured(expert: Expert, config: ExpertConfig) -> Expert:
    """`expert`, which gives no lists where the configuration says so."""
    if not config.logprobs:
        expert.capabilities = replace(expert.capabilities, gives_lists=False, drafts="none", score="none")
    return expert
