"""One token step, and the answer that is made of them. Chat, server, evaluation and rollouts all come through here.

ask the experts  |  score with the PCM          (both need only the prefix, so they run at the same time)
          align -> features -> weights -> merge -> shape -> draw
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mope_bb.pcm.features import expert_features
from mope_bb.pcm.mixture import MergeRule, align, fill_missing, missed_mass
from mope_bb.pcm.runner import Scorer
from mope_bb.pcm.sampling import check_sampling, draw, shape_distribution
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import END, Candidates, Context, SamplingOptions, TokenDistribution, TokenStep


@dataclass(frozen=True, slots=True)
class Plan:
    """Who is asked for one answer, and how what they say is merged."""

    rule: MergeRule
    experts: tuple[str, ...]
    """The styled experts with a positive lambda."""
    lambdas: tuple[float, ...]
    """Their weights, summing to 1."""
    base: str | None
    """Asked first, by a rule that needs it."""
    preference_text: str
    """The preference as the PCM reads it."""

    @property
    def asked(self) -> tuple[str, ...]:
        """Everyone who is asked, in the order of all E-sized fields of a TokenStep."""
        return (self.base, *self.experts) if self.base is not None and self.rule.needs_base else self.experts


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged distribution of one step."""

    candidates: Candidates
    log_pi: Tensor
    """(C,), float64, before temperature and top_p."""
    weights: Tensor
    """(E,) of the styled experts."""
    missed_mass: float | None
    floor_mass: float


def merge_step(
    plan: Plan, distributions: Sequence[TokenDistribution], head_scores: Tensor, feature_weights: Tensor
) -> Merged:
    """Merge what `plan.asked` said, given the PCM's scores (E,) and feature weights (F,). Raises AlignmentError."""
    candidates = align(distributions)
    logprobs = torch.tensor(candidates.logprobs, dtype=torch.float64)
    floors = torch.tensor(candidates.floors, dtype=torch.float64)
    tails = torch.tensor(candidates.tails, dtype=torch.float64)
    log_lambda = torch.tensor(plan.lambdas, dtype=torch.float64).log()
    styled = slice(1 if plan.rule.needs_base else 0, None)
    phi = expert_features(logprobs[styled], log_lambda, tails[styled])
    scores = head_scores.double() + phi @ feature_weights.double()
    weights = plan.rule.weights(log_lambda, scores)
    log_pi = plan.rule.merge(fill_missing(plan.rule, logprobs, floors), weights)
    unlisted = torch.isneginf(logprobs).any(dim=0)
    return Merged(
        candidates,
        log_pi,
        weights,
        missed_mass=float(missed_mass(weights, tails)) if plan.rule.name == "linear" else None,
        floor_mass=float(log_pi.exp()[unlisted].sum()),
    )


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
    for _ in range(options.max_tokens):
        distributions, head_scores = await _both(pool, scorer, plan, context)
        merged = merge_step(plan, distributions, head_scores, scorer.feature_weights)
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
            policy_version=scorer.policy_version,
        )
        yield step
        if step.piece == END:
            return
        context = context.extended(step.piece)


async def _both(
    pool: ExpertPool, scorer: Scorer, plan: Plan, context: Context
) -> tuple[list[TokenDistribution], Tensor]:
    """Experts and PCM at the same time; if one fails the other is cancelled and the failure is raised itself."""
    scoring = asyncio.ensure_future(scorer.head_scores(context, plan.preference_text, plan.experts))
    try:
        distributions = await pool.ask(plan.asked, context)
        return distributions, await scoring
    finally:
        scoring.cancel()
