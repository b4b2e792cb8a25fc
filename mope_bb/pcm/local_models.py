"""Loading `local` experts for batches: each folder once, however many experts speak through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mope_bb.chat_tokenizer import ChatTokenizer, load_chat_tokenizer
from mope_bb.config import ExpertConfig
from mope_bb.errors import ConfigError
from mope_bb.inference import choose_device
from mope_bb.pcm.row_lists import LocalModel
from mope_bb.providers.local import load_model


def are_local(configs: Sequence[ExpertConfig]) -> bool:
    """Whether all of them run in this process."""
    return all(config.provider == "local" for config in configs)


def open_local_models(configs: Sequence[ExpertConfig]) -> dict[str, LocalModel]:
    """Expert name -> its model. Raises ConfigError."""
    models: dict[tuple[str, str], Any] = {}
    tokenizers: dict[str, ChatTokenizer] = {}
    found: dict[str, LocalModel] = {}
    for config in configs:
        if config.model is None:
            raise ConfigError(f"expert {config.name!r}: `model` is missing", hint="Name a Hugging Face folder.")
        key = (config.model, config.device)
        if key not in models:
            models[key] = load_model(config.model, choose_device(config.device)).eval()
        source = config.tokenizer or config.model
        if source not in tokenizers:
            tokenizers[source] = load_chat_tokenizer(source)
        found[config.name] = LocalModel(models[key], tokenizers[source], config.system, config.top_k)
    return found
