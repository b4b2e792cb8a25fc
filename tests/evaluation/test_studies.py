"""The studies: their rows, their shares on made-up answers, and how answers came about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from mope_bb.config import Config
from mope_bb.evaluation.evaluator import Evaluator
from mope_bb.evaluation.methods import EvalTask, Given, WrittenMethod
from mope_bb.evaluation.results import Evaluation, MethodInfo, ScoredAnswer, from_json, to_json
from mope_bb.evaluation.studies import (
    SLIDER,
    TENTHS,
    ceiling_study,
    coloured_answer,
    comparison_study,
    gain_kept,
    gain_study,
    grouped,
    slider_study,
    truncation_study,
    weights_over_answer,
)
from mope_bb.evaluation.suite import GEOMETRIC, STATIC, UNIFORM, WEIGHTED, Suite, ceiling_name, mope_name
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import Lists, MergeRule
from mope_bb.pcm.model import PreferenceControlModel, build_pcm
from mope_bb.pcm.rollouts import Rollout, RolloutRequest
from mope_bb.rewards.base import win_probability
from mope_bb.types import END, Piece
from mope_bb.zoo import DIMENSIONS
from mope_bb.zoo.build import Zoo
from tests.evaluation.conftest import evaluator_of, prepared, tasks_of

LONG, SHORT = "long", "short"
BOTH = [("concise", "friendly")]


def answer(method: str, prompt: int, reward: float, *, preference: str = "concise", **measures: float) -> ScoredAnswer:
    """One answer with a reward and further measures."""
    wins = {"concise": reward}
    return ScoredAnswer(method, prompt, preference, 0, "", 1, 0.0, wins, wins, reward, dict(measures))


def written(name: str, text: str) -> WrittenMethod:
    """A method that always says the same."""
    return WrittenMethod(MethodInfo(name, "training-free", ""), lambda task, seed: text)


def by_number(dimension: str, text: str) -> float:
    """The score is the answer's first word."""
    return float(text.split(maxsplit=1)[0])


def chances(task: EvalTask, text: str, reference: str) -> dict[str, float]:
    """An oracle that knows the prompt only, and a fluency."""
    return {"oracle": task.prompt / 4, "fluency": 0.5}


# Several methods on several groups.


@pytest.mark.parametrize("has_oracle", [False, True])
def test_comparison_has_a_row_for_each_group_and_method(bench: ExpertBench, has_oracle: bool) -> None:
    """With the means over the group, and each answer under the name of its method and group."""
    groups = {"first": tasks_of(3, BOTH), "second": tasks_of(2, [("concise",), ("simple",)])}
    evaluator = evaluator_of(bench, by_number, measure=chances if has_oracle else None)
    for tasks in groups.values():
        prepared(evaluator, tasks)
    methods = [written("one", "1 and more"), written("two", "2")]
    study, answers = comparison_study(methods, groups, evaluator, name="name", title="Title", explanation="Why.")
    assert (study.name, study.title, study.explanation) == ("name", "Title", "Why.")
    oracle_columns = ["oracle", "± oracle"] if has_oracle else []
    assert study.columns == ["group", "method", "reward", "± reward", *oracle_columns, "tokens"]
    assert [row[:2] for row in study.rows] == [[group, one.info.name] for group in groups for one in methods]
    for row in study.rows:
        found = dict(zip(study.columns, row, strict=True))
        assert found["reward"] == pytest.approx(win_probability({"one": 1.0, "two": 2.0}[str(row[1])], 0.0))
        assert found["± reward"] == pytest.approx(0.0)
        assert found["tokens"] == {"one": 3, "two": 1}[str(row[1])]
        if has_oracle:
            assert found["oracle"] == pytest.approx({"first": 1 / 4, "second": 1 / 8}[str(row[0])])
    assert [one.method for one in answers] == [
        name
        for group, tasks in groups.items()
        for one in methods
        for name in [grouped(group, one.info.name)] * len(tasks)
    ]
    assert grouped("first", "one") == "one (first)"


def test_comparison_samples_missing_references(bench: ExpertBench) -> None:
    """A group may hold prompts that nobody asked before."""
    evaluator, tasks = evaluator_of(bench), tasks_of(2, BOTH)
    comparison_study([written("one", "1")], {"new": tasks}, evaluator, name="", title="", explanation="")
    assert all(evaluator.references.get(task.messages) for task in tasks)


