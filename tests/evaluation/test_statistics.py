"""The statistics against known answers and on made-up data whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mope_bb.errors import ConfigError
from mope_bb.evaluation.results import Evaluation, MethodInfo, MethodKind, ScoredAnswer
from mope_bb.evaluation.statistics import (
    MeasuredCells,
    best_training_free,
    bootstrap_means,
    combine_seeds,
    differences,
    draw_resamples,
    headroom_measure,
    measure_cells,
    percentile_interval,
    summarise,
    win_rate_matrix,
    win_rates,
)
from mope_bb.evaluation.verdicts import verdicts
from tests.evaluation.synthetic import evaluation_of

TWO: dict[str, tuple[MethodKind, float]] = {"a": ("training-free", 0.0), "b": ("mope", 0.0)}


def scored(method: str, prompt: int, reward: float, *, sample: int = 0, preference: str = "concise") -> ScoredAnswer:
    """An answer with nothing but a reward."""
    return ScoredAnswer(
        method, prompt, preference, sample, "", 1, 0.0, {"concise": reward}, {"concise": reward}, reward
    )


def of_rewards(**rewards: list[float]) -> Evaluation:
    """Methods with one answer per prompt."""
    return Evaluation(
        methods=[MethodInfo(name, "training-free", "") for name in rewards],
        answers=[scored(name, prompt, value) for name, row in rewards.items() for prompt, value in enumerate(row)],
    )


def test_bootstrap_of_a_known_case() -> None:
    """The mean of n 0s and 1s: its bootstrap has the spread of a binomial, sqrt(p (1 - p) / n)."""
    n, p = 200, 0.3
    cells = (np.arange(n) < p * n).astype(np.float64)[:, None, None]
    means, resampled = bootstrap_means(cells, draw_resamples(n, num_resamples=20_000))
    assert means[0] == pytest.approx(p)
    assert resampled.mean() == pytest.approx(p, abs=2e-3)
    assert resampled.std() == pytest.approx(math.sqrt(p * (1 - p) / n), rel=0.02)
    interval = percentile_interval(float(means[0]), resampled[:, 0])
    assert interval.half_width == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), rel=0.05)


def test_resamples_are_seeded() -> None:
    """Equal seeds give equal resamples, other seeds others; each holds as many prompts as there are."""
    first = draw_resamples(30, seed=3)
    assert (first == draw_resamples(30, seed=3)).all()
    assert (first != draw_resamples(30, seed=4)).any()
    assert (first.sum(1) == 30).all()
    assert first.shape == (2000, 30)


def test_answers_of_a_prompt_travel_together() -> None:
    """Copies of the same answers add no certainty: eight preferences that agree are as good as one."""
    one = evaluation_of(TWO, preferences=["concise"], noise=0.0)
    eight = Evaluation(
        methods=one.methods,
        answers=[replace(answer, preference=f"p{i}") for answer in one.answers for i in range(8)],
    )
    assert measure_cells(eight, "reward").mean("a").half_width == pytest.approx(
        measure_cells(one, "reward").mean("a").half_width
    )


def test_intervals_cover_the_truth() -> None:
    """About 95 % of the intervals of 300 repetitions hold the true mean (binomial: 91 % to 98 %)."""
    rng, held = np.random.default_rng(5), 0
    for repetition in range(300):
        cells = 0.4 + rng.normal(0, 0.2, (40, 1, 1)) + rng.normal(0, 0.3, (40, 4, 1))
        means, resampled = bootstrap_means(cells, draw_resamples(40, num_resamples=400, seed=repetition))
        interval = percentile_interval(float(means[0]), resampled[:, 0])
        held += interval.low <= 0.4 <= interval.high
    assert 0.91 <= held / 300 <= 0.98


def test_paired_differences_are_narrower() -> None:
    """Where prompts differ in ease, the paired interval is much narrower than that of independent samples."""
    cells = measure_cells(evaluation_of(TWO, prompt_spread=1.0, noise=0.1), "reward")
    unpaired = math.hypot(cells.mean("a").half_width, cells.mean("b").half_width)
    assert cells.difference("a", "b").half_width < unpaired / 5


def test_a_planted_difference_is_found_and_none_is_not() -> None:
    """A difference of 0.3 logits excludes 0; without one 0 is excluded in about 5 % of 40 repetitions, at most in 6."""
    planted = TWO | {"b": ("mope", 0.3)}
    found = differences(evaluation_of(planted), "b", ["a"])["a"]
    assert 0 < found.low < found.value < found.high
    false = [differences(evaluation_of(TWO, seed=seed, num_prompts=30), "b", ["a"])["a"] for seed in range(40)]
    assert sum(not interval.low <= 0 <= interval.high for interval in false) <= 6


def test_differences_are_antisymmetric() -> None:
    """a minus b is the negative of b minus a, interval and all."""
    cells = measure_cells(evaluation_of(TWO), "reward")
    ours, theirs = cells.difference("a", "b"), cells.difference("b", "a")
    assert (ours.value, ours.low, ours.high) == pytest.approx((-theirs.value, -theirs.high, -theirs.low))


def test_differences_use_shared_cells_only() -> None:
    """A method that answered only an easy prompt is compared on that prompt."""
    evaluation = Evaluation(
        methods=[MethodInfo("a", "base", ""), MethodInfo("b", "mope", "")],
        answers=[scored("a", 0, 0.1), scored("a", 1, 0.8), scored("b", 1, 0.9), scored("b", 2, 0.5)],
    )
    cells = measure_cells(evaluation, "reward")
    assert cells.difference("b", "a").value == pytest.approx(0.1)
    assert cells.mean("a").value == pytest.approx(0.45)


def test_nothing_shared_is_an_error() -> None:
    """Differences and win rates of methods without a common prompt are refused."""
    evaluation = Evaluation(
        methods=[MethodInfo("a", "base", ""), MethodInfo("b", "mope", "")],
        answers=[scored("a", 0, 0.1), scored("b", 1, 0.9)],
    )
    with pytest.raises(ConfigError, match="'a' and 'b'"):
        measure_cells(evaluation, "reward").difference("a", "b")
    with pytest.raises(ConfigError, match="'a' and 'b'"):
        win_rates(evaluation, "a", "b")
    assert win_rate_matrix(evaluation) == {}


def test_one_prompt_has_no_interval() -> None:
    """The spread over prompts cannot be known from one prompt, so that no verdict rests on it."""
    interval = measure_cells(of_rewards(a=[0.3]), "reward").mean("a")
    assert interval.value == pytest.approx(0.3)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_shares_of_the_headroom() -> None:
    """The bottom has 0, the top 1, half-way 0.5, each with an interval of no width where the ratio is fixed."""
    bottom, top = [0.2, 0.4, 0.1], [0.8, 0.6, 0.9]
    half = [(low + high) / 2 for low, high in zip(bottom, top, strict=True)]
    cells = measure_cells(of_rewards(bottom=bottom, half=half, top=top), "reward")
    for method, expected in (("bottom", 0.0), ("half", 0.5), ("top", 1.0)):
        share = cells.share(method, bottom="bottom", top="top")
        assert share is not None
        assert (share.value, share.low, share.high) == pytest.approx((expected,) * 3)


def test_no_headroom_no_share() -> None:
    """Where bottom and top are equal there is no share, rather than a division by 0."""
    cells = measure_cells(of_rewards(bottom=[0.5, 0.5], top=[0.4, 0.6]), "reward")
    assert cells.share("top", bottom="bottom", top="top") is None


def test_win_rates_are_symmetric() -> None:
    """The two rates of a pair sum to 1 and their intervals mirror each other, by reward and by dimension."""
    evaluation = evaluation_of(TWO | {"b": ("mope", 0.3)}, num_samples=2)
    ours, theirs = win_rates(evaluation, "a", "b"), win_rates(evaluation, "b", "a")
    pairs = [(ours.reward, theirs.reward), (ours.average, theirs.average)]
    pairs += [(ours.dimensions[name], theirs.dimensions[name]) for name in evaluation.dimensions]
    for one, other in pairs:
        assert one.value + other.value == pytest.approx(1.0)
        assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))
    matrix = win_rate_matrix(evaluation)
    assert matrix["a", "b"].value == pytest.approx(ours.reward.value)
    assert matrix["b", "a"].low == pytest.approx(theirs.reward.low)


def test_win_rate_of_a_known_case() -> None:
    """One win, one tie, one loss and one answer without a counterpart: one half."""
    evaluation = of_rewards(a=[0.9, 0.5, 0.1], b=[0.1, 0.5 + 1e-14, 0.9])
    evaluation = replace(evaluation, answers=[*evaluation.answers, scored("a", 0, 1.0, sample=1)])
    assert win_rates(evaluation, "a", "b").reward.value == 0.5


def test_two_answers_in_one_cell_are_refused() -> None:
    """Samples must be numbered, or win rates would compare who knows what."""
    evaluation = of_rewards(a=[0.9], b=[0.1])
    doubled = replace(evaluation, answers=[*evaluation.answers, scored("a", 0, 1.0)])
    with pytest.raises(ConfigError, match="two answers to prompt 0"):
        win_rates(doubled, "a", "b")


def test_summaries() -> None:
    """Every method is summarised; the share goes from 0 to 1; unmeasured things are None; the best rival is found."""
    evaluation = evaluation_of()
    by_name = {summary.info.name: summary for summary in summarise(evaluation)}
    assert list(by_name) == [method.name for method in evaluation.methods]
    assert headroom_measure(evaluation) == "oracle"
    ideal, bottom = by_name["ideal"].share, by_name["uniform mixture"].share
    assert ideal is not None
    assert bottom is not None
    assert (ideal.value, bottom.value) == pytest.approx((1.0, 0.0))
    best = best_training_free(list(by_name.values()))
    assert best is not None
    assert best.info.name == "product (untrained)"


def test_summaries_without_further_measures() -> None:
    """Without oracle and ends there are no such figures, and a method without answers is left out."""
    evaluation = of_rewards(a=[0.1, 0.2], b=[])
    (summary,) = summarise(evaluation)
    assert (summary.info.name, summary.oracle, summary.share, summary.fluency) == ("a", None, None, None)
    assert summary.wins["concise"].value == pytest.approx(0.15)


def test_verdicts_follow_the_data() -> None:
    """The same method is better, even or worse as its answers are."""
    outcomes = []
    for quality in (0.6, 0.0, -0.6):
        evaluation = evaluation_of(TWO | {"b": ("mope", quality)})
        (verdict,) = verdicts(evaluation, summarise(evaluation))
        outcomes.append(verdict.outcome)
    assert outcomes == ["better", "even", "worse"]


def test_seeds_combine() -> None:
    """Several evaluations give mean, smallest and largest per method; a method of one seed says so."""
    spread = combine_seeds([of_rewards(a=[0.1, 0.3]), of_rewards(a=[0.4, 0.4], b=[0.5, 0.5])])
    assert (spread["a"].mean, spread["a"].low, spread["a"].high) == pytest.approx((0.3, 0.2, 0.4))
    assert (spread["a"].num_seeds, spread["b"].num_seeds) == (2, 1)


def test_cells_average_samples_first() -> None:
    """A cell with more samples does not count more."""
    answers = [scored("a", 0, 0.0), scored("a", 0, 0.2, sample=1), scored("a", 1, 0.5)]
    cells = measure_cells(Evaluation([MethodInfo("a", "base", "")], answers), "reward")
    assert isinstance(cells, MeasuredCells)
    assert cells.mean("a").value == pytest.approx(0.3)


GAINS = {"before part": 0.1, "after part": 0.2, "before whole": 0.3, "after whole": 0.7}
PART, WHOLE = ("before part", "after part"), ("before whole", "after whole")


def gains_of(spread: float, *, num_prompts: int = 40, seed: int = 0) -> Evaluation:
    """Four methods with the means of `GAINS` and noise of their own; part and whole answer different preferences."""
    rng = np.random.default_rng(seed)
    answers = [
        scored(name, prompt, mean + float(rng.normal(0, spread)), preference=name.split()[1])
        for name, mean in GAINS.items()
        for prompt in range(num_prompts)
    ]
    return Evaluation([MethodInfo(name, "mope", "") for name in GAINS], answers)


def test_gain_ratio_of_a_known_case() -> None:
    """A gain of 0.1 where the whole is 0.4 is a quarter; what prompts differ in alone widens nothing."""
    evaluation = gains_of(0.0)
    eased = [replace(answer, reward=answer.reward + 0.05 * answer.prompt) for answer in evaluation.answers]
    for answers in (evaluation.answers, eased):
        ratio = measure_cells(replace(evaluation, answers=answers), "reward").gain_ratio(PART, WHOLE)
        assert ratio is not None
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.25,) * 3)


def test_gain_ratio_keeps_its_sign() -> None:
    """What became worse has a negative share, and the whole of itself is 1."""
    cells = measure_cells(gains_of(0.1), "reward")
    ratio, opposite = cells.gain_ratio(PART, WHOLE), cells.gain_ratio(PART[::-1], WHOLE)
    assert ratio is not None
    assert opposite is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((-opposite.value, -opposite.high, -opposite.low))
    whole = cells.gain_ratio(WHOLE, WHOLE)
    assert whole is not None
    assert (whole.value, whole.low, whole.high) == pytest.approx((1.0,) * 3)


def test_gain_ratio_intervals_cover_the_truth() -> None:
    """About 95 % of the intervals of 100 repetitions hold the true quarter (binomial: at least 89 %)."""
    held = 0
    for seed in range(100):
        ratio = measure_cells(gains_of(0.15, seed=seed), "reward", num_resamples=400).gain_ratio(PART, WHOLE)
        assert ratio is not None
        assert ratio.low < ratio.value < ratio.high
        held += ratio.low <= 0.25 <= ratio.high
    assert 89 <= held < 100


def test_no_gain_no_ratio() -> None:
    """Where the whole gained nothing there is no share; where one of the four has no answers it is an error."""
    evaluation = gains_of(0.0)
    level = [replace(one, reward=0.5) if one.method in WHOLE else one for one in evaluation.answers]
    assert measure_cells(replace(evaluation, answers=level), "reward").gain_ratio(PART, WHOLE) is None
    some = [one for one in evaluation.answers if one.method != "after part"]
    with pytest.raises(ConfigError, match="answered by 'after part'"):
        measure_cells(replace(evaluation, answers=some), "reward").gain_ratio(PART, WHOLE)
