"""Head scores of many open answers at once: what a PCM, or nothing at all, says about each expert.

Shapes: B open answers, N experts in the columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mope_bb.errors import ContextLengthError
from mope_bb.pcm.gates import Gate, LinearGate
from mope_bb.pcm.model import PreferenceControlModel
from mope_bb.pcm.rollouts import RolloutRequest
from mope_bb.pcm.runner import build_pcm_messages
from mope_bb.row_batch import RowBatch

UNLIMITED: Final = 2**31


class HeadRows(ABC):
    """Head scores of many open answers, a row each."""

    gate: Gate = LinearGate()
    policy_version: int = 0

    def room(self, request: RolloutRequest) -> int:
        """How long an answer to `request` can be read. Raises MopeError if it cannot be read at all."""
        return UNLIMITED

    @abstractmethod
    def start(self, requests: Sequence[RolloutRequest], names: Sequence[str]) -> Tensor:
        """(B, N) before the first piece; columns are `names`."""

    @abstractmethod
    def advance(self, ids: Tensor) -> Tensor:
        """(B, N) after each row's next id, (B,)."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""


class NoHead(HeadRows):
    """Scores of 0: the user's own weights, or a gate that reads only what the experts say."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or LinearGate()
        self._shape = (0, 0)

    def start(self, requests: Sequence[RolloutRequest], names: Sequence[str]) -> Tensor:
        self._shape = (len(requests), len(names))
        return torch.zeros(self._shape)

    def advance(self, ids: Tensor) -> Tensor:
        return torch.zeros(self._shape)

    def keep(self, rows: Tensor) -> None:
        self._shape = (len(rows), self._shape[1])


class PcmRows(HeadRows):
    """A PCM whose tokenizer is the experts' own."""

    def __init__(self, pcm: PreferenceControlModel, *, is_context_free: bool = False) -> None:
        """`is_context_free`: the scores before the first piece hold for the whole answer (an ablation)."""
        self._pcm = pcm
        self._is_context_free = is_context_free
        self._first = torch.zeros(0)
        self._batch = RowBatch(pcm.model)
        self._columns = torch.zeros(0, dtype=torch.long)

    @property
    def gate(self) -> Gate:  # type: ignore[override]  # read when it is used: training changes it
        """The PCM's present gate."""
        return LinearGate(self._pcm.feature_weights.detach())

    @property
    def policy_version(self) -> int:  # type: ignore[override]
        """The PCM's present version."""
        return self._pcm.policy_version

    def room(self, request: RolloutRequest) -> int:
        return pcm_room(self._pcm, request)

    def start(self, requests: Sequence[RolloutRequest], names: Sequence[str]) -> Tensor:
        self._batch = RowBatch(self._pcm.model)
        # An expert that the PCM does not know has score 0: the column of zeros behind its own.
        unknown = len(self._pcm.experts)
        rows = {name: row for row, name in enumerate(self._pcm.experts)}
        self._columns = torch.tensor([rows.get(name, unknown) for name in names])
        prompts = [pcm_prompt_ids(self._pcm, request) for request in requests]
        self._first = self._scores(self._batch.start(prompts))
        return self._first

    def advance(self, ids: Tensor) -> Tensor:
        return self._first if self._is_context_free else self._scores(self._batch.advance(ids))

    def keep(self, rows: Tensor) -> None:
        self._first = self._first[rows]
        if not self._is_context_free:
            self._batch.keep(rows)

    def _scores(self, outputs: Tensor) -> Tensor:
        return torch.nn.functional.pad(outputs.cpu(), (0, 1))[:, self._columns]


def pcm_prompt_ids(pcm: PreferenceControlModel, request: RolloutRequest) -> tuple[int, ...]:
    """What the PCM reads before the answer."""
    return pcm.tokenizer.encode_chat(build_pcm_messages(request.plan.preference_text, request.messages))


def pcm_room(pcm: PreferenceControlModel, request: RolloutRequest) -> int:
    """How many pieces of the answer fit behind the prompt, the last of which is not read. Raises MopeError."""
    limit = int(getattr(pcm.model.config, "max_position_embeddings", 0) or UNLIMITED)
    num_ids = len(pcm_prompt_ids(pcm, request))
    if num_ids > limit:
        raise ContextLengthError(f"preference and prompt have {num_ids} tokens, the PCM reads at most {limit}")
    return limit - num_ids + 1
