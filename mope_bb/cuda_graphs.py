"""Short steps of a model on a GPU as CUDA graphs: all kernels of a forward are launched at once.

Python takes ten times as long to launch the kernels of one token as the GPU takes to run them, and models that work
beside each other share one Python. A graph has fixed shapes, so a step is padded to the next of a few sizes, and a
graph is recorded for each size that comes twice.

Shapes: B rows of a forward, q new ids of each, L positions that they attend to, V outputs.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from mope_bb.slots import MIN_CAPACITY, SlotCache

MAX_IDS: Final = 64
"""B times q of the largest step: longer ones keep the GPU busy for as long as they are launched."""
NUM_PLAIN: Final = 1
"""Steps of one size before its graph is recorded."""
TOLERANCE: Final = 1e-2
_RECORDING = threading.Lock()
_log = logging.getLogger(__name__)
Size = tuple[int, int, int]
"""B, q, L."""
Forward = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""From ids, positions in the cache and positions for the model (B, q), and L, to outputs (B, q, V)."""


@dataclass(eq=False, slots=True)
class _Graph:
    graph: Any
    inputs: Tensor
    outputs: Tensor


class StepGraphs:
    """The graphs of one model on its slots. It belongs to the thread that runs the model, on the stream of that."""

    def __init__(self, forward: Forward, cache: SlotCache, device: torch.device, *, name: str, max_rows: int) -> None:
        self._name = name
        self._forward = forward
        self._cache = cache
        self._device = device
        self._max_rows = max_rows
        self._is_on = True
        self._pool: Any = None
        self._graphs: dict[Size, _Graph] = {}
        self._seen: Counter[Size] = Counter()
        self._generation = -1

    @property
    def num_graphs(self) -> int:
        """How many are recorded."""
        return len(self._graphs)

    def run(self, new_ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int]) -> Tensor | None:
        """The outputs (B, q, V) of a step; None where it is to be computed without a graph. They last until the next.

        A row of fewer than q ids is padded behind.
        """
        width = max(map(len, new_ids))
        size = self.size_of(len(rows), width, max(starts))
        if not self._is_on or size is None:
            return None
        self._seen[size] += 1
        if self._seen[size] <= NUM_PLAIN:
            return None
        packed = pack(new_ids, rows, starts, size)
        if size not in self._graphs and not self._record(size, packed):
            return None
        found = self._graphs[size]
        found.inputs.copy_(packed)
        found.graph.replay()
        return found.outputs[: len(rows), :width]

    def _record(self, size: Size, packed: Tensor) -> bool:
        try:
            inputs = packed.to(self._device)
            plain = self.step(inputs, size).clone()
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            # Of a process's threads one at a time; the others may use the GPU meanwhile.
            with (
                _RECORDING,
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=torch.cuda.current_stream(self._device),
                    capture_error_mode="thread_local",
                ),
            ):
                outputs = self.step(inputs, size)
            graph.replay()
            gap = float((outputs - plain).abs().max())
            if not gap <= TOLERANCE * max(1.0, float(plain.abs().max())):
                raise RuntimeError(f"its outputs differ by {gap:.3g}")
        except Exception as error:  # noqa: BLE001  # an architecture may fail in any way
            _log.warning("the model %r goes on without CUDA graphs, several times slower: %s", self._name, error)
            self._is_on = False
            self._graphs.clear()
            return False
        self._graphs[size] = _Graph(graph, inputs, outputs)
        return True

    def size_of(self, num_rows: int, num_ids: int, last_start: int) -> Size | None:
        """What a step is padded to, for which there is room then: powers of two; None for one that is too large."""
        padded_rows, padded_ids = min(_power_of_two(num_rows), self._max_rows), _power_of_two(num_ids)
        if padded_rows * padded_ids > MAX_IDS:
            return None
        length = last_start + padded_ids
        self._cache.reserve(length)
        if self._generation != self._cache.generation:
            # Recorded graphs write where the cache lay before it grew.
            self._graphs.clear()
            self._generation = self._cache.generation
        return padded_rows, padded_ids, min(max(MIN_CAPACITY, _power_of_two(length)), self._cache.capacity)

    def step(self, inputs: Tensor, size: Size) -> Tensor:
        """The outputs (B, q, V) of a step that `pack` made: what is recorded."""
        _, num_ids, length = size
        rows, ids, positions, known = torch.split(inputs, [1, num_ids, num_ids, num_ids], dim=1)
        self._cache.use(rows[:, 0], positions, length)
        return self._forward(ids, positions, known, length)


def pack(new_ids: Sequence[Sequence[int]], rows: Sequence[int], starts: Sequence[int], size: Size) -> Tensor:
    """A step as one tensor (B, 1 + 3q): row, ids, positions in the cache, positions for the model.

    Beyond the last row it stands again: what is computed twice is written twice to one place.
    """
    num_rows, num_ids, _ = size
    lines = [
        [
            row,
            *ids,
            *[0] * (num_ids - len(ids)),
            *range(start, start + num_ids),
            # Padding may reach beyond the last position that a model knows.
            *range(start, start + len(ids)),
            *[start + len(ids) - 1] * (num_ids - len(ids)),
        ]
        for ids, row, start in zip(new_ids, rows, starts, strict=True)
    ]
    return torch.tensor(lines + lines[-1:] * (num_rows - len(lines)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
