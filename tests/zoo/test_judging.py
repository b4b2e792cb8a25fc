"""The zoo as an evaluation: which questions, and what the oracle makes of answers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from mope_bb.types import Message
from mope_bb.zoo.judging import Prompt, ZooJudge, spread_prompts, zoo_prompts
from mope_bb.zoo.language import Style, Task, answer, combinations, style_of, tasks
from mope_bb.zoo.wording import POLES, QUESTIONS

TRIPLES = combinations()


def even(poles: Sequence[str]) -> dict[str, float]:
    """Weights that are alike."""
    return dict.fromkeys(poles, 1.0)


def questions() -> list[tuple[Task, Prompt]]:
    """What is asked in an evaluation."""
    return list(zip(tasks(held_out=True), zoo_prompts(held_out=True), strict=True))


def test_held_out_and_training_prompts_are_disjoint() -> None:
    """Together they are every pair once, as a question of the user's in one of several forms."""
    known, new = zoo_prompts(held_out=False), zoo_prompts(held_out=True)
    assert not set(known) & set(new)
    assert len(set(known) | set(new)) == len(tasks(held_out=False)) + len(tasks(held_out=True))
    for held_out, prompts in ((False, known), (True, new)):
        for task, prompt in zip(tasks(held_out=held_out), prompts, strict=True):
            assert prompt in {(Message("user", task.question(form)),) for form in range(len(QUESTIONS))}
    assert all(len({message.content.split()[0] for (message,) in prompts}) > 3 for prompts in (known, new))


@pytest.mark.parametrize("held_out", [False, True])
def test_spread_prompts_has_no_repetition(held_out: bool) -> None:
    """So many different ones of the right kind, or all that there are; equal seeds draw equally."""
    every = zoo_prompts(held_out=held_out)
    for count in (1, 40, len(every), 10_000):
        found = spread_prompts(count, held_out=held_out, seed=3)
        assert len(found) == len(set(found)) == min(count, len(every))
        assert set(found) <= set(every)
    assert spread_prompts(20, held_out=held_out, seed=3) == spread_prompts(20, held_out=held_out, seed=3)
    assert set(spread_prompts(20, held_out=held_out, seed=3)) != set(spread_prompts(20, held_out=held_out, seed=4))


def test_triples_take_a_pole_of_each_axis() -> None:
    """All eight."""
    assert set(TRIPLES) == {(a, b, c) for a in POLES[0] for b in POLES[1] for c in POLES[2]}


@pytest.mark.parametrize("poles", TRIPLES, ids=" ".join)
def test_ideal_answers_beat_the_base(poles: tuple[str, ...]) -> None:
    """Never worse than the base's answers, clearly better on the whole, and without a slip."""
    judge, rng = ZooJudge(), random.Random(0)
    ideal, base = [], []
    for seed, (task, prompt) in enumerate(questions()):
        reference, other = (answer(task, Style(), rng) for _ in range(2))
        ideal.append(judge.measures(prompt, even(poles), judge.ideal(prompt, poles, seed), reference))
        base.append(judge.measures(prompt, even(poles), other, reference)["oracle"])
    assert all((one["fluency"], one["facts"]) == (1.0, 1.0) for one in ideal)
    assert min(one["oracle"] for one in ideal) >= 0.5
    assert sum(one["oracle"] for one in ideal) / len(ideal) > sum(base) / len(base) + 0.15
    assert sum(base) / len(base) == pytest.approx(0.5, abs=0.05)


def test_oracle_is_weighted_like_the_reward() -> None:
    """An answer that has one pole only counts by that pole's weight; what weights sum to does not matter."""
    judge, rng = ZooJudge(), random.Random(1)
    task, prompt = questions()[7]
    neutral = replace(style_of(["concise"], sharpness=1.0), tone=(0.0, 0.0, 1.0))
    reference = answer(task, neutral, rng)
    friendly = answer(task, replace(neutral, tone=(1.0, 0.0, 0.0)), rng)

    def oracle(**weights: float) -> float:
        return judge.measures(prompt, weights, friendly, reference)["oracle"]

    alone, even_ = oracle(friendly=1.0), oracle(concise=1.0)
    assert alone > 0.8
    assert even_ == pytest.approx(0.5)
    assert oracle(grumpy=1.0) == pytest.approx(1 - alone)
    assert oracle(friendly=3.0, concise=1.0) == pytest.approx(0.75 * alone + 0.25 * even_)
    assert oracle(friendly=0.3, concise=0.1) == pytest.approx(oracle(friendly=3.0, concise=1.0))


def test_wrong_facts_and_broken_sentences_cost() -> None:
    """Another question's answer is less true; half a sentence is less fluent."""
    judge = ZooJudge()
    (_, prompt), (_, other) = questions()[0], questions()[40]
    text = judge.ideal(prompt, TRIPLES[2], seed=0)
    assert judge.measures(other, {"simple": 1.0}, text, text)["facts"] < 1.0
    assert judge.measures(prompt, {"simple": 1.0}, text[: len(text) // 2], text)["fluency"] < 1.0


def test_every_form_of_every_question_is_known() -> None:
    """The judge knows what is asked; the ideal depends on seed and poles, not on their order or the question's form."""
    judge = ZooJudge()
    for held_out in (False, True):
        for task in tasks(held_out=held_out)[::7]:
            asked = [(Message("user", task.question(form)),) for form in range(len(QUESTIONS))]
            assert len({judge.ideal(prompt, TRIPLES[5], seed=1) for prompt in asked}) == 1
    (_, prompt) = questions()[3]
    assert judge.ideal(prompt, TRIPLES[5], seed=1) == judge.ideal(prompt, TRIPLES[5][::-1], seed=1)
    assert len({judge.ideal(prompt, TRIPLES[5], seed) for seed in range(10)}) > 3
