"""Reward functions: called with the conversation and the answer; what they do wrong costs one answer."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mope_bb.config import RewardConfig
from mope_bb.errors import ConfigError, RewardError
from mope_bb.rewards.function import FunctionReward, open_function
from mope_bb.types import Message
from tests.rewards.conftest import conversation


def opened(path: str) -> FunctionReward:
    """The reward function at an import path."""
    return open_function("short", RewardConfig(kind="function", function=path))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, from which modules can be imported while the test lasts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_function_sees_conversation_and_answer() -> None:
    """Messages come in OpenAI's shape without the answer, which comes as text."""
    seen: list[Any] = []

    def shortness(messages: list[dict[str, Any]], answer: str) -> float:
        seen.append((messages, answer))
        return -len(answer)

    model = FunctionReward("short", shortness)
    assert model.score([(Message("system", "Be kind."), *conversation("Why?", "So."))]) == [-3.0]
    assert seen == [([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}], "So.")]


def test_numbers_of_any_kind_are_scores() -> None:
    """Integers, booleans and tensors of one number become floats."""
    results: dict[str, Any] = {"a": 2, "b": True, "c": torch.tensor(1.5)}
    model = FunctionReward("short", lambda messages, answer: results[answer])
    found = model.score([conversation("q", answer) for answer in results])
    assert found == [2.0, 1.0, 1.5]
    assert all(type(one) is float for one in found)


@pytest.mark.parametrize("value", [None, "1", math.nan, math.inf, -math.inf, [1.0], 10**400, torch.ones(2), 1j])
def test_what_is_no_finite_number_is_an_error(value: Any) -> None:
    """The error names the dimension and what came instead."""
    [result] = FunctionReward("short", lambda messages, answer: value).score([conversation("q", "a")])
    assert isinstance(result, RewardError)
    assert "'short'" in str(result)
    assert "number" in str(result)


def test_an_exception_costs_one_answer() -> None:
    """The error names dimension, type and message; the others are scored."""

    def strict(messages: list[dict[str, Any]], answer: str) -> float:
        return float(answer)

    first, bad, last = FunctionReward("short", strict).score([conversation("q", text) for text in ("1", "x", "2")])
    assert (first, last) == (1.0, 2.0)
    assert isinstance(bad, RewardError)
    assert "'short' raised ValueError: could not convert" in str(bad)


def test_import_from_the_current_directory(here: Path) -> None:
    """A module beside the user's configuration needs no installation."""
    (here / "my_rewards_of_test.py").write_text("def brevity(messages, answer):\n    return -len(answer)\n")
    assert opened("my_rewards_of_test:brevity").score([conversation("q", "four")]) == [-4.0]


def test_what_cannot_be_imported_is_explained(here: Path) -> None:
    """A missing module, a module that fails and a misspelt name are configuration errors with a hint."""
    (here / "broken_rewards_of_test.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"'short'.*No module named 'nowhere_at_all'") as caught:
        opened("nowhere_at_all:f")
    assert str(here) in str(caught.value.hint)
    with pytest.raises(ConfigError, match="division by zero"):
        opened("broken_rewards_of_test:f")
    with pytest.raises(ConfigError, match="no function 'sqqrt'") as caught:
        opened("math:sqqrt")
    assert caught.value.hint == "Did you mean 'sqrt'?"
    with pytest.raises(ConfigError, match="no function 'pi'"):
        opened("math:pi")
