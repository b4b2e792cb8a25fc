"""Bradley-Terry, the panel of reward models, the references that are kept, and how the configuration opens them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope_bb.config import Config, load_config, parse_config
from mope_bb.errors import ConfigError, RewardError
from mope_bb.rewards.base import (
    Conversation,
    References,
    RewardPanel,
    Scored,
    checked_score,
    scalarise,
    win_probability,
)
from mope_bb.rewards.classifier import ClassifierReward
from mope_bb.rewards.function import FunctionReward
from mope_bb.rewards.registry import open_reward_panel
from mope_bb.types import Message

EXPERT: dict[str, Any] = {"name": "short", "provider": "scripted", "dimension": "concise"}
FINITE = st.floats(allow_nan=False, allow_infinity=False)
QUESTION = (Message("user", "Why?"),)


class Counting(FunctionReward):
    """A reward function that records what it is asked."""

    def __init__(self, dimension: str, function: Callable[[list[dict[str, Any]], str], float]) -> None:
        super().__init__(dimension, function)
        self.batches: list[list[str]] = []
        self.is_closed = False

    def score(self, conversations: Sequence[Conversation]) -> list[float | RewardError]:
        self.batches.append([one[-1].content for one in conversations])
        return super().score(conversations)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def models() -> dict[str, Counting]:
    """The length of an answer, and a number that only some answers are."""
    return {
        "long": Counting("long", lambda messages, answer: len(answer)),
        "numeric": Counting("numeric", lambda messages, answer: float(answer)),
    }


@given(FINITE, FINITE)
def test_win_probability_is_a_sigmoid(score: float, reference: float) -> None:
    """In [0, 1] for any finite scores, and the two sides of a comparison share 1."""
    chance = win_probability(score, reference)
    assert 0 <= chance <= 1
    assert chance + win_probability(reference, score) == pytest.approx(1)


def test_win_probability_values() -> None:
    """Equal scores give a half; a lead of log 3 gives three quarters; extremes do not overflow."""
    assert win_probability(7.0, 7.0) == 0.5
    assert win_probability(1 + math.log(3), 1.0) == pytest.approx(0.75)
    assert (win_probability(1e308, -1e308), win_probability(-1e308, 1e308)) == (1.0, 0.0)


def test_scalarise_is_the_weighted_mean() -> None:
    """Weights need not sum to 1; a weight of 0 leaves a dimension out."""
    assert scalarise({"a": 0.2, "b": 0.8}, {"a": 3, "b": 1}) == pytest.approx(0.35)
    assert scalarise({"a": 0.2}, {"a": 0.5, "b": 0}) == 0.2


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"a": 1, "b": 1}, "dimension 'b'"), ({}, "above 0"), ({"a": 0}, "above 0"), ({"a": 2, "b": -1}, "negative")],
)
def test_scalarise_invents_nothing(weights: dict[str, float], message: str) -> None:
    """A dimension without a win, and weights that weigh nothing, are errors."""
    with pytest.raises(RewardError, match=message):
        scalarise({"a": 0.2}, weights)


def test_checked_score_lets_only_finite_numbers_pass() -> None:
    """A number is itself; anything else is the error that names it."""
    assert checked_score(3, "kind") == 3.0
    assert "'kind' is nan" in str(checked_score(math.nan, "kind"))
    assert "'kind' is 'high'" in str(checked_score("high", "kind"))


def test_panel_scores_each_answer_in_its_own_dimensions(models: dict[str, Counting]) -> None:
    """Raw scores and chances against the reference, only where they are asked for."""
    panel = RewardPanel(models)
    both, one, none = panel.wins(
        [QUESTION] * 3, ["12", "abc", "x"], ["3", "abcd", "y"], [("long", "numeric"), ["long"], ()]
    )
    assert isinstance(both, Scored)
    assert both.scores == {"long": 2.0, "numeric": 12.0}
    assert both.wins == pytest.approx({"long": win_probability(2, 1), "numeric": win_probability(12, 3)})
    assert one == Scored({"long": 3.0}, {"long": win_probability(3, 4)})
    assert none == Scored({}, {})
    assert models["numeric"].batches == [["12", "3"]]


def test_panel_asks_nothing_twice(models: dict[str, Counting]) -> None:
    """One batch per dimension without repetitions; references are remembered, but only for their own prompt."""
    panel = RewardPanel(models)
    first = panel.wins([QUESTION] * 3, ["aa", "aa", "ref"], ["ref"] * 3, [["long"]] * 3)
    assert first[0] == first[1]
    assert isinstance(first[2], Scored)
    assert first[2].wins == {"long": 0.5}
    panel.wins([QUESTION], ["bbb"], ["ref"], [["long"]])
    panel.wins([(Message("user", "How?"),)], ["bbb"], ["ref"], [["long"]])
    assert models["long"].batches == [["aa", "ref"], ["bbb"], ["bbb", "ref"]]
    assert models["numeric"].batches == []


def test_one_failed_dimension_costs_one_answer(models: dict[str, Counting]) -> None:
    """An answer or a reference that cannot be scored is an error for that answer; nothing of it is remembered."""
    panel = RewardPanel(models)
    good, bad, bad_reference = panel.wins(
        [QUESTION] * 3, ["1", "word", "2"], ["0", "0", "nothing"], [["long", "numeric"]] * 3
    )
    assert isinstance(good, Scored)
    assert isinstance(bad, RewardError)
    assert isinstance(bad_reference, RewardError)
    assert "'numeric'" in str(bad)
    assert "reference" in str(bad_reference)
    panel.wins([QUESTION], ["2"], ["nothing"], [["numeric"]])
    assert models["numeric"].batches[-1] == ["2", "nothing"]


def test_panel_refuses_what_it_cannot_mean(models: dict[str, Counting]) -> None:
    """A dimension without a model names the known ones; lists of different length are a mistake."""
    panel = RewardPanel(models)
    with pytest.raises(RewardError, match="'kind'") as caught:
        panel.wins([QUESTION], ["a"], ["b"], [["kind"]])
    assert caught.value.hint == "Known: long, numeric."
    with pytest.raises(ValueError, match="zip"):
        panel.wins([QUESTION], ["a", "b"], ["c"], [["long"]])


def test_panel_closes_its_models(models: dict[str, Counting]) -> None:
    """`close` reaches every model."""
    RewardPanel(models).close()
    assert all(model.is_closed for model in models.values())


def test_references_survive_the_process(tmp_path: Path) -> None:
    """What one object wrote the next one reads, whatever the messages hold; the first answer to a prompt stays."""
    path = tmp_path / "run" / "references.jsonl"
    asked = (Message("assistant", "", ('{"name": "find"}',)), Message("tool", "naïve\n😊", tool_call_id="1"))
    first = References(path)
    assert first.get(asked) is None
    assert first.put(asked, "one\ntwo ☕") == "one\ntwo ☕"
    assert first.put(asked, "another") == "one\ntwo ☕"
    first.put(QUESTION, "")
    again = References(path)
    assert again.get(asked) == "one\ntwo ☕"
    assert again.get(QUESTION) == ""
    assert again.get((Message("system", "Why?"),)) is None
    assert len(again) == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {"messages": [{"role": "user", "content": "Why?"}], "text": ""}


def test_references_without_a_file() -> None:
    """Without a path nothing is written."""
    references = References(None)
    references.put(QUESTION, "Because.")
    assert references.get(QUESTION) == "Because."


def test_a_torn_last_line_is_written_over(tmp_path: Path) -> None:
    """A process that was killed while it wrote costs that line; reading alone does not touch the file."""
    path = tmp_path / "references.jsonl"
    first = References(path)
    first.put(QUESTION, "Because.")
    whole = path.read_bytes()
    path.write_bytes(whole + '{"messages": [], "text": "ü'.encode()[:-1])
    torn = path.read_bytes()
    again = References(path)
    assert (len(again), path.read_bytes()) == (1, torn)
    again.put((Message("user", "How?"),), "So.")
    again.put((Message("user", "When?"),), "Now.")
    assert path.read_bytes().startswith(whole)
    assert len(References(path)) == 3


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"text": "a"}', "1"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    """What cannot be read before the last line is an error with the line's number."""
    path = tmp_path / "references.jsonl"
    path.write_text(f'{{"messages": [], "text": "a"}}\n{line}\n')
    with pytest.raises(RewardError, match="line 2 is not a reference"):
        References(path)


