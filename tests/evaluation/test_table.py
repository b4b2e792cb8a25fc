"""The evaluation in the terminal, wide and narrow."""

from __future__ import annotations

import pytest
from rich.console import Console, RenderableType

from mope_bb.errors import ConfigError
from mope_bb.evaluation.results import Evaluation, Study
from mope_bb.evaluation.table import before_and_after, method_table, render_evaluation, study_table
from tests.evaluation.synthetic import QUALITY, evaluation_of, whole_evaluation


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """An evaluation with everything."""
    return whole_evaluation()


def printed(part: RenderableType, width: int) -> str:
    """What a terminal of this width shows."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(part)
    return capture.get()


def test_wide(evaluation: Evaluation) -> None:
    """A wide terminal shows every column."""
    heading = printed(method_table(evaluation), 160).splitlines()[0]
    for column in ("reward", "oracle", "headroom", "friendly", "fluency", "facts", "tokens"):
        assert column in heading


@pytest.mark.parametrize(("width", "gone", "kept"), [(100, "friendly", "tokens"), (60, "headroom", "oracle")])
def test_narrow(evaluation: Evaluation, width: int, gone: str, kept: str) -> None:
    """A narrow terminal loses the lesser columns, not the figures of the others."""
    lines = printed(method_table(evaluation), width).splitlines()
    assert max(map(len, lines)) <= width
    assert gone not in lines[0]
    assert kept in lines[0]
    assert all(any(line.startswith(name) and "±" in line for line in lines) for name in QUALITY)


def test_verdicts_are_below(evaluation: Evaluation) -> None:
    """Both judges' verdicts name the rival and the interval."""
    text = printed(render_evaluation(evaluation, {"product (untrained)": "MoPE product"}), 200)
    assert "MoPE product beats the best training-free black-box method (product (untrained)) by 0." in text
    assert "(reward models)" in text
    assert "(oracle)" in text
    for part in ("Before and after training", "Seeing only the top k", "The weight as a slider", "Ablations"):
        assert part in text


def test_names_are_not_markup() -> None:
    """A name in square brackets is shown as it is."""
    evaluation = evaluation_of({"[red]x[/red]": ("base", 0.0)}, num_prompts=2)
    assert "[red]x[/red]" in printed(render_evaluation(evaluation), 100)


def test_one_prompt_shows_question_marks() -> None:
    """Where an interval cannot be known, the table says so."""
    assert "±?" in printed(method_table(evaluation_of(num_prompts=1)), 160)


def test_before_and_after_needs_its_methods(evaluation: Evaluation) -> None:
    """A method that was not evaluated is named."""
    with pytest.raises(ConfigError, match="'nobody'"):
        before_and_after(evaluation, {"nobody": "MoPE product"})


def test_studies_have_the_decimals_they_need() -> None:
    """Whole numbers have none, others at most three, nothing is a dash."""
    study = Study("s", "S", "Why.", ["k", "x", "y"], [[5.0, 0.5, 1 / 3], [20.0, 0.25, None]])
    rows = [line.split() for line in printed(study_table(study), 60).splitlines()]
    assert rows[2:4] == [["5", "0.50", "0.333"], ["20", "0.25", "–"]]


def test_a_study_without_rows() -> None:
    """An empty study is a title and an explanation."""
    assert "Why." in printed(study_table(Study("s", "S", "Why.", ["k"], [])), 60)
