"""Several learner processes (`accelerate launch`) that share the work of every optimiser step.

The first process samples, scores, keeps the ledger and decides; it tells the others each lesson as plain bytes, and all
of them take their share of each optimiser step's pairs. Gradients are added up, so the update is that of one process
up to the order of a sum. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor

from mope_bb.errors import ConfigError

PATIENCE: Final = timedelta(days=7)
"""How long a process waits for the next lesson: sampling may take any time."""


class Team:
    """One process alone."""

    rank: int = 0
    size: int = 1

    def share(self, pairs: Sequence[Any]) -> Sequence[Any]:
        """This process's part of the pairs of an optimiser step."""
        return pairs[self.rank :: self.size]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the sum of each tensor over all processes, in place."""

    def tell(self, message: Message) -> None:
        """The first process tells the others."""

    def listen(self) -> Message:
        """What the first process tells next."""
        raise AssertionError("there is nobody to listen to")


@dataclass(frozen=True, slots=True)
class Message:
    """What one process tells another."""

    facts: dict[str, Any]
    """Numbers and names, as JSON holds them; `kind` says what it is."""
    parts: Sequence[bytes] = ()


class AccelerateTeam(Team):
    """Processes that `accelerate launch` started."""

    def __init__(self) -> None:
        """Join the others. Raises ConfigError where accelerate is missing."""
        try:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs
        except ImportError:
            raise ConfigError(
                "several learner processes need the package accelerate", hint="pip install 'mope-bb[train]'"
            ) from None
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
        )
        self.rank, self.size = self._accelerator.process_index, self._accelerator.num_processes

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        # One message for all of them.
        # The PCM's gradients may lie on a GPU, the loss and the features' never do.
        flat = torch.cat([tensor.flatten().to(self._accelerator.device) for tensor in tensors])
        summed = self._accelerator.reduce(flat, reduction="sum").to(flat.dtype)
        for tensor, part in zip(tensors, summed.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def tell(self, message: Message) -> None:
        head = json.dumps({**message.facts, "parts": [len(part) for part in message.parts]}).encode()
        self._broadcast(torch.tensor([len(head), sum(map(len, message.parts))]))
        self._broadcast(torch.frombuffer(bytearray(b"".join([head, *message.parts])), dtype=torch.uint8))

    def listen(self) -> Message:
        sizes = self._broadcast(torch.zeros(2, dtype=torch.long)).tolist()
        data = bytes(self._broadcast(torch.zeros(sum(sizes), dtype=torch.uint8)).tolist())
        facts = json.loads(data[: sizes[0]])
        parts, start = [], sizes[0]
        for length in facts.pop("parts"):
            parts.append(data[start : start + length])
            start += length
        return Message(facts, parts)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        from accelerate.utils import broadcast

        found: Tensor = broadcast(tensor.to(self._accelerator.device))
        return found.cpu()


def join_team() -> Team:
    """The team that this process was started in, or this process alone. Raises ConfigError."""
    return AccelerateTeam() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Team()
