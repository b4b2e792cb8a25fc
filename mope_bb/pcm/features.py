"""What the experts just said, as numbers for the PCM: phi (E x F), a pure function of the recorded candidates.

F = 3: the entropy of an expert's list in nats, its divergence in nats from the base where the rule asks it, else from
the user's mixture, and its tail mass. None of them depends on the PCM's parameters, so learning recomputes them from a
rollout.
"""

from __future__ import annotations

from typing import Final

from mope_bb.pcm.arrays import Array, at_least, namespace_of

FEATURES: Final = ("entropy", "divergence", "tail_mass")


def expert_features(logprobs: Array, log_lambda: Array, tails: Array, base: Array | None = None) -> Array:
    """phi (..., E, F) from candidate logprobs (..., E, C), log lambda (..., E) and tail masses (..., E).

    The divergence is KL(p_i || m) over the candidates that i listed, with m = `base` (..., C), filled where it listed
    nothing, or m = sum_i lambda_i p_i, both as returned.
    """
    xp = namespace_of(logprobs)
    probabilities = xp.exp(logprobs)
    # Finite, so that what is not listed counts 0 times a number.
    logprobs = at_least(logprobs, xp.finfo(logprobs.dtype).min)
    if base is None:
        mixture = xp.exp(log_lambda)[..., None, :] @ probabilities
        reference = xp.log(at_least(mixture, xp.finfo(mixture.dtype).tiny))
    else:
        reference = base[..., None, :]
    entropy = -(probabilities * logprobs).sum(axis=-1)
    divergence = (probabilities * (logprobs - reference)).sum(axis=-1)
    features: Array = xp.stack((entropy, divergence, tails), axis=-1)
    return features
