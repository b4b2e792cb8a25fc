"""What a run trains on: prompt files line by line, and the preferences that are drawn."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mope_bb.config import Config, PreferenceMixConfig, parse_config
from mope_bb.errors import ConfigError
from mope_bb.training.tasks import StyleSource, WantedStyle, load_prompts, sentence_for
from mope_bb.types import Message

POLES = ("simple", "technical", "concise", "informative", "friendly", "grumpy")
AXES = (("simple", "technical"), ("concise", "informative"), ("friendly", "grumpy"))


def config_of(*, wordings: tuple[str, ...] = POLES, **mix: Any) -> Config:
    """Six dimensions on three axes; those in `wordings` can be said in words."""
    experts = [{"name": name, "provider": "scripted", "dimension": name} for name in POLES]
    dimensions = {name: {"wordings": [f"Be {name}.", f"Make it {name}."] if name in wordings else []} for name in POLES}
    train = {"preferences": {"axes": AXES, "opposites": 0.0, **mix}}
    return parse_config({"experts": experts, "dimensions": dimensions, "train": train})


def draw(config: Config, *, number: int = 300, seed: int = 0) -> list[WantedStyle]:
    """Preferences as a run draws them."""
    source = StyleSource(config, POLES, config.train.preferences)
    rng = random.Random(seed)
    return [source.draw(rng) for _ in range(number)]


def test_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    """Lines are the user's messages, without the space around them; empty lines do not count."""
    file = tmp_path / "prompts.txt"
    file.write_text('How?\n\n  Why é?  \n{"prompt": "text"}\n', encoding="utf-8")
    assert load_prompts(file) == (
        (Message("user", "How?"),),
        (Message("user", "Why é?"),),
        (Message("user", '{"prompt": "text"}'),),
    )


