"""The KV caches of many open answers: which row holds which sequence of ids, and how a forward writes and reads rows.

Each open answer owns a slot, a row of the KV tensors. What its caller only guesses (a draft) stands behind the settled
ids: a request that contradicts the guess goes on in the same row from where it differs. Nothing is erased then: what
stands behind the last new position is not seen, and is overwritten in time.

Shapes: B rows of a forward, q new ids of each.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Cache

MIN_CAPACITY: Final = 128


class SlotCache(Cache):  # type: ignore[misc]  # untyped base
    """KV tensors of shape (slots, heads, capacity, head size) per layer; each row has its own length."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(layers=[])
        self._num_slots = num_slots
        self._kv: list[tuple[Tensor, Tensor] | None] = []
        self.capacity = 0
        """Positions that each row has room for."""
        self.generation = 0
        """How often the tensors were moved."""
        self._rows: slice | Tensor = slice(0, 0)
        self._positions: tuple[Tensor, Tensor] | None = None
        self._start = 0
        self._length = 0

    def prepare(self, rows: Sequence[int], starts: Sequence[int], width: int, device: torch.device) -> None:
        """The next forward writes `width` positions of each of the ascending `rows`, from its start on."""
        self._start, self._length = max(starts), max(starts) + width
        self.reserve(self._length)
        # Neighbours are read in place. Of scattered rows attention gets a copy: all that every layer holds of them.
        adjoin = rows[-1] - rows[0] + 1 == len(rows)
        self._rows = slice(rows[0], rows[-1] + 1) if adjoin else torch.tensor(rows, device=device)
        self._positions = None
        if len(rows) > 1:
            positions = torch.tensor(starts)[:, None] + torch.arange(width)
            self._positions = (torch.tensor(rows, device=device)[:, None], positions.to(device))

    def use(self, rows: Tensor, positions: Tensor, length: int) -> None:
        """The next forward writes at `positions` (B x q) of `rows` (B), and reads the first `length` positions."""
        self._rows, self._positions = rows, (rows[:, None], positions)
        self._start, self._length = 0, length

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in each row."""
        if length > self.capacity:
            self.capacity = max(MIN_CAPACITY, 2 * length)
            self._kv = [None if pair is None else (self._grown(pair[0]), self._grown(pair[1])) for pair in self._kv]
            self.generation += 1

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B x heads x q x size); return those of the whole sequences."""
        while len(self._kv) <= layer_idx:
            self._kv.append(None)
        pair = self._kv[layer_idx]
        if pair is None:
            shape = (self._num_slots, key_states.shape[1], self.capacity)
            pair = (
                key_states.new_zeros(*shape, key_states.shape[3]),
                value_states.new_zeros(*shape, value_states.shape[3]),
            )
            self._kv[layer_idx] = pair
        for store, new in zip(pair, (key_states, value_states), strict=True):
            if self._positions is None:
                store[self._rows, :, self._start : self._length] = new
            else:
                rows, positions = self._positions
                store[rows, :, positions] = new.transpose(1, 2)
        return pair[0][self._rows, :, : self._length], pair[1][self._rows, :, : self._length]

    @torch.no_grad()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` positions of row `source`."""
        for pair in self._kv:
            if pair is not None:
                for store in pair:
                    store[target, :, :length] = store[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What the row of a forward of one row holds already; a forward of several is told all positions instead."""
        return self._start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The same: the place of the first new id."""
        return self._start

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of what a layer attends to: all positions, also where a window hides the first ones."""
        return self._length, 0


@dataclass(eq=False, slots=True)
class Slot:
    """A row of the cache, and what it holds."""

    row: int
    ids: array[int] = field(default_factory=lambda: array("q"))
    num_settled: int = 0
    """How many of `ids` belong to an answer for sure; the rest is a guess that its next request may contradict."""
    last_used: int = 0


class Slots:
    """Finds for each request the slot whose sequence it continues."""

    def __init__(self, num_slots: int) -> None:
        self.cache: Final = SlotCache(num_slots)
        self._slots = [Slot(row) for row in range(num_slots)]
        self._clock = 0

    def __len__(self) -> int:
        return len(self._slots)

    def assign(self, ids: array[int], num_settled: int, num_outputs: int, taken: Collection[int]) -> tuple[Slot, int]:
        """A slot in none of the rows `taken`, and how many of `ids` it holds already: not the last `num_outputs`."""
        self._clock += 1
        best, known = self._slots[0], num_common(self._slots[0].ids, ids)
        for slot in self._slots[1:]:
            # A better one shares the next id as well, which tells most of them apart at once.
            if len(slot.ids) > known < len(ids) and slot.ids[known] == ids[known]:
                common = num_common(slot.ids, ids)
                if common > known:
                    best, known = slot, common
        shared = min(known, len(ids) - num_outputs)
        if best.row in taken or known < best.num_settled:
            # The best match belongs to an answer that went elsewhere: branch off into the slot unused for longest.
            target = min((slot for slot in self._slots if slot.row not in taken), key=lambda slot: slot.last_used)
            if target is not best and shared:
                self.cache.copy_prefix(best.row, target.row, shared)
            best = target
        # From here on the slot holds what is computed already; the forward adds the rest.
        best.ids = ids[:shared]
        best.num_settled = min(shared, num_settled)
        best.last_used = self._clock
        return best, shared

    def forget(self) -> None:
        """Empty all slots."""
        for slot in self._slots:
            slot.ids, slot.num_settled = array("q"), 0


def num_common(left: array[int], right: array[int]) -> int:
    """Length of the common prefix."""
    # Arrays are compared and sliced at the speed of memory, which a loop over a long prompt is not.
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    low, high = 0, shorter
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle)
    return low


def causal_masks(config: Any, positions: Tensor, length: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Additive causal masks (B x 1 x q x length) for new ids at `positions` (B x q), one per kind of layer.

    Padding at the end of a row lies after its last true position, so no true position ever sees it.
    """

    def additive(allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )

    keys = torch.arange(length, device=positions.device)
    allowed = keys <= positions[:, None, :, None]
    window = getattr(config, "sliding_window", None)
    near = allowed if window is None else allowed & (keys > positions[:, None, :, None] - window)
    if getattr(config, "layer_types", None):
        return {"full_attention": additive(allowed), "sliding_attention": additive(near)}
    return additive(near)