def test_what_one_prompt_cannot_tell_is_an_empty_cell(bench: ExpertBench) -> None:
    """One prompt has no interval: the study can still be written as JSON."""
    tasks = tasks_of(1, BOTH)
    evaluator = prepared(evaluator_of(bench, by_number), tasks)
    study, _ = comparison_study([written("one", "1")], {"few": tasks}, evaluator, name="", title="", explanation="")
    assert study.rows[0][3] is None
    ends = [answer(name, 0, reward, oracle=reward) for name, reward in RISING.items()]
    studies = [study, ceiling_study(of_answers(ends)), gain_study(in_groups(num_prompts=1), ["linear"], **GROUPS)]
    found = from_json(to_json(Evaluation([], [], studies=studies)))
    assert [row[-2:] for one in found.studies[1:] for row in one.rows] == [[None, None]] * 4


# Shares of gains and of headroom.

GROUPS = {"part": SHORT, "whole": LONG}
RISING = {UNIFORM: 0.2, WEIGHTED: 0.3, mope_name("linear"): 0.5, ceiling_name("linear"): 0.6}


def of_answers(answers: Sequence[ScoredAnswer]) -> Evaluation:
    """An evaluation of exactly these."""
    names = dict.fromkeys(one.method for one in answers)
    return Evaluation([MethodInfo(name, "mope", "") for name in names], list(answers))


def in_groups(
    rules: Mapping[str, str] = {"linear": WEIGHTED}, *, num_prompts: int = 4, kept: float = 0.25
) -> list[ScoredAnswer]:
    """Training gains 0.4 on long answers (by the oracle 0.2), and `kept` of it on short ones; prompts differ."""
    found = []
    for rule, untrained in rules.items():
        for group, share in ((LONG, 1.0), (SHORT, kept)):
            for prompt in range(num_prompts):
                ease = 0.1 * prompt
                found += [
                    answer(grouped(group, untrained), prompt, ease, oracle=ease),
                    answer(
                        grouped(group, mope_name(rule)),
                        prompt,
                        ease + 0.4 * share,
                        oracle=ease + 0.2 * math.sqrt(share),
                    ),
                ]
    return found


def test_gain_kept_of_a_known_case() -> None:
    """A quarter of the gain is kept on every prompt, so that the interval has no width; other methods do not matter."""
    pairs = [(grouped(group, WEIGHTED), grouped(group, mope_name("linear"))) for group in (SHORT, LONG)]
    for answers in (in_groups(), in_groups({"linear": WEIGHTED, "product": STATIC})):
        for measure, expected in (("reward", 0.25), ("oracle", 0.5)):
            kept = gain_kept(answers, part=pairs[0], whole=pairs[1], measure=measure)
            assert kept is not None
            assert (kept.value, kept.low, kept.high) == pytest.approx((expected,) * 3)


def test_gain_kept_of_nothing_is_nothing() -> None:
    """Where the whole is no gain, or a method has no answers, there is no share."""
    (part, whole) = [(grouped(group, WEIGHTED), grouped(group, mope_name("linear"))) for group in (SHORT, LONG)]
    level = [replace(one, reward=0.5) if one.method in whole else one for one in in_groups()]
    assert gain_kept(level, part=part, whole=whole, measure="reward") is None
    assert gain_kept(level, part=part, whole=whole, measure="oracle") is not None
    some = [one for one in in_groups() if one.method != part[0]]
    assert gain_kept(some, part=part, whole=whole, measure="reward") is None


def test_gain_study_has_a_row_for_each_rule_and_measure() -> None:
    """Each trained PCM against its own rule without training; a rule that was not compared has empty cells."""
    rules = {"product": STATIC, "linear": WEIGHTED}
    study = gain_study(in_groups(rules), [*rules, "geometric"], **GROUPS)
    assert study.columns == ["method", "by", "kept", "low", "high"]
    names = [mope_name(rule) for rule in ("product", "linear", "geometric")]
    assert [row[:2] for row in study.rows] == [[name, measure] for name in names for measure in ("reward", "oracle")]
    for row, expected in zip(study.rows[:4], (0.25, 0.5) * 2, strict=True):
        assert row[2:] == pytest.approx([expected] * 3)
    assert [row[2:] for row in study.rows[4:]] == [[None] * 3] * 2
    unmeasured = [replace(one, measures={}) for one in in_groups()]
    assert [row[1] for row in gain_study(unmeasured, ["linear"], **GROUPS).rows] == ["reward"]


