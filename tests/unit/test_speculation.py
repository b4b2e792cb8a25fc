"""Testing a draft: when a piece is kept, what replaces it, and how likely drafts are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st

from mope_bb.pcm.pacing import SHARPNESS
from mope_bb.pcm.speculation import agreement_row, verify
from mope_bb.types import Candidates, DraftStep, Piece, TokenDistribution

Array = npt.NDArray[np.float64]
PIECES = tuple(Piece(bytes([65 + number]), number) for number in range(6))
uniforms = st.floats(0.0, 1.0, exclude_max=True)
shares = st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6)


def normalised(values: Sequence[float]) -> Array:
    """Probabilities."""
    found: Array = np.array(values) / math.fsum(values)
    return found


@dataclass
class Case:
    """A merged distribution over six candidates, and a drafter whose list holds some of them."""

    pi: Array
    listed: list[int]
    """The columns of the drafter's list, in its order."""
    q: Array
    """What the drafted piece comes from, along the list."""

    @property
    def dense_q(self) -> Array:
        """q over the candidates."""
        dense = np.zeros(6)
        dense[self.listed] = self.q
        return dense

    @property
    def candidates(self) -> Candidates:
        """What is merged: the drafter's list, and somebody's who listed all."""
        return Candidates(PIECES, np.zeros((1, 6)), (0.0,), (0.0,))

    def step(self, place: int | None) -> DraftStep:
        """The draft of what stands at a place of the list; None: of a piece that is not on it."""
        pieces = tuple(PIECES[column] for column in self.listed)
        logprobs = tuple(np.log(self.q * 0.9).tolist())
        drafted = PIECES[next(n for n in (*range(6), 0) if n not in self.listed)] if place is None else pieces[place]
        return DraftStep(TokenDistribution(pieces, logprobs), drafted, place, tuple(np.log(self.q).tolist()))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Lists of one to five pieces; pi may be 0 somewhere, as after top_p."""
    listed = draw(st.permutations(range(6)))[: draw(st.integers(1, 5))]
    pi = [value * draw(st.sampled_from((0, 1, 1, 1))) for value in draw(shares)]
    pi[draw(st.integers(0, 5))] += 0.1
    return Case(normalised(pi), listed, normalised(draw(shares)[: len(listed)]))


def log_of(pi: Array) -> torch.Tensor:
    """-inf for 0."""
    return torch.from_numpy(pi).log()


@given(cases(), uniforms, uniforms, st.data())
def test_kept_with_the_ratio(case: Case, first: float, second: float, data: st.DataObject) -> None:
    """A drafted piece d is kept exactly where the first number is below pi(d) / q(d)."""
    place = data.draw(st.integers(0, len(case.listed) - 1))
    verdict = verify(log_of(case.pi), case.candidates, case.step(place), (first, second))
    ratio = case.pi[case.listed[place]] / case.q[place]
    if abs(first - ratio) > 1e-9:
        assert verdict.is_kept == (first < ratio)
    if verdict.is_kept:
        assert verdict.index == case.listed[place]


@given(cases(), uniforms, st.data())
def test_replaced_by_what_is_missing(case: Case, second: float, data: st.DataObject) -> None:
    """What replaces it is drawn, with the second number, from the positive part of pi - q."""
    place = data.draw(st.integers(0, len(case.listed) - 1))
    missing = np.maximum(case.pi - case.dense_q, 0.0)
    verdict = verify(log_of(case.pi), case.candidates, case.step(place), (1.0 - 1e-12, second))
    if not verdict.is_kept and missing.sum() > 1e-9:
        steps = missing.cumsum() / missing.sum()
        assert missing[verdict.index] > 0
        assert steps[verdict.index] - missing[verdict.index] / missing.sum() - 1e-6 <= second
        assert second <= steps[verdict.index] + 1e-6


@given(cases())
def test_kept_and_replaced_make_pi(case: Case) -> None:
    """Over all drafts: q(d) min(1, pi(d)/q(d)) and the rest in proportion to what is missing is pi."""
    step_of = [case.step(place) for place in range(len(case.listed))]
    grid = (np.arange(200) + 0.5) / 200
    made = np.zeros(6)
    for place, step in enumerate(step_of):
        kept = np.mean([verify(log_of(case.pi), case.candidates, step, (u, 0.5)).is_kept for u in grid])
        made[case.listed[place]] += case.q[place] * kept
        missing = np.maximum(case.pi - case.dense_q, 0.0)
        made += case.q[place] * (1 - kept) * missing / max(missing.sum(), 1e-12)
    np.testing.assert_allclose(made, case.pi, atol=0.01)


@given(cases(), uniforms, uniforms)
def test_unlisted_piece_is_thrown_away(case: Case, first: float, second: float) -> None:
    """A piece that is not on the drafter's list is never kept: one is drawn from pi, by the second number."""
    verdict = verify(log_of(case.pi), case.candidates, case.step(None), (first, second))
    steps = case.pi.cumsum()
    assert not verdict.is_kept
    assert case.pi[verdict.index] > 0
    assert steps[verdict.index] - case.pi[verdict.index] - 1e-9 <= second <= steps[verdict.index] + 1e-9


def test_greedy() -> None:
    """At temperature 0 the drafted piece is kept where it is the merge's favourite too, else that one is taken."""
    listed = TokenDistribution(PIECES[:2], (math.log(0.6), math.log(0.3)))
    step = DraftStep(listed, PIECES[0], 0, (0.0, -math.inf))
    candidates = Candidates(PIECES[:3], np.zeros((1, 3)), (0.0,), (0.0,))
    for favourite in range(3):
        log_pi = torch.full((3,), -math.inf, dtype=torch.float64)
        log_pi[favourite] = 0.0
        verdict = verify(log_pi, candidates, step, (0.99, 0.99))
        assert (verdict.index, verdict.is_kept) == (favourite, favourite == 0)


rows = st.lists(shares, min_size=1, max_size=4)


@given(shares, rows, st.floats(0.2, 2.0))
def test_agreement(values: list[float], said: list[list[float]], temperature: float) -> None:
    """Each expert's chance is the overlap of pi with its list at the drafting temperature."""
    pi = normalised(values)
    lists = np.array([normalised(row) for row in said])
    lists[lists < np.sort(lists, axis=1)[:, 2:3]] = 0.0
    with np.errstate(divide="ignore"):
        found = agreement_row(np.log(pi), np.log(lists), temperature)
    ways = [(row, sharpness) for sharpness in SHARPNESS for row in lists]
    for (row, sharpness), chance in zip(ways, found[:-2], strict=True):
        drafted = normalised(list(row ** (1 / (sharpness * temperature))))
        assert abs(chance - np.minimum(pi, drafted).sum()) < 1e-9
    favourites = {int(row.argmax()) for row in lists}
    assert found[-1] == 1.0
    assert abs(found[-2] - (pi[favourites.pop()] if len(favourites) == 1 else 0.0)) < 1e-12


def test_agreement_of_greedy_drafts() -> None:
    """At temperature 0 a draft is kept with the probability of the drafter's favourite."""
    logs = np.log(np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]))
    np.testing.assert_allclose(agreement_row(np.array([-np.inf, 0.0, -np.inf]), logs, 0.0), [*[0.0, 1.0] * 3, 0.0, 1.0])
