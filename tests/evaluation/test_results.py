"""The results of an evaluation: their JSON form, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from mope_bb.errors import ConfigError
from mope_bb.evaluation.results import Evaluation, MethodInfo, Study, from_json, to_json
from tests.evaluation.synthetic import evaluation_of, whole_evaluation


def test_round_trip() -> None:
    """What was written is read back equal, every section of it."""
    evaluation = whole_evaluation()
    assert from_json(to_json(evaluation)) == evaluation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"colour": "red"}, "unknown fields: colour"),
        ({"methods": [{"name": "x"}]}, "MethodInfo is incomplete"),
        ({"methods": [3]}, "must be a table"),
        ({"methods": []}, "not listed"),
    ],
)
def test_other_results_are_refused(change: dict[str, object], message: str) -> None:
    """Another format, unknown, missing and wrong fields are named."""
    table = json.loads(to_json(evaluation_of(num_prompts=1))) | change
    with pytest.raises(ConfigError, match=message):
        from_json(json.dumps(table))


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_text_that_is_no_result(text: str) -> None:
    """A broken or foreign file is a ConfigError, not a traceback."""
    with pytest.raises(ConfigError):
        from_json(text)


def test_numbers_must_be_finite() -> None:
    """A NaN is refused when written, since JSON has none."""
    evaluation = evaluation_of(num_prompts=1)
    broken = replace(evaluation, answers=[replace(evaluation.answers[0], entropy=math.nan)])
    with pytest.raises(ConfigError, match="JSON cannot"):
        to_json(broken)


def test_only_base_and_training_free_are_the_rivals() -> None:
    """Neither white-box methods, nor those that ask a reward model, nor ceilings are black-box and training-free."""
    infos = [MethodInfo("x", kind, "") for kind in ("base", "training-free", "white-box", "reward-at-inference")]
    assert [info.is_black_box_training_free for info in infos] == [True, True, False, False]
    assert not MethodInfo("x", "ceiling", "").is_black_box_training_free
    assert not MethodInfo("x", "mope", "").is_black_box_training_free


def test_methods_have_names_of_their_own() -> None:
    """Two methods of one name are refused."""
    with pytest.raises(ConfigError, match="two methods of one name"):
        Evaluation(methods=[MethodInfo("x", "base", ""), MethodInfo("x", "mope", "")], answers=[])


def test_a_study_fits_its_columns() -> None:
    """Short rows and plots of columns that do not exist are refused."""
    with pytest.raises(ConfigError, match="1 cells, expected 2"):
        Study("s", "S", "", ["a", "b"], [[1.0]])
    with pytest.raises(ConfigError, match="needs the column 'c'"):
        Study("s", "S", "", ["a", "b"], [[1.0, 2.0]], {"kind": "line", "x": "a", "y": ["c"], "error": None})
