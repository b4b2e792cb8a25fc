"""What callers of a model want of its rows of outputs, computed where the rows are.

Shapes: N rows, V outputs of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Reading = Callable[[Tensor], Tensors]
"""From rows (N, V), on the model's device and in its type, to tensors of N rows each on the CPU. Requests with equal
readings that share a forward share the call, so it is a function, or a frozen dataclass."""


def whole_rows(rows: Tensor) -> tuple[Tensor]:
    """A `Reading`: the rows themselves, in float32."""
    return (rows.to("cpu", torch.float32),)


def exact(rows: Tensor) -> Tensor:
    """`rows` in float64: on their own device, but for MPS, which has no such numbers."""
    return (rows.cpu() if rows.device.type == "mps" else rows).double()
