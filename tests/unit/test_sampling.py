"""Drawing: the distribution of the draws, and the edges of temperature and top_p."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mope_bb.errors import ConfigError
from mope_bb.pcm.sampling import check_sampling, draw, draw_rows, shape_distribution
from mope_bb.types import SamplingOptions

CHI_SQUARE_999 = {2: 13.82, 5: 20.52}
"""The 99.9 % quantile of chi-square by degrees of freedom, from the tables."""

weights_of = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=10).filter(lambda row: sum(row) > 1e-3)
uniforms = st.floats(0.0, 1.0, exclude_max=True)


def log_of(weights: list[float]) -> Tensor:
    """Normalised log-probabilities, -inf for a weight of 0."""
    values = torch.tensor(weights, dtype=torch.float64)
    return (values / values.sum()).log()


def chi_square(drawn: Callable[[Tensor, float], int], probs: list[float], *, seed: int, num_draws: int) -> float:
    """Pearson's statistic of `num_draws` draws against `probs`."""
    generator, log_pi = random.Random(seed), torch.tensor(probs, dtype=torch.float64).log()
    counts = [0] * len(probs)
    for _ in range(num_draws):
        counts[drawn(log_pi, generator.random())] += 1
    return sum((count - num_draws * p) ** 2 / (num_draws * p) for count, p in zip(counts, probs, strict=True))


PEAKED, FLAT = [0.62, 0.2, 0.1, 0.05, 0.02, 0.01], [0.3, 0.3, 0.4]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("probs", [PEAKED, FLAT], ids=["peaked", "flat"])
def test_draws_have_the_distribution(probs: list[float], seed: int) -> None:
    """4,000 draws pass a chi-square test at 99.9 %."""
    assert chi_square(draw, probs, seed=seed, num_draws=4000) < CHI_SQUARE_999[len(probs) - 1]


def _off_by_rounding(log_pi: Tensor, uniform: float) -> int:
    """A wrong draw: a candidate's neighbour when the uniform number falls into the last tenth of its step."""
    cumulative = log_pi.exp().cumsum(-1)
    index = int(torch.searchsorted(cumulative, uniform))
    is_late = uniform > float(cumulative[index]) - 0.1 * float(log_pi[index].exp())
    return min(index + 1, len(log_pi) - 1) if is_late else index


def _tempered(log_pi: Tensor, uniform: float) -> int:
    """A wrong draw: at temperature 0.9."""
    return draw(torch.log_softmax(log_pi / 0.9, -1), uniform)


@pytest.mark.parametrize("wrong", [_off_by_rounding, _tempered])
def test_chi_square_rejects_a_wrong_draw(wrong: Callable[[Tensor, float], int]) -> None:
    """The same bound and the same number of draws reject draws that are slightly wrong."""
    assert chi_square(wrong, PEAKED, seed=0, num_draws=4000) > CHI_SQUARE_999[5]


@given(weights=weights_of, uniform=uniforms)
def test_impossible_candidates_are_never_drawn(weights: list[float], uniform: float) -> None:
    """A candidate with log-probability -inf is never the answer, whatever the uniform number."""
    log_pi = log_of(weights)
    assert log_pi[draw(log_pi, uniform)] > -torch.inf


