"""From what the PCM and the experts say to one score per expert: pure functions, called by sampling and learning alike.

Shapes: E experts, F features; leading batch dimensions are allowed in front of all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

import torch
from torch import Tensor

from mope_bb.pcm.arrays import Array, Mask, converted, namespace_of
from mope_bb.pcm.features import FEATURES

SIGN: Final = {"entropy": -1.0, "divergence": 1.0}


class Gate(ABC):
    """Scores of the experts; 0 leaves the user's own weight as it is."""

    @property
    def is_head_alone(self) -> bool:
        """Whether the scores are the head's: then no features are needed."""
        return False

    @abstractmethod
    def scores(self, head_scores: Array, phi: Array, asked: Mask) -> Array:
        """(..., E) from the PCM's head (..., E), the experts' features (..., E, F) and who was asked (..., E)."""


@dataclass(frozen=True, eq=False)
class LinearGate(Gate):
    """s_i = head_i + u . phi_i, the PCM's own."""

    feature_weights: Tensor = field(default_factory=lambda: torch.zeros(len(FEATURES)))
    """u, (F,)."""

    @cached_property
    def is_head_alone(self) -> bool:
        return not (self.feature_weights.requires_grad or bool(self.feature_weights.any()))

    def scores(self, head_scores: Array, phi: Array, asked: Mask) -> Array:
        return head_scores + phi @ converted(self.feature_weights, phi)


@dataclass(frozen=True)
class Router(Gate):
    """Gives each step to one expert: the one with the smallest entropy, or the largest divergence. Needs no training.

    With the linear rule its weight is then 1.
    """

    feature: Literal["entropy", "divergence"]

    def scores(self, head_scores: Array, phi: Array, asked: Mask) -> Array:
        xp = namespace_of(phi)
        value = SIGN[self.feature] * phi[..., FEATURES.index(self.feature)]
        chosen = xp.argmax(xp.where(asked, value, -math.inf), axis=-1, keepdims=True)
        scores: Array = xp.where(xp.arange(value.shape[-1]) == chosen, xp.zeros_like(value), -math.inf)
        return scores