def test_ceiling_study_of_a_known_case() -> None:
    """Shares of the way from the uniform mixture to the rule's own ceiling; rules that lack an end have no rows."""
    rising = {**RISING, STATIC: 0.4, mope_name("product"): 0.9, GEOMETRIC: 0.3, ceiling_name("geometric"): 0.7}
    answers = [
        answer(name, prompt, 0.0, oracle=oracle + 0.01 * prompt)
        for name, oracle in rising.items()
        for prompt in range(4)
    ]
    study = ceiling_study(of_answers(answers))
    assert study.columns == ["method", "oracle", "ceiling", "share", "low", "high"]
    assert [row[0] for row in study.rows] == [WEIGHTED, mope_name("linear"), GEOMETRIC]
    for row, expected in zip(study.rows, ((0.3, 0.6, 0.25), (0.5, 0.6, 0.75), (0.3, 0.7, 0.2)), strict=True):
        oracle, ceiling, share = expected
        assert row[1:] == pytest.approx([oracle + 0.015, ceiling + 0.015, share, share, share])


def test_a_ceiling_that_reaches_nothing_has_no_shares() -> None:
    """Where the ceiling is as low as the bottom, the cells of the share are empty."""
    flat = dict.fromkeys(RISING, 0.5)
    answers = [answer(name, prompt, 0.0, oracle=oracle) for name, oracle in flat.items() for prompt in range(2)]
    assert [row[3:] for row in ceiling_study(of_answers(answers)).rows] == [[None] * 3] * 2


# On the nano zoo.


@pytest.fixture(scope="module")
def suite(nano: Zoo, bench: ExpertBench, config: Config) -> Suite:
    """PCMs whose scores depend on what they read."""

    def pcm_of(rule: str) -> PreferenceControlModel:
        pcm = build_pcm(str(nano.folder("base")), DIMENSIONS)
        pcm.model.score.weight.data.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(0))
        pcm.rule, pcm.policy_version = rule, 1
        return pcm

    return Suite(config, bench, {rule: pcm_of(rule) for rule in ("linear", "product")})


@pytest.fixture
def evaluator(bench: ExpertBench) -> Evaluator:
    """Scores by length; references are there."""
    score = {"concise": -1.0, "informative": 1.0}
    return prepared(
        evaluator_of(bench, lambda dimension, text: score.get(dimension, 0.1) * len(text), measure=chances),
        tasks_of(4),
    )


def test_truncation_has_a_row_for_each_length_and_method(suite: Suite, evaluator: Evaluator) -> None:
    """The longer the lists, the less is off them; with the whole vocabulary nothing is."""
    study = truncation_study(suite, evaluator, tasks_of(3, BOTH), (2, 20, 100_000))
    names = [STATIC, mope_name("linear"), mope_name("product")]
    assert [row[:2] for row in study.rows] == [[str(k), name] for k in (2, 20, 100_000) for name in names]
    for row in study.rows:
        found = dict(zip(study.columns, row, strict=True))
        assert 0.0 < float(found["reward"] or 0) < 1.0
        assert found["fluency"] == 0.5
    missing = [[float(row[-1] or 0) for row in study.rows[first : first + 3]] for first in (0, 3, 6)]
    assert all(few > more > 1e-3 for few, more in zip(missing[0], missing[1], strict=True))
    assert missing[2] == pytest.approx([0.0] * 3, abs=1e-6)
    assert {model.top_k for model in suite.bench.models.values()} == {20}


def test_truncation_without_further_measures(suite: Suite, evaluator: Evaluator) -> None:
    """No measure, no fluency; one prompt, no interval."""
    evaluator.measure = None
    study = truncation_study(replace(suite, pcms={}), evaluator, tasks_of(1, BOTH), (5,))
    (row,) = study.rows
    assert row[:2] == ["5", STATIC]
    assert row[3:5] == [None, None]


def test_slider_has_a_row_for_each_weight(suite: Suite, evaluator: Evaluator) -> None:
    """Mean length and score of each method, from weak to strong; the plot shows the lengths."""
    tasks = tasks_of(4, [("grumpy",)])
    study = slider_study(suite, evaluator, tasks, "concise", "informative")
    names = [WEIGHTED, STATIC, mope_name("linear"), mope_name("product")]
    assert study.columns == [
        "weight of concise",
        *(f"{name}: {what}" for name in names for what in ("tokens", "score")),
    ]
    assert [row[0] for row in study.rows] == [f"{weight:g}" for weight in SLIDER]
    assert study.plot is not None
    assert study.plot["y"] == [f"{name}: tokens" for name in names]
    for row in study.rows:
        for tokens, score in zip(row[1::2], row[2::2], strict=True):
            assert 1.0 <= float(tokens or 0) <= evaluator.options.max_tokens
            assert float(score or 0) < 0.0
    assert len({str(row[1:]) for row in study.rows}) == len(SLIDER)


def sampled(suite: Suite, rule: str) -> list[Given]:
    """Answers of a PCM."""
    options = replace(evaluator_of(suite.bench).options, max_tokens=24)
    found = suite.mope(rule).answer(tasks_of(6, BOTH), options, seed=0)
    return [given for given in found if given is not None]


