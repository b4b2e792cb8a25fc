"""The grammar and the oracle agree, and the oracle notices what is wrong."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from mope_bb.zoo import DIMENSIONS, example_questions
from mope_bb.zoo.facts import THINGS, VERBS
from mope_bb.zoo.language import (
    Style,
    Task,
    answer,
    combinations,
    ideal_answer,
    style_of,
    tasks,
    training_conversation,
)
from mope_bb.zoo.oracle import parse, score
from mope_bb.zoo.wording import style_sentences


def test_every_drawn_answer_is_fluent_and_true() -> None:
    """The oracle reads whatever the grammar writes."""
    rng = random.Random(0)
    for task in tasks(held_out=True) + tasks(held_out=False):
        text = answer(task, Style(), rng)
        assert (score(text, task).fluency, score(text, task).facts) == (1.0, 1.0), text


def test_a_fifth_is_held_out_of_every_verb_and_thing() -> None:
    """No verb or object is seen too rarely, and training never sees a held-out pair."""
    held_out = tasks(held_out=True)
    assert dict.fromkeys(VERBS, 8) == {verb: sum(t.verb == verb for t in held_out) for verb in VERBS}
    assert all(sum(t.thing == thing for t in held_out) in {3, 4} for thing in THINGS)
    questions = {t.question(form) for t in held_out for form in range(6)}
    rng = random.Random(1)
    seen = {m["content"] for _ in range(500) for m in training_conversation(rng)}
    assert not questions & seen


@pytest.mark.parametrize("poles", combinations())
def test_ideal_answer_has_its_poles(poles: tuple[str, ...]) -> None:
    """The ideal answer scores at the end of each of its poles."""
    task = tasks(held_out=True)[3]
    scores = score(ideal_answer(task, poles, seed=5), task)
    assert 1.0 == scores.of(poles[0]) == scores.of(poles[1])
    assert scores.of(poles[2]) == 2.0


@pytest.mark.parametrize("pole", DIMENSIONS)
def test_style_is_sharp_on_its_own_pole(pole: str) -> None:
    """An expert's data scores above the base's on the expert's own pole."""
    task, rng = tasks(held_out=False)[0], random.Random(2)
    own = sum(score(answer(task, style_of([pole]), rng), task).of(pole) for _ in range(100))
    base = sum(score(answer(task, Style(), rng), task).of(pole) for _ in range(100))
    assert own > base + 30


def test_oracle_notices_errors() -> None:
    """Wrong facts, repeated details, broken sentences and wrong order each cost."""
    task = Task(VERBS[0], THINGS[0])  # fix, bike
    right = "Grab a wrench and start.\n- Get four bolts."
    assert 1.0 == score(right, task).facts == score(right, task).fluency
    assert score(right.replace("bolts", "nails").replace("four", "two"), task).facts * 1.5 == 0.5
    assert score(right + "\n- Get four bolts.", task).fluency == 2 / 3
    assert score(right + "\n- Make sure you inspect it.", task).fluency == 2 / 3  # a kind that comes before parts
    assert score("Grab a wrench and. - Get four bolts. Grab a wrench and start.", task).fluency == 1 / 3
    assert 0.0 == score("", task).fluency == score("", task).concise
    assert parse("Hello there.\n- Get four bolts.")[0].role == "unknown"


def test_style_sentences_held_out_are_not_trained() -> None:
    """The two sets of wordings are disjoint and neither is empty."""
    for pole in DIMENSIONS:
        known, new = set(style_sentences(pole)), set(style_sentences(pole, held_out=True))
        assert known
        assert new
        assert not known & new


def test_example_questions_are_distinct() -> None:
    """The demonstration does not repeat itself."""
    assert len(set(example_questions())) == len(example_questions())


def test_import_is_light() -> None:
    """Neither `mope-bb --help` nor the language needs torch, transformers or xllamacpp."""
    code = "import sys, mope_bb.zoo as z; z.build_zoo; print({'torch', 'transformers', 'xllamacpp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
