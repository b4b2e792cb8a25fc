"""Rollouts as bytes and back, bit for bit, for the ledger: safetensors, compressed, nothing executable.

Shapes: T response steps.
"""

from __future__ import annotations

import zlib
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mope_bb.errors import TrainingError
from mope_bb.pcm.mixture import Lists
from mope_bb.pcm.rollouts import Rollout, RolloutRequest
from mope_bb.types import Piece

NO_ID: Final = -2
"""Stands for the id of a piece without one; END's is -1."""
LEVEL: Final = 1
"""The lists are mostly padding: more effort saves little."""


def encode_rollout(rollout: Rollout) -> bytes:
    """All of `rollout` but its request, which the run's seed and the pair's id give again."""
    data = b"".join(piece.data for piece in rollout.pieces)
    tensors: dict[str, Tensor] = {
        "piece_ids": torch.tensor([NO_ID if one.token_id is None else one.token_id for one in rollout.pieces]),
        "piece_lengths": torch.tensor([len(piece.data) for piece in rollout.pieces]),
        "piece_bytes": torch.tensor(list(data), dtype=torch.uint8),
        "is_stopped": torch.tensor(rollout.finish_reason == "stop"),
        "list_logprobs": rollout.lists.logprobs,
        "list_floors": rollout.lists.floors,
        "list_tails": rollout.lists.tails,
        "index": rollout.index,
        "logprobs": rollout.logprobs,
        "weights": rollout.weights,
        "entropies": rollout.entropies,
        "policy_versions": rollout.policy_versions,
    }
    return zlib.compress(save({name: tensor.contiguous() for name, tensor in tensors.items()}), LEVEL)


def decode_rollout(data: bytes, request: RolloutRequest) -> Rollout:
    """The inverse of `encode_rollout`. Raises TrainingError for what it would not have written."""
    try:
        found = load(zlib.decompress(data))
        return Rollout(
            request,
            _pieces(found["piece_ids"].tolist(), found["piece_lengths"].tolist(), bytes(found["piece_bytes"].tolist())),
            "stop" if bool(found["is_stopped"]) else "length",
            Lists(found["list_logprobs"], found["list_floors"], found["list_tails"]),
            found["index"],
            found["logprobs"],
            found["weights"],
            found["entropies"],
            found["policy_versions"],
        )
    except (zlib.error, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise TrainingError(f"a rollout of the ledger cannot be read: {error}") from None


def _pieces(ids: list[int], lengths: list[int], data: bytes) -> tuple[Piece, ...]:
    pieces, start = [], 0
    for token_id, length in zip(ids, lengths, strict=True):
        pieces.append(Piece(data[start : start + length], None if token_id == NO_ID else token_id))
        start += length
    return tuple(pieces)