def test_jsonl_has_two_shapes(tmp_path: Path) -> None:
    """A prompt, or the messages of a conversation."""
    file = tmp_path / "prompts.jsonl"
    messages = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "How?"},
    ]
    file.write_text(json.dumps({"prompt": "Why?"}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    assert load_prompts(file) == (
        (Message("user", "Why?"),),
        tuple(Message(message["role"], message["content"]) for message in messages),
    )


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "list, expected an object"),
        ('"How?"', "str, expected an object"),
        (json.dumps({"prompt": " "}), "neither `prompt` nor `messages`"),
        (json.dumps({"prompt": 3}), "neither `prompt` nor `messages`"),
        (json.dumps({"question": "How?"}), "neither `prompt` nor `messages`"),
        (json.dumps({"messages": []}), "neither `prompt` nor `messages`"),
        (json.dumps({"messages": "Hi"}), "neither `prompt` nor `messages`"),
        (json.dumps({"messages": ["Hi"]}), "a message needs a role"),
        (json.dumps({"messages": [{"role": "user"}]}), "a message needs a role"),
        (json.dumps({"messages": [{"role": "robot", "content": "Hi"}, USER]}), "a message needs a role"),
        (json.dumps({"messages": [{"role": ["user"], "content": "Hi"}, USER]}), "a message needs a role"),
        (
            json.dumps({"messages": [USER, {"role": "assistant", "content": "Hi"}]}),
            "the last message is the assistant's",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    """Each mistake is one ConfigError that says where and what."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "fine"}) + "\n\n" + line + "\n")
    with pytest.raises(ConfigError, match=f"line 3: .*{reason}") as caught:
        load_prompts(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_a_file_without_prompts_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    """There is nothing to train on."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="holds no prompt"):
        load_prompts(tmp_path / name)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Not there, not UTF-8: each one ConfigError."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match="there is no prompt file"):
        load_prompts(tmp_path / "nothing.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(tmp_path / "latin.txt")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sizes_are_those_asked_for(size: int) -> None:
    """A share of 1 for one size draws only preferences of so many dimensions."""
    sizes = tuple(float(number == size) for number in (1, 2, 3))
    assert {len(style.weights) for style in draw(config_of(sizes=sizes))} == {size}


def test_shares_are_kept() -> None:
    """Sizes and forms come about as often as their shares say."""
    styles = draw(config_of(sizes=(0.2, 0.3, 0.5), names=0.5, weights=0.2, sentences=0.3), number=2000)
    by_size = Counter(len(style.weights) for style in styles)
    for size, share in ((1, 0.2), (2, 0.3), (3, 0.5)):
        assert by_size[size] / len(styles) == pytest.approx(share, abs=0.04)
    assert sum(style.preference.text is not None for style in styles) / len(styles) == pytest.approx(0.3, abs=0.04)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_two_poles_of_an_axis_never_meet(seed: int) -> None:
    """At most one dimension of each axis; weights are positive and sum to 1; names are known."""
    for style in draw(config_of(), number=50, seed=seed):
        assert all(len(set(axis) & set(style.weights)) <= 1 for axis in AXES)
        assert set(style.weights) <= set(POLES)
        assert all(weight > 0 for weight in style.weights.values())
        assert sum(style.weights.values()) == pytest.approx(1.0)
        assert style.label == ",".join(sorted(style.weights))


def test_sliders_are_drawn() -> None:
    """The share `opposites` asks for two poles of one axis with unequal weights, and its reward weighs them alike."""
    styles = draw(config_of(opposites=0.3), number=2000)
    sliders = [style for style in styles if any(set(style.weights) == set(axis) for axis in AXES)]
    assert len(sliders) / len(styles) == pytest.approx(0.3, abs=0.04)
    assert all(style.preference.weights == style.weights for style in sliders)
    assert {name for style in sliders for name, weight in style.weights.items() if weight > 0.5} == set(POLES)


def test_every_combination_is_drawn() -> None:
    """6 single dimensions, 12 pairs, 8 triples."""
    found = {frozenset(style.weights) for style in draw(config_of(), number=2000)}
    assert Counter(map(len, found)) == {1: 6, 2: 12, 3: 8}


def test_left_out_combinations_are_never_drawn() -> None:
    """In any order of their names; what contains them may be drawn."""
    left_out = [("friendly", "simple", "concise"), ("technical", "grumpy"), ("informative",)]
    found = {frozenset(style.weights) for style in draw(config_of(leave_out=left_out), number=2000)}
    assert not found & set(map(frozenset, left_out))
    assert Counter(map(len, found)) == {1: 5, 2: 11, 3: 7}
    assert frozenset(("technical", "grumpy", "concise")) in found


def test_left_out_opposites_are_never_drawn() -> None:
    """Two poles of an axis that are left out are no slider either."""
    styles = draw(config_of(opposites=1.0, leave_out=[("technical", "simple")]))
    assert {frozenset(style.weights) for style in styles} == {frozenset(axis) for axis in AXES[1:]}


def test_leaving_out_a_whole_size_draws_the_others() -> None:
    """Where every triple is left out, preferences have one or two dimensions."""
    triples = [(a, b, c) for a in AXES[0] for b in AXES[1] for c in AXES[2]]
    assert {len(style.weights) for style in draw(config_of(leave_out=triples))} == {1, 2}


def test_names_have_equal_weights() -> None:
    """The form "names" weighs all dimensions alike, for the user and for the reward."""
    for style in draw(config_of(names=1, weights=0, sentences=0)):
        assert style.preference.text is None
        assert style.preference.weights == style.weights
        assert set(style.weights.values()) == {1 / len(style.weights)}


def test_weights_are_those_of_the_reward() -> None:
    """The form "weights" draws different weights, of which none is tiny; the reward uses the same."""
    styles = draw(config_of(names=0, weights=1, sentences=0))
    for style in styles:
        assert style.preference.text is None
        assert style.preference.weights == style.weights
        assert min(style.weights.values()) * 5 >= max(style.weights.values()) - 1e-9
    triples = [tuple(style.weights.values()) for style in styles if len(style.weights) == 3]
    assert len(set(triples)) == len(triples) > 50


def test_sentences_ask_for_what_the_reward_weighs() -> None:
    """The form "sentences" uses one wording of each dimension, in any order; the reward weighs them alike."""
    styles = draw(config_of(names=0, weights=0, sentences=1))
    orders = set()
    for style in styles:
        text = style.preference.text
        assert text is not None
        assert not style.preference.weights
        named = [word for word in text.replace(".", "").split() if word in POLES]
        assert sorted(named) == sorted(style.weights)
        assert set(style.weights.values()) == {1 / len(style.weights)}
        orders.add(tuple(named))
    assert len(orders) > 26  # more than one order of each combination


def test_what_nobody_can_say_is_given_as_names() -> None:
    """A combination with a dimension without wordings is never a sentence."""
    styles = draw(config_of(wordings=("simple", "concise"), names=0.1, weights=0, sentences=0.9))
    sayable = {frozenset(style.weights) for style in styles if style.preference.text is not None}
    assert sayable == {frozenset(("simple",)), frozenset(("concise",)), frozenset(("simple", "concise"))}


def test_only_sentences_for_what_nobody_can_say() -> None:
    """With sentences alone, a dimension without wordings is still drawn, as names."""
    styles = draw(config_of(wordings=("simple",), names=0, weights=0, sentences=1))
    assert all((style.preference.text is not None) == (set(style.weights) == {"simple"}) for style in styles)


def test_without_axes_each_dimension_stands_alone() -> None:
    """Every combination of the dimensions can then be drawn."""
    config = config_of(axes=())
    source = StyleSource(config, POLES[:2], PreferenceMixConfig())
    rng = random.Random(0)
    assert {frozenset(source.draw(rng).weights) for _ in range(200)} == {
        frozenset(("simple",)),
        frozenset(("technical",)),
        frozenset(("simple", "technical")),
    }


@pytest.mark.parametrize("mix", [{"axes": (("simple", "tecnical"),)}, {"leave_out": [("tecnical", "concise")]}])
def test_what_names_no_dimension_is_an_error(mix: dict[str, Any]) -> None:
    """A misspelt name in the axes, or in what is never to be trained on, is one ConfigError that lists the known."""
    config = config_of(**mix)
    with pytest.raises(ConfigError, match=f"`{next(iter(mix))}` .*'tecnical', which has no expert") as caught:
        StyleSource(config, POLES, config.train.preferences)
    assert "technical" in str(caught.value.hint)


def test_a_seed_gives_the_same_preferences() -> None:
    """Equal seeds, equal draws."""
    assert draw(config_of(), seed=4) == draw(config_of(), seed=4)
    assert draw(config_of(), seed=4) != draw(config_of(), seed=5)


def test_sentence_joins_one_wording_of_each() -> None:
    """A sentence for two dimensions holds exactly one wording of each."""
    wordings = {"simple": ["S1.", "S2."], "friendly": ["F1."]}
    found = {sentence_for(["simple", "friendly"], wordings, random.Random(seed)).text for seed in range(30)}
    assert found == {"S1. F1.", "F1. S1.", "S2. F1.", "F1. S2."}


def test_everything_left_out_is_an_error() -> None:
    """Leaving out every combination is one ConfigError, not a crash within the run."""
    config = config_of(axes=(("simple",),), leave_out=[("simple",)])
    with pytest.raises(ConfigError, match="leaves no preference") as caught:
        StyleSource(config, POLES, config.train.preferences)
    assert "leave_out" in str(caught.value.hint)


def test_sizes_that_cannot_be_drawn_are_an_error() -> None:
    """Shares only for sizes that no combination has are one ConfigError."""
    config = config_of(axes=AXES[:1], sizes=(0.0, 0.0, 1.0))
    with pytest.raises(ConfigError, match="leaves no preference"):
        StyleSource(config, POLES, config.train.preferences)


def test_prompts_of_a_dataset_on_disk(tmp_path: Path) -> None:
    """A Hugging Face dataset's columns `prompt` or `messages`; what is wrong with it is named."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": ["one", "two"], "other": [1, 2]}).save_to_disk(str(tmp_path / "good"))
    assert load_prompts(tmp_path / "good") == ((Message("user", "one"),), (Message("user", "two"),))
    messages = [[{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]]
    datasets.Dataset.from_dict({"messages": messages}).save_to_disk(str(tmp_path / "chat"))
    assert load_prompts(tmp_path / "chat") == ((Message("system", "S"), Message("user", "Q")),)
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(ConfigError, match=r"1 rows and the columns \['text'\]"):
        load_prompts(tmp_path / "bad")
    datasets.Dataset.from_dict({"prompt": ["one", ""]}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="row 1: neither"):
        load_prompts(tmp_path / "empty")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is not the folder of a dataset"):
        load_prompts(tmp_path / "folder")


def test_a_dataset_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without the package datasets: one error that says what to install."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs datasets") as caught:
        load_prompts(tmp_path)
    assert "pip install datasets" in str(caught.value.hint)