@pytest.mark.parametrize("uniform", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_extreme_uniforms_stay_within_the_possible(uniform: float) -> None:
    """0 and the largest number below 1 draw the first and the last possible candidate, not an impossible neighbour."""
    log_pi = log_of([0.0, 0.0, 1.0, 2.0, 0.0])
    assert draw(log_pi, uniform) == (2 if uniform == 0.0 else 3)


@given(weights=weights_of, uniform=uniforms)
def test_draw_inverts_the_cumulative_sum(weights: list[float], uniform: float) -> None:
    """The drawn candidate's step of the cumulative distribution holds the uniform number."""
    log_pi = log_of(weights)
    probs = log_pi.exp().tolist()
    index = draw(log_pi, uniform)
    below = math.fsum(probs[:index])
    assert below - 1e-12 <= uniform <= below + probs[index] + 1e-12


@given(weights=weights_of, numbers=st.lists(uniforms, min_size=1, max_size=4))
def test_rows_are_drawn_as_if_each_stood_alone(weights: list[float], numbers: list[float]) -> None:
    """`draw_rows` is `draw` for every row, with padding behind."""
    log_pi = log_of(weights)
    rows = torch.nn.functional.pad(log_pi, (0, 2), value=-torch.inf).expand(len(numbers), -1)
    found = draw_rows(rows, torch.tensor(numbers, dtype=torch.float64))
    assert found.tolist() == [draw(log_pi, number) for number in numbers]


@given(weights=weights_of, uniform=uniforms)
def test_temperature_0_takes_the_first_maximum(weights: list[float], uniform: float) -> None:
    """At temperature 0 the most probable candidate has all the mass; the first one on a tie."""
    log_pi = log_of(weights)
    shaped = shape_distribution(log_pi, temperature=0.0, top_p=1.0)
    expected = log_pi.tolist().index(max(log_pi.tolist()))
    assert draw(shaped, uniform) == expected
    assert float(shaped[expected]) == 0.0


def test_temperature_0_ignores_top_p() -> None:
    """Greedy choice is the same under any top_p."""
    shaped = shape_distribution(log_of([1.0, 3.0, 2.0]), temperature=0.0, top_p=0.01)
    assert shaped.exp().tolist() == [0.0, 1.0, 0.0]


@given(weights=weights_of, temperature=st.floats(0.05, 5.0), top_p=st.floats(0.01, 1.0))
def test_shaped_is_a_distribution_that_keeps_the_order(weights: list[float], temperature: float, top_p: float) -> None:
    """After temperature and top_p the mass is 1, nothing new is possible, and a more probable piece stays so."""
    log_pi = log_of(weights)
    shaped = shape_distribution(log_pi, temperature=temperature, top_p=top_p)
    assert float(shaped.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    assert bool((torch.isneginf(shaped) | ~torch.isneginf(log_pi)).all())
    ranked = shaped.exp()[torch.sort(log_pi, descending=True, stable=True).indices]
    assert bool((ranked.diff() <= 1e-12).all())


@given(weights=weights_of, temperature=st.floats(0.1, 5.0))
def test_temperature_is_a_power(weights: list[float], temperature: float) -> None:
    """Temperature T raises probabilities to 1/T and renormalises."""
    probs = log_of(weights).exp()
    expected = probs ** (1 / temperature)
    shaped = shape_distribution(log_of(weights), temperature=temperature, top_p=1.0)
    torch.testing.assert_close(shaped.exp(), expected / expected.sum(), rtol=1e-9, atol=1e-15)


@given(weights=weights_of, top_p=st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_sufficient_set(weights: list[float], top_p: float) -> None:
    """What is kept reaches top_p, and without its least probable member it would not; shares stay as they were."""
    log_pi = log_of(weights)
    shaped = shape_distribution(log_pi, temperature=1.0, top_p=top_p)
    kept = ~torch.isneginf(shaped)
    mass = log_pi.exp()[kept]
    assert float(mass.sum()) >= top_p - 1e-9
    assert float(mass.sum() - mass.min()) < top_p + 1e-9
    torch.testing.assert_close(shaped.exp()[kept], mass / mass.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2]), (0.75, [0, 1]), (0.7500001, [0, 1, 2]), (0.5, [0]), (0.5000001, [0, 1]), (1e-9, [0])],
)
def test_top_p_at_the_edges(top_p: float, kept: list[int]) -> None:
    """A set that reaches top_p exactly is enough; the most probable candidate always stays."""
    shaped = shape_distribution(torch.tensor([0.5, 0.25, 0.25]).double().log(), temperature=1.0, top_p=top_p)
    assert torch.nonzero(shaped > -torch.inf).flatten().tolist() == kept


def test_temperature_acts_before_top_p() -> None:
    """The set of top_p is chosen from the tempered distribution."""
    shaped = shape_distribution(torch.tensor([0.6, 0.3, 0.1]).double().log(), temperature=0.5, top_p=0.75)
    # 0.36 : 0.09 : 0.01, so the first alone has 0.78.
    assert shaped.exp().tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (SamplingOptions(temperature=-0.1), "temperature"),
        (SamplingOptions(temperature=math.inf), "temperature"),
        (SamplingOptions(temperature=math.nan), "temperature"),
        (SamplingOptions(top_p=0.0), "top_p"),
        (SamplingOptions(top_p=1.01), "top_p"),
        (SamplingOptions(top_p=math.nan), "top_p"),
        (SamplingOptions(max_tokens=0), "max_tokens"),
        (SamplingOptions(stop=("x", "")), "stop"),
    ],
)
def test_options_outside_their_range_are_refused(options: SamplingOptions, word: str) -> None:
    """Each wrong option is named."""
    with pytest.raises(ConfigError, match=word):
        check_sampling(options)


@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(temperature=0.0), SamplingOptions(top_p=1e-6, max_tokens=1)]
)
def test_options_at_their_limits_are_accepted(options: SamplingOptions) -> None:
    """The limits themselves are fine."""
    check_sampling(options)
