"""Answers have the exact distribution of the merge, however far ahead the experts are asked; wrong rules do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Final
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mope_bb.pcm import drafting
from mope_bb.pcm.gates import LinearGate
from mope_bb.pcm.merging import merge_step
from mope_bb.pcm.runner import PathJudgement
from mope_bb.types import Context, Piece
from tests.speculation import measure
from tests.speculation.experts import PIECES, TOP_K, KnownExpert, PlaceScorer, make_tables, place_scores
from tests.speculation.measure import (
    MODES,
    SETUPS,
    THRESHOLD,
    WITHOUT_LISTS,
    RuleName,
    Setup,
    sample,
    sample_widely,
)
from tests.speculation.reference import Reference
from tests.speculation.wrong_rules import WRONG

SHAPED: Final = "linear, temperature 0.7, top_p 0.9"
SCORED: Final = "geometric, scored"
RULES: Final = ("linear", SCORED, "product")
every_setup = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
SLOW: Final = (SHAPED, SCORED)
"""What takes longest, and differs from the others in little."""

NUM_ANSWERS: Final = 10_000


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    """As many processes as `make test` may count on cores."""
    with measure.processes() as found:
        yield found


@pytest.mark.parametrize(
    ("setup", "mode"),
    [*((rule, mode) for rule in RULES for mode in ("draft", "draft, next begun", "auto")), (SHAPED, "auto")],
)
def test_drafts_keep_the_distribution(workers: ProcessPoolExecutor, setup: str, mode: str) -> None:
    """Whole answers pass a chi-square test against the exact probabilities of all answers."""
    sampled = sample_widely(workers, SETUPS[setup], MODES[mode], NUM_ANSWERS)
    assert sampled.test(SETUPS[setup].exact()).p_value > THRESHOLD
    # The test would say little if all drafts were kept, or none.
    assert 0.3 < sampled.share_kept < 0.85
    assert sampled.num_with_drafts > 0.5 * NUM_ANSWERS


@pytest.mark.parametrize(
    "setup",
    [pytest.param(setup, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, setup in SETUPS.items()],
)
def test_lockstep_and_lookahead(workers: ProcessPoolExecutor, setup: Setup) -> None:
    """Lockstep has the exact distribution, and lookahead gives the same answers in fewer round trips."""
    lockstep = sample_widely(workers, setup, MODES["lockstep"], NUM_ANSWERS)
    assert lockstep.test(setup.exact()).p_value > THRESHOLD
    lookahead = sample_widely(workers, setup, MODES["lookahead"], NUM_ANSWERS)
    assert lookahead.answers == lockstep.answers
    assert lockstep.efforts["num_round_trips"] == lockstep.num_tokens
    assert lookahead.efforts["num_round_trips"] < 0.95 * lookahead.num_tokens


def test_expert_without_lists(workers: ProcessPoolExecutor) -> None:
    """Drawing the expert first gives the linear mixture, of whole distributions and of lists."""
    sampled = sample_widely(workers, WITHOUT_LISTS, MODES["auto"], NUM_ANSWERS)
    assert sampled.test(WITHOUT_LISTS.exact()).p_value > THRESHOLD


@every_setup
def test_repeatable_answers(setup: Setup) -> None:
    """Where an answer must be repeatable, its seed alone decides: no mode lets an expert's own draws take part."""
    lockstep = sample(setup, MODES["lockstep"], 100)
    for mode in MODES.values():
        sampled = sample(setup, mode, 100, is_repeatable=True)
        assert sampled.answers == lockstep.answers
        assert sampled.num_with_drafts == 0


@pytest.mark.parametrize("rule", ["linear", "geometric", "product"])
def test_greedy(rule: RuleName) -> None:
    """At temperature 0 every mode gives the one most probable path."""
    setup = Setup(rule, temperature=0.0, is_scored=True)
    (only,) = setup.exact()
    for mode in MODES.values():
        assert set(sample(setup, mode, 20).answers.values()) == {only}


def test_modes_differ() -> None:
    """What is tested is what it is called: `auto` mixes drafts with other moves, and drafts are begun early."""
    auto, begun, alone = (sample(SETUPS[SHAPED], MODES[mode], 200) for mode in ("auto", "draft, next begun", "draft"))
    assert 0 < auto.num_with_drafts < 200
    assert 0.1 < 1 - auto.efforts["num_drafted"] / auto.num_tokens < 0.6
    # A draft that is begun early and lost costs tokens.
    assert begun.efforts["num_generated"] > 1.05 * alone.efforts["num_generated"]


@every_setup
def test_reference_agrees_with_the_merge(setup: Setup) -> None:
    """The reference's next-piece distribution is that of `merge_step`, after every last piece."""
    tables = make_tables()
    experts = {name: KnownExpert(name, table) for name, table in tables.items()}
    base = tables.pop("base")
    reference = Reference(tables, base, measure.LAMBDAS, setup.rule, is_scored=setup.is_scored)
    plan = setup.plan
    for place in range(len(PIECES)):
        lists = [experts[name].list_after(place, TOP_K) for name in plan.asked]
        scores = torch.tensor(place_scores(2, place, 3) if setup.is_scored else [0.0] * 3)
        merged = merge_step(plan, lists, scores, LinearGate())
        found = np.zeros(len(PIECES))
        found[[PIECES.index(piece) for piece in merged.candidates.pieces]] = merged.log_pi.exp().numpy()
        np.testing.assert_allclose(found, reference.next_piece(2, place), atol=1e-7)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rules_fail(wrong: str) -> None:
    """The same test finds a wrong rule, with fewer answers."""
    rule, setup = WRONG[wrong]
    with patch.object(drafting, "verify", rule):
        sampled = sample(setup, MODES["draft"], 4_000)
    assert sampled.test(setup.exact()).p_value < THRESHOLD


class LateScorer(PlaceScorer):
    """Says along a path what it should have said one position earlier."""

    async def judge_path(
        self, context: Context, path: Sequence[Piece], preference_text: str, experts: Sequence[str]
    ) -> PathJudgement:
        found = await super().judge_path(context, path, preference_text, experts)
        late = torch.cat((found.head_scores[:1], found.head_scores[:-1]))
        return PathJudgement(late, found.gate, found.policy_version)


def test_late_scores_fail() -> None:
    """The same test finds head scores that are used at the position after theirs."""
    setup = SETUPS["geometric, scored"]
    with patch.object(measure, "PlaceScorer", LateScorer):
        sampled = sample(setup, MODES["draft"], 2_500)
    assert sampled.test(setup.exact()).p_value < THRESHOLD
