"""Experts without logprobs: draw the expert with its weight, then a piece from that expert alone (METHOD section 4).

That is exactly the linear mixture, and needs no probabilities; but none can be told either, so such answers are for
reading only: nothing can be learned from them, and no other rule, temperature or top_p can act on them.

Shapes: E experts asked, C candidates, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mope_bb.errors import ConfigError
from mope_bb.pcm.alignment import align
from mope_bb.pcm.course import Course
from mope_bb.pcm.features import FEATURES, expert_features
from mope_bb.pcm.gates import Gate
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.sampling import draw
from mope_bb.types import Candidates, Piece, SamplingOptions, TokenDistribution, TokenStep


async def draw_step(course: Course, unlisted: tuple[str, ...]) -> TokenStep:
    """The next step, where the experts `unlisted` give no lists; the answer goes on with it."""
    plan, pool, context = course.plan, course.pool, course.context
    listed = [name for name in plan.asked if name not in unlisted]
    found, judged = await course.with_judging((), pool.ask(listed, context))
    lists = dict(zip(listed, found, strict=True))
    weights = expert_weights(plan, lists, judged.head_scores[0], judged.gate)
    name = plan.asked[draw(shares(plan, lists, weights).log(), course.uniform())]
    if name in lists:
        logprobs = torch.tensor(lists[name].logprobs, dtype=torch.float64)
        piece = lists[name].pieces[draw(logprobs, course.uniform())]
        course.count(num_round_trips=1)
    else:
        piece = await pool.sample(name, context)
        course.uses_drafts = True
        course.count(num_round_trips=2 if listed else 1)
    for one in {*listed, name}:
        course.count_generated(one, 1)
    course.context = context.extended(piece)
    return step_of(plan, lists, weights, (name, piece), judged.policy_version)


def check_plan(plan: Plan, unlisted: tuple[str, ...], options: SamplingOptions, *, has_form: bool) -> None:
    """Raise ConfigError where something is wanted that needs the probabilities of the `unlisted` experts.

    `has_form`: the answer must have one.
    """
    name = unlisted[0]
    if has_form:
        raise ConfigError(
            f"expert {name!r} gives no logprobs, so tools and `response_format` cannot choose among its tokens",
            hint="Leave this expert out.",
        )
    if plan.rule.name != "linear":
        raise ConfigError(
            f"expert {name!r} gives no logprobs, and the merge rule {plan.rule.name!r} needs them",
            hint='Use the rule "linear", or leave this expert out.',
        )
    if options.temperature != 1.0 or options.top_p != 1.0:
        raise ConfigError(
            f"expert {name!r} gives no logprobs, so temperature {options.temperature:g} and top_p {options.top_p:g} "
            "cannot act on the mixture",
            hint="Set both to 1, or leave this expert out.",
        )


def expert_weights(plan: Plan, lists: Mapping[str, TokenDistribution], head_scores: Tensor, gate: Gate) -> Tensor:
    """alpha (E); of an expert that told nothing the features are 0."""
    phi = torch.zeros(len(plan.asked), len(FEATURES), dtype=torch.float64)
    if lists:
        rows = [row for row, name in enumerate(plan.asked) if name in lists]
        candidates = align([lists[plan.asked[row]] for row in rows])
        logprobs, tails = torch.from_numpy(candidates.logprobs), torch.tensor(candidates.tails, dtype=torch.float64)
        phi[rows] = expert_features(logprobs, plan.log_lambda[rows], tails)
    return plan.rule.weights(plan.log_lambda, gate.scores(head_scores.double(), phi, plan.log_lambda > -math.inf))


def shares(plan: Plan, lists: Mapping[str, TokenDistribution], weights: Tensor) -> Tensor:
    """With which weight (E) each expert is drawn: what it can show of its mass counts, as in a mixture of lists."""
    masses = [1.0 - lists[name].tail_mass if name in lists else 1.0 for name in plan.asked]
    return weights * torch.tensor(masses, dtype=torch.float64)


def step_of(
    plan: Plan,
    lists: Mapping[str, TokenDistribution],
    weights: Tensor,
    drawn: tuple[str, Piece],
    policy_version: int,
) -> TokenStep:
    """The step in which the expert `drawn[0]` gave the piece `drawn[1]`."""
    name, piece = drawn
    # What an expert without logprobs drew is all that is known of it.
    said = lists if name in lists else {**lists, name: TokenDistribution((piece,), (0.0,), is_guess=True)}
    candidates = align([said[one] for one in plan.asked if one in said])
    logprobs = np.full((len(plan.asked), len(candidates.pieces)), -math.inf)
    logprobs[[one in said for one in plan.asked]] = candidates.logprobs
    logprobs[[one not in lists for one in plan.asked]] = -math.inf  # drawn, but not told with which probability
    tails = tuple(lists[one].tail_mass if one in lists else 1.0 for one in plan.asked)
    missed = sum(
        weight * tail for one, weight, tail in zip(plan.asked, weights.tolist(), tails, strict=True) if one in lists
    )
    return TokenStep(
        piece=piece,
        logprob=math.nan,
        experts=plan.asked,
        candidates=Candidates(
            candidates.pieces,
            logprobs,
            tuple(lists[one].floor if one in lists else -math.inf for one in plan.asked),
            tails,
        ),
        index=candidates.pieces.index(piece),
        weights=tuple(weights.tolist()),
        missed_mass=missed,
        floor_mass=0.0,
        entropy=math.nan,
        policy_version=policy_version,
        drawn_by=name,
    )