def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    """A folder in place of the file is named."""
    with pytest.raises(RewardError, match="cannot be read"):
        References(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardError, match="cannot be"):
        References(tmp_path / "file" / "references.jsonl").put(QUESTION, "a")


def configured(reward: dict[str, Any]) -> Config:
    """A configuration with one dimension that has this reward."""
    return parse_config({"experts": [EXPERT], "dimensions": {"concise": {"reward": reward}}})


def test_configuration_opens_a_panel(llama_folder: Path, tmp_path: Path) -> None:
    """Kinds, and a path relative to the file, as `[dimensions.NAME]` gives them."""
    (tmp_path / "rm").symlink_to(llama_folder)
    file = tmp_path / "mope.toml"
    file.write_text(
        '[[experts]]\nname = "short"\nprovider = "scripted"\ndimension = "concise"\n'
        '[dimensions.concise]\nreward = { kind = "classifier", path = "rm", device = "cpu", batch_size = 2 }\n'
        '[dimensions.listed]\nreward = { kind = "function", function = "builtins:max" }\n'
    )
    config = load_config(file)
    reward = config.dimensions["concise"].reward
    assert reward is not None
    assert reward.path == str(llama_folder)
    panel = open_reward_panel(config, ["concise", "listed"])
    assert panel.dimensions == ("concise", "listed")
    assert isinstance(panel._models["concise"], ClassifierReward)
    [scored] = panel.wins([QUESTION], ["good answer"], ["bad"], [["concise"]])
    assert isinstance(scored, Scored)
    panel.close()


def test_a_dimension_without_reward_is_named() -> None:
    """An unknown dimension, and one without a reward, are configuration errors that say what to write."""
    config = parse_config({"experts": [EXPERT], "dimensions": {"concise": {}}})
    for name in ("concise", "polite"):
        with pytest.raises(ConfigError, match=f"'{name}' has no reward") as caught:
            open_reward_panel(config, [name])
        assert f"[dimensions.{name}]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"kind": "classifier"}, "needs `path`"),
        ({"kind": "function"}, "needs `function`"),
        ({"kind": "function", "function": "a:b", "path": "x"}, "has no `path`"),
        ({"kind": "function", "function": "a.b"}, "function: .*'a.b'"),
        ({"kind": "oracle"}, "kind: .*'oracle'"),
        ({"kind": "classifier", "path": "x", "batch_size": 0}, "batch_size"),
        ({"kind": "classifier", "pth": "x"}, "unknown key 'dimensions.concise.reward.pth'"),
    ],
)
def test_wrong_rewards_are_named(reward: dict[str, Any], message: str) -> None:
    """The wrong setting is named with its place."""
    with pytest.raises(ConfigError, match=message) as caught:
        configured(reward)
    assert caught.value.hint == ("Did you mean 'path'?" if "pth" in reward else None)
