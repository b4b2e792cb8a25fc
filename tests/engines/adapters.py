"""LoRA adapters for tests: random ones, because it is the serving that is tested."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

RANK = 4
_SPREAD = 0.3
"""Of the second factor, which peft starts at zero: large enough that the adapter speaks differently from its base."""


def build_adapter(base: Path, folder: Path, *, seed: int) -> None:
    """Write a random adapter of the model in `base` to `folder`, in peft's own layout."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=_SPREAD)
        model.save_pretrained(str(folder))


def load_merged(base: Path, folder: Path) -> Any:
    """The model in `base` with the adapter in `folder` added to its weights, in float32: the truth about a server."""
    from peft import PeftModel

    with _quiet():
        adapted: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder)
        )
        return adapted.merge_and_unload().eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that peft asks transformers by a name that is to change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
