"""One token step, and the answer that is made of them. Chat, server, evaluation and rollouts all come through here.

ask the experts  |  score with the PCM          (both need only the prefix, so they run at the same time)
          align -> features -> weights -> merge -> shape -> draw
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import torch

from mope_bb.pcm.merging import Plan, merge_step
from mope_bb.pcm.runner import Judgement, Scorer
from mope_bb.pcm.sampling import check_sampling, draw, shape_distribution
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import END, Context, SamplingOptions, TokenDistribution, TokenStep


async def decode(
    context: Context, plan: Plan, pool: ExpertPool, scorer: Scorer, options: SamplingOptions, *, seed: int
) -> AsyncIterator[TokenStep]:
    """Yield the steps of one answer, END included, at most `options.max_tokens` pieces.

    One uniform number per step from a generator of this answer's own: equal seeds and equal distributions give equal
    answers. Raises ProviderError, AlignmentError, PcmError, ConfigError.
    """
    check_sampling(options)
    generator = random.Random(seed)
    await pool.open(plan.asked)
    if options.max_tokens > 1:
        pool.check_can_continue(plan.asked)
    for _ in range(options.max_tokens):
        distributions, judgement = await _both(pool, scorer, plan, context)
        merged = merge_step(plan, distributions, judgement.head_scores, judgement.gate)
        shaped = shape_distribution(merged.log_pi, temperature=options.temperature, top_p=options.top_p)
        index = draw(shaped, generator.random())
        step = TokenStep(
            piece=merged.candidates.pieces[index],
            logprob=float(shaped[index]),
            experts=plan.asked,
            candidates=merged.candidates,
            index=index,
            weights=(*((0.0,) if plan.rule.needs_base else ()), *merged.weights.tolist()),
            missed_mass=merged.missed_mass,
            floor_mass=merged.floor_mass,
            entropy=float(torch.special.entr(shaped.exp()).sum()),
            policy_version=judgement.policy_version,
        )
        yield step
        if step.piece == END:
            return
        context = context.extended(step.piece)


async def _both(
    pool: ExpertPool, scorer: Scorer, plan: Plan, context: Context
) -> tuple[list[TokenDistribution], Judgement]:
    """Experts and PCM at the same time; if one fails the other is cancelled and the failure is raised itself."""
    scoring = asyncio.ensure_future(scorer.judge(context, plan.preference_text, plan.experts))
    try:
        distributions = await pool.ask(plan.asked, context)
        return distributions, await scoring
    finally:
        scoring.cancel()
