"""An expert without logprobs among others: the expert is drawn first, and that is exactly the linear mixture."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pytest

from mope_bb.errors import ConfigError
from mope_bb.pcm.decode import decode
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import build_rule
from mope_bb.pcm.runner import Scorer, UserWeights
from mope_bb.types import Context, Message, SamplingOptions, TokenDistribution, TokenStep
from tests.speculation.experts import (
    PIECES,
    START,
    TOP_K,
    KnownExpert,
    PlaceScorer,
    known_pool,
    make_tables,
    place_scores,
)
from tests.speculation.measure import THRESHOLD, Answer, chi_square

NUM_DRAWS: Final = 5_000
QUESTION: Final = Context((Message("user", "Go on."),))
LAMBDAS: Final = (0.7, 0.3)
TABLES: Final = make_tables()
Weights = Sequence[float]


class CountingExpert(KnownExpert):
    """Counts how often it is asked for a list."""

    num_lists = 0

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        self.num_lists += 1
        return await super().next_tokens(context, top_k=top_k)


def experts_without(*unlisted: str) -> list[CountingExpert]:
    """The experts `red` and `blue`, of which some give no lists, and the base that the product needs."""
    return [CountingExpert(name, TABLES[name], gives_lists=name not in unlisted) for name in ("base", "red", "blue")]


def plan_of(rule: str = "linear", lambdas: Weights = LAMBDAS) -> Plan:
    """Both experts."""
    return Plan(build_rule(rule), ("red", "blue"), tuple(lambdas), base="base", preference_text="")


def first_steps(experts: Sequence[KnownExpert], num_draws: int, scorer: Scorer | None = None) -> list[TokenStep]:
    """The first step of many answers."""

    async def main() -> list[TokenStep]:
        async with known_pool(experts) as pool:
            steps = []
            for seed in range(num_draws):
                opened = decode(
                    QUESTION, plan_of(), pool, scorer or UserWeights(), SamplingOptions(max_tokens=1), seed=seed
                )
                steps += [step async for step in opened]
            return steps

    return asyncio.run(main())


def mixture(weights: Weights, unlisted: Sequence[str]) -> dict[Answer, float]:
    """sum_i alpha_i p_i of the first piece, over what each expert can show; by place in the vocabulary."""
    pi = np.zeros(len(PIECES))
    for name, weight in zip(("red", "blue"), weights, strict=True):
        row = TABLES[name][START]
        pi += weight * np.where(row >= (0 if name in unlisted else np.sort(row)[-TOP_K]), row, 0.0)
    return {(place,): float(value) for place, value in enumerate(pi / pi.sum()) if value > 0.0}


def counted(steps: Sequence[TokenStep]) -> Mapping[Answer, int]:
    """How often each piece was drawn."""
    return Counter((PIECES.index(step.piece),) for step in steps)


@pytest.mark.parametrize("unlisted", [("blue",), ("red", "blue")], ids=["one without lists", "all without lists"])
def test_first_token_has_the_exact_mixture(unlisted: tuple[str, ...]) -> None:
    """A chi-square test passes against the mixture, and fails against that of slightly other weights."""
    drawn = counted(first_steps(experts_without(*unlisted), NUM_DRAWS))
    assert chi_square(drawn, mixture(LAMBDAS, unlisted)).p_value > THRESHOLD
    assert chi_square(drawn, mixture((0.55, 0.45), unlisted)).p_value < THRESHOLD


def test_experts_are_drawn_with_their_weights() -> None:
    """By alpha of lambda and scores, times what of the mass a list shows; a piece is one of the drawn expert's own."""
    steps = first_steps(experts_without("blue"), 2_000, PlaceScorer())
    powers = np.array(LAMBDAS) * np.exp(place_scores(0, START, 2))
    red, blue = powers / powers.sum()
    red_list = KnownExpert("red", TABLES["red"]).list_after(START, TOP_K)
    shown = red * (1.0 - red_list.tail_mass)
    for step in steps:
        assert step.weights == pytest.approx((red, blue))
        assert step.missed_mass == pytest.approx(red * red_list.tail_mass)
        assert step.drawn_by == "blue" or step.piece in red_list.pieces
    num_red = sum(step.drawn_by == "red" for step in steps)
    share = shown / (shown + blue)
    assert abs(num_red - share * len(steps)) < 4.0 * math.sqrt(share * (1.0 - share) * len(steps))


def test_what_is_not_known_is_not_told() -> None:
    """No probability of the step, and none of an expert that gives none; the others' are as they were said."""
    steps = first_steps(experts_without("blue"), 50)
    red_list = KnownExpert("red", TABLES["red"]).list_after(START, TOP_K)
    said = dict(zip(red_list.pieces, red_list.logprobs, strict=True))
    assert {step.drawn_by for step in steps} == {"red", "blue"}
    for step in steps:
        assert math.isnan(step.logprob)
        assert math.isnan(step.entropy)
        assert step.candidates.pieces[step.index] == step.piece
        assert step.expert_logprob("blue") is None
        assert step.expert_logprob("red") == said.get(step.piece)


def test_a_seed_does_not_give_such_an_answer_again() -> None:
    """Where the endpoint drew; what only experts with lists drew can be had again."""

    async def main() -> list[tuple[bool, set[str | None]]]:
        found = []
        async with known_pool(experts_without("blue")) as pool:
            for seed in range(20):
                opened = decode(QUESTION, plan_of(), pool, UserWeights(), SamplingOptions(max_tokens=2), seed=seed)
                drawers = {step.drawn_by async for step in opened}
                found.append((opened.uses_drafts, drawers))
        return found

    found = asyncio.run(main())
    assert all(uses_drafts == ("blue" in drawers) for uses_drafts, drawers in found)
    assert len({uses_drafts for uses_drafts, _ in found}) == 2


PLAIN: Final = SamplingOptions(max_tokens=3)


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("geometric", PLAIN, "the merge rule 'geometric' needs them"),
        ("product", PLAIN, "the merge rule 'product' needs them"),
        ("linear", replace(PLAIN, temperature=0.5), "temperature 0.5 and top_p 1"),
        ("linear", replace(PLAIN, temperature=0.0), "temperature 0 and top_p 1"),
        ("linear", replace(PLAIN, top_p=0.9), "temperature 1 and top_p 0.9"),
    ],
)
def test_what_needs_probabilities_is_refused(rule: str, options: SamplingOptions, words: str) -> None:
    """The expert is named, and nobody is asked; without such an expert the same is answered."""

    async def answer(experts: Sequence[KnownExpert]) -> int:
        async with known_pool(experts) as pool:
            return len([step async for step in decode(QUESTION, plan_of(rule), pool, UserWeights(), options, seed=0)])

    experts = experts_without("blue")
    with pytest.raises(ConfigError, match=f"'blue' gives no logprobs.*{words}") as caught:
        asyncio.run(answer(experts))
    assert "leave this expert out" in str(caught.value.hint)
    assert [expert.num_lists for expert in experts] == [0, 0, 0]
    assert asyncio.run(answer(experts_without())) > 0
