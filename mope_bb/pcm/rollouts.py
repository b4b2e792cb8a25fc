"""A rollout: one sampled answer with all that is needed to recompute its log-probability for any PCM.

Nothing in it depends on the PCM's parameters but `logprobs`, what the policy that acted gave to the pieces it drew.

Shapes: T response steps, E experts asked (the base first where the rule needs it), C candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mope_bb.errors import MopeError
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import Lists
from mope_bb.text import TextAssembler
from mope_bb.types import FinishReason, Message, Piece, SamplingOptions, TokenStep

Progress = Callable[[int, int], None]
"""Told how many answers are finished, of how many."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One answer to be sampled."""

    messages: tuple[Message, ...]
    plan: Plan
    seed: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """A sampled answer, END included where it came."""

    request: RolloutRequest
    pieces: tuple[Piece, ...]
    """T pieces."""
    finish_reason: FinishReason
    lists: Lists
    """What the experts said: logprobs (T, E, C), floors and tails (T, E), float32."""
    index: Tensor
    """Which candidate was drawn, (T,)."""
    logprobs: Tensor
    """log pi of the drawn pieces under the policy that acted, before temperature and top_p, (T,) float64."""
    weights: Tensor
    """(T, E) of the styled experts, without the base."""
    entropies: Tensor
    """Of the distribution that was drawn from, in nats, (T,)."""
    policy_versions: Tensor
    """The version of the policy that drew each piece, (T,)."""

    @property
    def policy_version(self) -> int:
        """The oldest of them, from which staleness counts."""
        return int(self.policy_versions[0])

    @cached_property
    def text(self) -> str:
        """The answer's text."""
        assembler = TextAssembler()
        return "".join([*(assembler.feed(piece) for piece in self.pieces), assembler.flush()])

    def __len__(self) -> int:
        return len(self.pieces)


@dataclass(frozen=True, slots=True)
class FailedRollout:
    """An answer that could not be sampled, and why."""

    request: RolloutRequest
    error: MopeError


class Sampler(ABC):
    """Samples many answers with one policy."""

    @abstractmethod
    def sample(
        self, requests: Sequence[RolloutRequest], options: SamplingOptions, *, progress: Progress | None = None
    ) -> list[Rollout | FailedRollout]:
        """One rollout per request, in order; a failure costs that rollout only. `options.seed` is not read."""


def rollout_of(request: RolloutRequest, steps: Sequence[TokenStep], finish_reason: FinishReason) -> Rollout:
    """The rollout of an answer that `decode` gave, sampled at temperature 1 and top_p 1."""
    width = max(step.candidates.logprobs.shape[1] for step in steps)
    num_experts = len(steps[0].experts)
    logprobs = torch.full((len(steps), num_experts, width), -torch.inf)
    for row, step in zip(logprobs, steps, strict=True):
        said = torch.from_numpy(step.candidates.logprobs)
        row[:, : said.shape[1]] = said
    first = 1 if request.plan.rule.needs_base else 0
    return Rollout(
        request,
        tuple(step.piece for step in steps),
        finish_reason,
        Lists(
            logprobs,
            torch.tensor([step.candidates.floors for step in steps]),
            torch.tensor([step.candidates.tails for step in steps]),
        ),
        torch.tensor([step.index for step in steps]),
        torch.tensor([step.logprob for step in steps], dtype=torch.float64),
        torch.tensor([step.weights[first:] for step in steps]),
        torch.tensor([step.entropy for step in steps]),
        torch.tensor([step.policy_version for step in steps]),
    )
