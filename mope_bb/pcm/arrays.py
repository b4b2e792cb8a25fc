"""One set of formulas for torch and for numpy.

Learning differentiates them over many tokens at once, in torch. An answer that is being written merges a few hundred
numbers for each token: there the calls alone would cost most of the time, and numpy's are several times cheaper.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = TypeVar("Array", Tensor, NDArray[np.float64])
Mask = Tensor | NDArray[np.bool_]


def namespace_of(values: Tensor | NDArray[Any]) -> Any:
    """The module with the functions for `values`; what is used of it is called alike in both."""
    return torch if isinstance(values, Tensor) else np


def largest(values: Array, *, axis: int) -> Array:
    """The maximum over `axis`, which stays as a dimension of 1."""
    if isinstance(values, Tensor):
        return values.amax(dim=axis, keepdim=True)
    return cast(Array, values.max(axis=axis, keepdims=True))


def at_least(values: Array, bound: float) -> Array:
    """`values`, or `bound` where they are below it."""
    return values.clamp_min(bound) if isinstance(values, Tensor) else np.maximum(values, bound)


def softmax(values: Array) -> Array:
    """Over the last dimension, where one value at least is finite."""
    if isinstance(values, Tensor):
        return torch.softmax(values, dim=-1)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return cast(Array, powers / powers.sum(axis=-1, keepdims=True))


def log_softmax(values: Array) -> Array:
    """Over the last dimension, where one value at least is finite."""
    if isinstance(values, Tensor):
        return torch.log_softmax(values, dim=-1)
    shifted = values - values.max(axis=-1, keepdims=True)
    return cast(Array, shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def converted(parameter: Tensor, values: Array) -> Array:
    """`parameter` as what `values` are."""
    if isinstance(values, Tensor):
        return parameter.to(values.dtype)
    return cast(Array, parameter.detach().double().numpy())
