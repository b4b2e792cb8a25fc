"""What the experts just said, as numbers for the PCM: phi (E x F), a pure function of the recorded candidates.

F = 3: the entropy of an expert's list in nats, its divergence from the user's mixture in nats, and its tail mass. None
of them depends on the PCM's parameters, so learning recomputes them from a rollout.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FEATURES: Final = ("entropy", "divergence", "tail_mass")


def expert_features(logprobs: Tensor, log_lambda: Tensor, tails: Tensor) -> Tensor:
    """phi (..., E, F) from candidate logprobs (..., E, C), log lambda (..., E) and tail masses (..., E).

    The divergence is KL(p_i || m) over the candidates with m = sum_i lambda_i p_i, both as returned.
    """
    probabilities = logprobs.exp()
    mixture = torch.logsumexp(log_lambda[..., None] + logprobs, dim=-2, keepdim=True)
    zero = torch.zeros_like(logprobs)
    listed = probabilities > 0
    entropy = -torch.where(listed, probabilities * logprobs, zero).sum(dim=-1)
    divergence = torch.where(listed, probabilities * (logprobs - mixture), zero).sum(dim=-1)
    return torch.stack((entropy, divergence, tails), dim=-1)
