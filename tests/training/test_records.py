"""A rollout through the ledger's bytes and back."""

from __future__ import annotations

import zlib

import pytest
import torch

from mope_bb.errors import TrainingError
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import Lists, MergeRule
from mope_bb.pcm.rollouts import Rollout, RolloutRequest
from mope_bb.training.records import decode_rollout, encode_rollout
from mope_bb.types import END, Message, Piece

PLAN = Plan(MergeRule("linear"), ("concise", "friendly"), (0.5, 0.5), None, "")
REQUEST = RolloutRequest((Message("user", "Hi"),), PLAN, 7)
ROLLOUT = Rollout(
    REQUEST,
    (Piece(b"a", 3), Piece("é".encode()[:1], None), Piece(b"", 9), END),
    "stop",
    Lists(
        torch.tensor([[[-0.1, -float("inf")], [-0.3, -1e-30]]] * 4),
        torch.full((4, 2), -float("inf")),
        torch.full((4, 2), 0.25),
    ),
    torch.tensor([0, 1, 1, 0]),
    torch.tensor([-0.1, -1 / 3, 0.0, -2.0], dtype=torch.float64),
    torch.full((4, 2), 0.5),
    torch.full((4,), 0.7),
    torch.tensor([3, 3, 4, 5]),
)


def test_bytes_and_back() -> None:
    """Everything is as it was, to the last bit and type; the request comes from whoever reads."""
    again = decode_rollout(encode_rollout(ROLLOUT), REQUEST)
    assert (again.pieces, again.finish_reason, again.request) == (ROLLOUT.pieces, "stop", REQUEST)
    assert (again.text, again.policy_version) == (ROLLOUT.text, 3)
    for name in ("index", "logprobs", "weights", "entropies", "policy_versions"):
        one, other = getattr(ROLLOUT, name), getattr(again, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for name in ("logprobs", "floors", "tails"):
        assert torch.equal(getattr(ROLLOUT.lists, name), getattr(again.lists, name))


@pytest.mark.parametrize("data", [b"", b"garbage", zlib.compress(b"garbage"), encode_rollout(ROLLOUT)[:-20]])
def test_damaged_bytes_are_an_error(data: bytes) -> None:
    """Not a crash, and never a wrong rollout."""
    with pytest.raises(TrainingError, match="cannot be read"):
        decode_rollout(data, REQUEST)
