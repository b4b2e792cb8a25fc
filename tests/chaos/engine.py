"""The stand-ins' engine for very many requests: what a row ranks first is found once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tests.endpoints.engine import Drawn, Row, TinyEngine


class RankedRow(list[float]):
    """V natural logprobs."""

    @cached_property
    def ranking(self) -> list[int]:
        """All token ids, the most probable first."""
        return sorted(range(len(self)), key=lambda one: -self[one])


@dataclass(frozen=True)
class RankedDrawn(Drawn):
    """A drawn token whose list is cut from a ranking that is kept."""

    def top(self, k: int) -> list[tuple[int, float]]:
        assert isinstance(self.logprobs, RankedRow)
        return [(one, self.logprobs[one]) for one in self.logprobs.ranking[:k]]


class QuickEngine(TinyEngine):
    """A `TinyEngine` whose greedy requests cost a look into a row."""

    def row(self, ids: Sequence[int]) -> RankedRow:
        found: Row = super().row(ids)
        assert isinstance(found, RankedRow)
        return found

    def _forward(self, ids: tuple[int, ...]) -> Row:
        return RankedRow(super()._forward(ids))

    def generate(
        self,
        ids: Sequence[int],
        num_tokens: int,
        *,
        temperature: float = 0.0,
        bias: Mapping[int, float] | None = None,
        seed: int | None = None,
    ) -> list[Drawn]:
        if temperature != 0.0:
            drawn = super().generate(ids, num_tokens, temperature=temperature, bias=bias, seed=seed)
            return [RankedDrawn(one.token_id, one.logprobs) for one in drawn]
        raised = bias or {}
        assert all(value > 0.0 for value in raised.values())  # else the best may be one that nobody raised
        found: list[Drawn] = []
        while len(found) < num_tokens and not (found and found[-1].token_id == self.end_id):
            row = self.row((*ids, *(one.token_id for one in found)))
            best = max((row.ranking[0], *raised), key=lambda one: row[one] + raised.get(one, 0.0))
            found.append(RankedDrawn(best, row))
        return found
