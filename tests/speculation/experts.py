"""Experts whose every distribution is known: the next piece depends on the last one only, by a fixed table.

Their lists are shorter than the vocabulary, so that a drafted piece is sometimes not on the drafter's own list.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from itertools import accumulate
from typing import Final
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

from mope_bb.config import parse_config
from mope_bb.pcm.gates import LinearGate
from mope_bb.pcm.runner import Judgement, PathJudgement, Scorer
from mope_bb.providers.base import Capabilities, Expert, build_distribution
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import END, Context, DraftStep, Piece, TokenDistribution

Array = npt.NDArray[np.float64]

PIECES: Final = (*(Piece(letter.encode(), number) for number, letter in enumerate("abcde")), END)
"""The vocabulary, END last."""
START: Final = len(PIECES) - 1
"""Stands for the last piece where the answer is still empty: nothing follows END."""
TOP_K: Final = 3
NAMES: Final = ("base", "red", "green", "blue")
KNOWS_ITS_SIZE: Final = frozenset(("red", "blue"))
"""Experts that tell how many pieces they know: the floors of the others are by another formula."""


def place_of(response: Sequence[Piece]) -> int:
    """The last piece's place in the vocabulary, START for an empty answer."""
    return PIECES.index(response[-1]) if response else START


def make_tables() -> dict[str, Array]:
    """By expert: the probability of each piece (columns) after each last piece (rows), variations of one table.

    With this seed the experts have one favourite in half of the rows, and lists leave out a quarter of the mass.
    """
    rng = np.random.default_rng(131)
    common = rng.normal(0.0, 0.7, (len(PIECES), len(PIECES)))
    tables = {}
    for name in NAMES:
        powers = np.exp(common + rng.normal(0.0, 0.3 if name == "base" else 0.6, common.shape))
        tables[name] = powers / powers.sum(axis=1, keepdims=True)
    return tables


class KnownExpert(Expert):
    """Speaks by its table, and drafts true samples of it, at any temperature; or gives no lists, and only samples."""

    def __init__(self, name: str, table: Array, *, gives_lists: bool = True) -> None:
        self.name = name
        self.capabilities = (
            Capabilities(prefill="pieces", drafts="exact", score="forced")
            if gives_lists
            else Capabilities(prefill="pieces", gives_lists=False)
        )
        self._table = table
        self.list_after = cache(self._build_list)
        """Its list of (top_k) pieces after a place in the vocabulary."""
        self._shaped = cache(self._shape)
        self._random = random.Random(0)

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        await asyncio.sleep(0)
        return self.list_after(place_of(context.response), top_k)

    async def draft(
        self, context: Context, *, top_k: int, num_tokens: int, temperature: float = 1.0, seed: int | None = None
    ) -> tuple[DraftStep, ...]:
        generator = random.Random(seed)
        await asyncio.sleep(0)
        steps: list[DraftStep] = []
        place = place_of(context.response)
        while len(steps) < num_tokens and (not steps or steps[-1].piece != END):
            cumulative, log_q = self._shaped(place, top_k, temperature)
            listed = self.list_after(place, top_k)
            place = bisect.bisect_right(cumulative, generator.random() * cumulative[-1])
            piece = PIECES[place]
            index = listed.pieces.index(piece) if piece in listed.pieces else None
            steps.append(DraftStep(listed, piece, index, log_q))
        return tuple(steps)

    async def score(self, context: Context, draft: Sequence[Piece], *, top_k: int) -> tuple[TokenDistribution, ...]:
        await asyncio.sleep(0)
        places = (place_of(context.response), *map(PIECES.index, draft))
        return tuple(self.list_after(place, top_k) for place in places)

    async def sample(self, context: Context) -> Piece:
        await asyncio.sleep(0)
        return self._random.choices(PIECES, self._table[place_of(context.response)])[0]

    def _build_list(self, place: int, top_k: int) -> TokenDistribution:
        return build_distribution(
            zip(PIECES, map(math.log, self._table[place]), strict=True),
            top_k=top_k,
            end_ids=(END.token_id,),
            vocab_size=len(PIECES) if self.name in KNOWS_ITS_SIZE else None,
            expert=self.name,
        )

    def _shape(self, place: int, top_k: int, temperature: float) -> tuple[list[float], tuple[float, ...]]:
        """What pieces are drawn from, cumulated over the vocabulary, and the same on the list: `DraftStep.log_q`."""
        row = self._table[place]
        powers = np.where(row == row.max(), 1.0, 0.0) if temperature == 0.0 else row ** (1.0 / temperature)
        on_list = np.array([powers[PIECES.index(piece)] for piece in self.list_after(place, top_k).pieces])
        with np.errstate(divide="ignore"):
            log_q = np.log(on_list / on_list.sum())
        return list(accumulate(powers.tolist())), tuple(log_q.tolist())

    async def fingerprint(self) -> str:
        return "known"

    async def aclose(self) -> None:
        """Nothing to free."""


@asynccontextmanager
async def known_pool(experts: Sequence[Expert]) -> AsyncIterator[ExpertPool]:
    """A pool of these experts, all open."""
    named = {expert.name: expert for expert in experts}
    rows = [{"name": name, "provider": "known", "top_k": TOP_K} for name in named]
    pool = ExpertPool(parse_config({"experts": rows}).experts, cache=None)
    with patch("mope_bb.providers.pool.open_expert", lambda config, _: named[config.name]):
        await pool.open(tuple(named))
    try:
        yield pool
    finally:
        await pool.aclose()


def place_scores(num_written: int, place: int, num_experts: int) -> list[float]:
    """What `PlaceScorer` says, by how long the answer is and by its last piece."""
    return [1.5 * math.sin(2.0 + 3.0 * num_written + 5.0 * place + 7.0 * expert) for expert in range(num_experts)]


class PlaceScorer(Scorer):
    """Head scores that differ at every position: a score that is used at a wrong position changes the answers."""

    async def judge(self, context: Context, preference_text: str, experts: Sequence[str]) -> Judgement:
        found = await self.judge_path(context, (), preference_text, experts)
        return Judgement(found.head_scores[0], found.gate, found.policy_version)

    async def judge_path(
        self, context: Context, path: Sequence[Piece], preference_text: str, experts: Sequence[str]
    ) -> PathJudgement:
        await asyncio.sleep(0)
        places = (place_of(context.response), *map(PIECES.index, path))
        rows = [place_scores(number, place, len(experts)) for number, place in enumerate(places, len(context.response))]
        return PathJudgement(torch.tensor(rows), LinearGate(), policy_version=0)
