"""The dense oracle: whole vocabularies in float64, straight from transformers, and the rules written out in numpy.

Independent of the package on purpose: it shares no line with the code that it judges, except for reading token bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


@dataclass(eq=False)
class DenseModel:
    """A causal LM in float64 with its tokenizer."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> DenseModel:
        """Load a Hugging Face folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def prompt_ids(self, question: str) -> list[int]:
        """The rendered chat template."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.inference_mode()
    def logprobs(self, question: str, response: Sequence[int]) -> Array:
        """(T + 1) x V: log p of the next token after every prefix of the response."""
        prompt = self.prompt_ids(question)
        logits = self.model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 :]
        found: Array = torch.log_softmax(logits, dim=-1).numpy()
        return found


def merge_dense(rule: str, lists: Mapping[str, Array], lambdas: Mapping[str, float], base: str | None) -> Array:
    """pi over the vocabulary (V,) with the user's own weights: METHOD section 1, literally."""
    names = list(lambdas)
    if rule == "linear":
        total: Array = np.sum([lambdas[name] * np.exp(lists[name]) for name in names], axis=0)
        return total
    if rule == "geometric":
        score = np.sum([lambdas[name] * lists[name] for name in names], axis=0)
    else:
        assert base is not None
        score = lists[base] + np.sum(
            [len(names) * lambdas[name] * (lists[name] - lists[base]) for name in names], axis=0
        )
    weights: Array = np.exp(score - score.max())
    return weights / math.fsum(weights)


def total_variation(left: Array, right: Array) -> float:
    """Half the sum of absolute differences."""
    return 0.5 * float(np.abs(left - right).sum())
