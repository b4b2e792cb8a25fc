"""What the experts just said, as numbers for the PCM: phi (E x F), a pure function of the recorded candidates.

F = 3: the entropy of an expert's list in nats, its divergence in nats from the base where the rule asks it, else from
the user's mixture, and its tail mass. None of them depends on the PCM's parameters, so learning recomputes them from a
rollout.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FEATURES: Final = ("entropy", "divergence", "tail_mass")


def expert_features(logprobs: Tensor, log_lambda: Tensor, tails: Tensor, base: Tensor | None = None) -> Tensor:
    """phi (..., E, F) from candidate logprobs (..., E, C), log lambda (..., E) and tail masses (..., E).

    The divergence is KL(p_i || m) over the candidates that i listed, with m = `base` (..., C), filled where it listed
    nothing, or m = sum_i lambda_i p_i, both as returned.
    """
    probabilities = logprobs.exp()
    reference = (log_lambda.exp().unsqueeze(-2) @ probabilities).log() if base is None else base.unsqueeze(-2)
    # Finite, so that what is not listed counts 0 times a number.
    lowest = torch.finfo(logprobs.dtype).min
    logprobs, reference = logprobs.clamp_min(lowest), reference.clamp_min(lowest)
    entropy = -(probabilities * logprobs).sum(dim=-1)
    divergence = (probabilities * (logprobs - reference)).sum(dim=-1)
    return torch.stack((entropy, divergence, tails), dim=-1)
