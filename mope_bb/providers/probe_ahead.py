"""What a live endpoint says of several positions at once, compared with what it says of each alone: for `probe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mope_bb.providers.base import Expert
from mope_bb.providers.comparing import same_list
from mope_bb.types import END, Context, DraftStep, TokenDistribution

NUM_AHEAD: Final = 8
SEED: Final = 1


async def draft_as_for_mixing(expert: Expert, context: Context, top_k: int) -> tuple[DraftStep, ...]:
    """What it writes as near temperature 1 as it can: there a list that depends on what was drawn shows."""
    temperature = expert.draft_temperature(1.0)
    return await expert.draft(context, top_k=top_k, num_tokens=NUM_AHEAD, temperature=temperature, seed=SEED)


async def drafts_as_asked(expert: Expert, context: Context, top_k: int) -> bool:
    """Whether the lists along a draft are those of single questions."""
    steps = await draft_as_for_mixing(expert, context, top_k)
    return await _as_asked(expert, context, steps, [step.distribution for step in steps], top_k)


async def scores_as_asked(expert: Expert, context: Context, top_k: int) -> bool:
    """Whether the scores of what it wrote are the lists of single questions."""
    steps = await draft_as_for_mixing(expert, context, top_k)
    path = [step.piece for step in steps[:-1]]
    return await _as_asked(expert, context, steps, await expert.score(context, path, top_k=top_k), top_k)


async def _as_asked(
    expert: Expert, context: Context, steps: Sequence[DraftStep], lists: Sequence[TokenDistribution], top_k: int
) -> bool:
    for position, listed in enumerate(lists):
        path = [step.piece for step in steps[:position]]
        assert END not in path
        if not same_list(listed, await expert.next_tokens(context.extended(*path), top_k=top_k)):
            return False
    return True
