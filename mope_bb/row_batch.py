"""A causal model that continues many sequences in step: one forward for all of them, KV tensors without gaps.

`inference.BatchedModel` serves open answers that come and go; this is for a batch that starts together (rollouts,
evaluation) and costs a fraction of it per token. Left out on purpose: paged memory, sequences that join later.

Shapes: B rows, L prompt ids, Q new ids of a forward, V output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache

from mope_bb.slots import causal_masks

MAX_OUTPUTS: Final = 2**25
"""Numbers in one forward's output: prompts are read in groups of rows that stay below it."""
MIN_CAPACITY: Final = 64


class RowCache(Cache):  # type: ignore[misc]  # untyped base
    """KV tensors of shape (B, heads, capacity, head size) per layer; every row has its own length."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._kv: list[tuple[Tensor, Tensor]] = []
        self._rows = slice(0, 0)
        self._num_rows = 0
        self._capacity = 0
        self._positions = torch.zeros(0, 0, dtype=torch.long)
        self._length = 0

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` rows of `length` positions."""
        self._num_rows = num_rows
        if length > self._capacity:
            self._capacity = max(MIN_CAPACITY, 2 * length)
            self._kv = [(self._grown(keys), self._grown(values)) for keys, values in self._kv]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self._capacity, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def prepare(self, rows: slice, positions: Tensor, length: int) -> None:
        """The next forward writes at `positions` (B x Q) of `rows` and attends to the first `length` positions."""
        self._rows, self._positions, self._length = rows, positions, length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B x heads x Q x size); return those of the whole sequences."""
        if layer_idx == len(self._kv):
            shape = (self._num_rows, key_states.shape[1], self._capacity)
            self._kv.append(
                (
                    key_states.new_zeros(*shape, key_states.shape[3]),
                    value_states.new_zeros(*shape, value_states.shape[3]),
                )
            )
        found = []
        index = torch.arange(key_states.shape[0], device=key_states.device)[:, None]
        for store, new in zip(self._kv[layer_idx], (key_states, value_states), strict=True):
            rows = store[self._rows]
            rows[index, :, self._positions] = new.transpose(1, 2)
            found.append(rows[:, :, : self._length])
        return found[0], found[1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._kv = [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in self._kv]
        self._num_rows = len(rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given explicitly, so this is never used to count."""
        return 0


class RowBatch:
    """`start` reads the prompts, `advance` one more id for each row; both return the outputs at the last ids, B x V."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._cache = RowCache()
        self._lengths = torch.zeros(0, dtype=torch.long)

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read `prompts`, none of them empty."""
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=self._device)
        width = int(self._lengths.max())
        self._cache.reserve(len(prompts), width + MIN_CAPACITY)
        padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts], device=self._device)
        positions = torch.arange(width, device=self._device).expand(len(prompts), width)
        step = max(1, MAX_OUTPUTS // (width * int(self._model.config.vocab_size)))
        outputs = []
        for first in range(0, len(prompts), step):
            rows = slice(first, min(first + step, len(prompts)))
            found = self._forward(padded[rows], positions[rows], rows, width)
            # Padding stands behind a row's last id, so no true position ever sees it.
            last = self._lengths[rows] - 1
            outputs.append(found[torch.arange(len(last), device=self._device), last])
        return torch.cat(outputs)

    @torch.inference_mode()
    def advance(self, ids: Tensor) -> Tensor:
        """Append one id (B,) to each row."""
        positions = self._lengths[:, None]
        length = int(self._lengths.max()) + 1
        self._cache.reserve(len(ids), length)
        found = self._forward(ids.to(self._device)[:, None], positions, slice(0, len(ids)), length)
        self._lengths = self._lengths + 1
        return found[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices into the current ones) only."""
        self._cache.keep(rows.to(self._device))
        self._lengths = self._lengths[rows.to(self._device)]

    def _forward(self, ids: Tensor, positions: Tensor, rows: slice, length: int) -> Tensor:
        self._cache.prepare(rows, positions, length)
        outputs: Tensor = self._model(
            input_ids=ids,
            attention_mask=causal_masks(self._model.config, positions, length, self._dtype),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return outputs.float()
