"""LoRA adapters on the PCM's backbone, through peft."""

from __future__ import annotations

import warnings

from mope_bb.errors import ConfigError
from mope_bb.pcm.model import HEADS, PreferenceControlModel


def add_lora(pcm: PreferenceControlModel, *, rank: int) -> None:
    """Freeze the backbone of `pcm` and train a LoRA adapter of `rank` on all its linear layers, and the head.

    Saving writes the merged model, and the adapter itself in `adapter/`. Raises ConfigError where peft is missing.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise ConfigError("`lora_rank` needs the package peft", hint="pip install 'mope-bb[train]'") from None
    config = LoraConfig(
        task_type=TaskType.TOKEN_CLS,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        # The head starts at zero: peft trains it whole, and it must not be adapted as well.
        exclude_modules=list(HEADS),
    )
    with warnings.catch_warnings():
        # peft asks transformers by a name that is to change; nothing that the user could do.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        pcm.model = get_peft_model(pcm.model, config)
    pcm.model.eval()
