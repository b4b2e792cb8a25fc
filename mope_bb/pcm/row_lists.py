"""The top-k lists of local models for many answers at once, and their alignment into candidates.

Shapes: B answers, N experts, K one expert's top-k, C candidates, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.errors import ContextLengthError
from mope_bb.pcm.alignment import tails_and_floors
from mope_bb.pcm.mixture import IMPOSSIBLE, Lists
from mope_bb.providers.base import with_system
from mope_bb.readings import exact
from mope_bb.row_batch import RowBatch
from mope_bb.types import Message

NO_KEY: Final = 2**62
"""Stands for "no piece" where keys are sorted: behind all others."""
END_KEY: Final = -1
"""Keys are token ids; END's stands in front."""


@dataclass(frozen=True, eq=False)
class LocalModel:
    """A causal LM in this process, as one expert uses it."""

    model: Any
    tokenizer: ChatTokenizer
    system: str | None
    top_k: int

    @property
    def max_length(self) -> int:
        """How many ids it can read."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 2**31)

    def encode(self, messages: Sequence[Message], *, expert: str) -> tuple[int, ...]:
        """The ids of the prompt. Raises RequestError."""
        ids = self.tokenizer.encode_chat(with_system(messages, self.system), expert=expert)
        if len(ids) > self.max_length:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, the model reads at most {self.max_length}",
                expert=expert,
                provider="local",
            )
        return ids


class Feed:
    """One model and the answers that ask it."""

    def __init__(self, model: LocalModel, rows: Tensor) -> None:
        self.rows = rows
        self._model = model
        self._batch = RowBatch(model.model)
        self._ends = torch.tensor(sorted(model.tokenizer.end_ids), dtype=torch.long)
        self.vocab_size = 0

    def start(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return self._top(self._batch.start(prompts))

    def advance(self, next_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """The next lists of the answers that go on: those with an id in `next_ids`."""
        ids = next_ids[self.rows]
        going = (ids >= 0).nonzero()[:, 0]
        if len(going) < len(self.rows):
            self.rows = self.rows[going]
            if len(going):
                self._batch.keep(going)
        return self._top(self._batch.advance(ids[going])) if len(going) else None

    def _top(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and logprobs, (B, K), from outputs (B, V). END's key is -1; all end ids add up in it."""
        logprobs = torch.log_softmax(exact(outputs), dim=-1)
        ends = torch.logsumexp(logprobs[:, self._ends], dim=-1, keepdim=True)
        logprobs[:, self._ends] = -math.inf
        self.vocab_size = logprobs.shape[1] - len(self._ends) + 1
        values, keys = torch.cat([ends, logprobs], dim=-1).topk(min(self._model.top_k, self.vocab_size))
        return keys.cpu() - 1, values.cpu()


def align_rows(keys: Tensor, values: Tensor, *, vocab_sizes: Sequence[int]) -> tuple[Tensor, Lists]:
    """`alignment.align` for many answers: the candidates' keys (B, C) and the lists, from keys and logprobs (B, N, K).

    Candidates stand in the order of their keys, END first, padded with NO_KEY. A list that is empty was not asked for.
    """
    num_rows, num_experts, width = keys.shape
    flat, order = keys.reshape(num_rows, -1).sort(dim=-1, stable=True)
    is_new = torch.ones_like(flat, dtype=torch.bool)
    is_new[:, 1:] = flat[:, 1:] != flat[:, :-1]
    places = is_new.cumsum(dim=-1) - 1
    num_candidates = int((is_new & (flat != NO_KEY)).sum(dim=-1).max())
    # One place more than needed: what is no piece goes there and is cut off.
    places = places.clamp_max(num_candidates).masked_fill(flat == NO_KEY, num_candidates)
    candidates = torch.full((num_rows, num_candidates + 1), NO_KEY).scatter(1, places, flat)[:, :-1]
    place_of = torch.empty_like(places).scatter(1, order, places).reshape(num_rows, num_experts, width)
    logprobs = torch.full((num_rows, num_experts, num_candidates + 1), -math.inf, dtype=values.dtype)
    logprobs = logprobs.scatter(2, place_of, values.masked_fill(keys == NO_KEY, -math.inf))[..., :-1]
    asked = (keys != NO_KEY).any(dim=-1)
    counts = (keys != NO_KEY).sum(dim=-1)
    masses, smallest = values.exp().sum(dim=-1), values.masked_fill(keys == NO_KEY, math.inf).amin(dim=-1)
    missing = np.array(vocab_sizes) - counts.numpy()
    tails, floors = map(torch.from_numpy, tails_and_floors(masses.numpy(), smallest.numpy(), missing))
    return candidates, Lists(logprobs, floors.masked_fill(~asked, IMPOSSIBLE), tails.masked_fill(~asked, 0.0))
