"""Which adapter a provider's name means. The only place that knows them; each is imported when first used."""

from __future__ import annotations

import difflib
import importlib
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


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> Expert:
    """Build the adapter that `config.provider` names. Raises ConfigError."""
    module = PROVIDERS.get(config.provider)
    if module is None:
        nearest = difflib.get_close_matches(config.provider, PROVIDERS, n=1, cutoff=0.5)
        raise ConfigError(
            f"expert {config.name!r}: unknown provider {config.provider!r}",
            hint=(f"Did you mean {nearest[0]!r}? " if nearest else "") + f"Known: {', '.join(PROVIDERS)}.",
        )
    expert: Expert = importlib.import_module(module).open_expert(config, cache)
    return expert
