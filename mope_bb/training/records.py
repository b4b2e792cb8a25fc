"""Rollouts as bytes and back, bit for bit, for the ledger: safetensors, compressed, nothing executable.

Shapes: T response steps.
"""

from __future__ import annotations

import zlib
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load
from torch import Tensor

from mope_bb.errors import TrainingError
from mope_bb.pcm.mixture import Lists
from mope_bb.pcm.rollouts import Rollout, RolloutRequest
from mope_bb.types import Piece

NO_ID: Final = -2
"""Stands for the id of a piece without one; END's is -1."""
MAX_BYTES: Final = 2**30
"""Of a rollout, unpacked: 10,000 tokens with eight full lists of 3,000 candidates."""
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
    # As numpy: safetensors takes the bytes of torch's tensors through ctypes, which keeps a type for every length.
    return zlib.compress(save({name: tensor.contiguous().numpy() for name, tensor in tensors.items()}), LEVEL)


def decode_rollout(data: bytes, request: RolloutRequest) -> Rollout:
    """The inverse of `encode_rollout`. Raises TrainingError for what it would not have written."""
    try:
        found = load(_decompress(data))
        rollout = Rollout(
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
        _check(rollout)
    except (zlib.error, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TrainingError(f"a rollout of the ledger cannot be read: {str(error)[:200]}") from None
    return rollout


def _decompress(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(data, MAX_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it is cut off, or longer than {MAX_BYTES} bytes")
    return found


def _check(rollout: Rollout) -> None:
    """Raise ValueError unless all of it is of one answer: a ledger may come from a stranger."""
    lists, num_steps = rollout.lists, len(rollout.pieces)
    _, num_experts, num_candidates = lists.logprobs.shape
    by_step = (rollout.index, rollout.logprobs, rollout.entropies, rollout.policy_versions)
    fits = (
        num_steps > 0
        and lists.logprobs.shape[0] == num_steps
        and lists.floors.shape == lists.tails.shape == (num_steps, num_experts)
        and all(tensor.shape == (num_steps,) for tensor in by_step)
        and rollout.weights.dim() == 2
        and rollout.weights.shape[0] == num_steps
        and all(tensor.is_floating_point() for tensor in (*vars(lists).values(), *by_step[1:3], rollout.weights))
        and rollout.index.dtype == rollout.policy_versions.dtype == torch.int64
        and 0 <= int(rollout.index.min()) <= int(rollout.index.max()) < num_candidates
    )
    if not fits:
        raise ValueError("its tensors are not those of one answer")


def _pieces(ids: list[int], lengths: list[int], data: bytes) -> tuple[Piece, ...]:
    if min(lengths, default=0) < 0 or sum(lengths) != len(data) or min(ids, default=0) < NO_ID:
        raise ValueError("its pieces do not fit their bytes")
    pieces, start = [], 0
    for token_id, length in zip(ids, lengths, strict=True):
        pieces.append(Piece(data[start : start + length], None if token_id == NO_ID else token_id))
        start += length
    return tuple(pieces)