@pytest.mark.parametrize("rule", ["linear", "product"])
def test_weights_of_real_answers_sum_to_one(suite: Suite, rule: str) -> None:
    """Every tenth, whatever the rule's own weights sum to."""
    found = weights_over_answer("method", "concise,friendly", sampled(suite, rule))
    assert list(found.experts) == ["concise", "friendly"]
    assert [sum(step) for step in zip(*found.experts.values(), strict=True)] == pytest.approx([1.0] * TENTHS)
    assert len({round(weight, 6) for weight in found.experts["concise"]}) == TENTHS


@pytest.mark.parametrize("rule", ["linear", "product"])
def test_coloured_tokens_are_the_answer(suite: Suite, rule: str) -> None:
    """Their texts are the answer's, their shares sum to 1, their weights are the rollout's."""
    for given in sampled(suite, rule):
        assert given.rollout is not None
        found = coloured_answer("Why?", "concise,friendly", "method", given.rollout)
        assert (found.question, found.preference, found.method) == ("Why?", "concise,friendly", "method")
        assert "".join(token["text"] for token in found.tokens) == given.rollout.text
        assert len(found.tokens) == len(given.rollout) - (given.rollout.pieces[-1] == END)
        for token, weights in zip(found.tokens, given.rollout.weights.tolist(), strict=False):
            assert sum(token["shares"].values()) == pytest.approx(1.0)
            assert list(token["weights"].values()) == pytest.approx(weights)


def rollout_of(weights: Sequence[Sequence[float]], pieces: Sequence[Piece], logprobs: Sequence[float]) -> Rollout:
    """An answer of a and b with these weights, to whom every piece, the second candidate, has these logprobs."""
    plan = Plan(MergeRule("linear"), ("a", "b"), (0.5, 0.5), base=None, preference_text="")
    count = len(pieces)
    lists = Lists(
        torch.tensor([[[-9.0, one] for one in logprobs]] * count), torch.zeros(count, 2), torch.zeros(count, 2)
    )
    zeros = torch.zeros(count)
    index = torch.ones(count, dtype=torch.long)
    request = RolloutRequest((), plan, 0)
    return Rollout(request, tuple(pieces), "length", lists, index, zeros, torch.tensor(weights), zeros, index)


def given_weights(*weights: tuple[float, float]) -> Given:
    """An answer with these weights."""
    return Given("", len(weights), 0.0, rollout_of(weights, [Piece(b"x", 1)] * len(weights), (0.0, 0.0)))


def test_weights_of_known_answers() -> None:
    """Answers of any length are cut into tenths; weights are taken as shares; every answer counts alike."""
    half = given_weights(*[(2.0, 0.0)] * 10, *[(0.0, 0.5)] * 10)
    assert weights_over_answer("", "", [half]).experts == {"a": [1.0] * 5 + [0.0] * 5, "b": [0.0] * 5 + [1.0] * 5}
    short = given_weights((1.0, 1.0), (1.0, 3.0))
    assert weights_over_answer("", "", [short]).experts["a"] == pytest.approx([0.5] * 5 + [0.25] * 5)
    uneven = given_weights((1.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    expected = [1.0] * 6 + [2 / 3] + [0.0] * 3
    assert weights_over_answer("", "", [uneven]).experts["a"] == pytest.approx(expected)
    both = weights_over_answer("", "", [half, Given("written", 1, 0.0), short]).experts["a"]
    assert both == pytest.approx([0.75] * 5 + [0.125] * 5)


def test_shares_of_a_known_answer() -> None:
    """Under the linear rule the share is weight times probability, normalised."""
    rollout = rollout_of([(0.25, 0.75)], [Piece(b"x", 1)], (math.log(0.6), math.log(0.1)))
    (token,) = coloured_answer("", "", "", rollout).tokens
    assert token["shares"] == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert token["weights"] == pytest.approx({"a": 0.25, "b": 0.75})


def test_a_character_that_is_cut_off_is_shown() -> None:
    """An answer may end within a character, which is complete or is not, as in the answer's own text."""
    for data in ([b"caf", b"\xc3", b"\xa9"], [b"caf", b"\xc3"], [b"\xf0\x9f"]):
        pieces = [Piece(part, number) for number, part in enumerate(data)]
        rollout = rollout_of([(0.5, 0.5)] * len(pieces), pieces, (0.0, 0.0))
        shown = [token["text"] for token in coloured_answer("", "", "", rollout).tokens]
        assert "".join(shown) == rollout.text != ""
    assert coloured_answer("", "", "", rollout_of([(0.5, 0.5)], [END], (0.0, 0.0))).tokens == []
