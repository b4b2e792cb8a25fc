"""Preferences: what the text of a flag means, and which expert gets how much."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope_bb.errors import PreferenceError
from mope_bb.preferences import Preference, Roster, describe_preference, parse_preference

NAMES = ("concise", "friendly", "grumpy")
weights_of = st.dictionaries(st.sampled_from(NAMES), st.floats(0.0, 1e6), min_size=1).filter(
    lambda weights: max(weights.values()) > 1e-6
)
ROSTER = Roster(
    dimension_of={"base": None, "short-a": "concise", "short-b": "concise", "kind": "friendly", "cross": "grumpy"},
    base="base",
    presets={"boss": {"concise": 3.0, "friendly": 1.0}},
    dimensions=("concise", "friendly", "grumpy", "polite"),
)


@given(weights=weights_of)
def test_weights_are_normalised(weights: dict[str, float]) -> None:
    """Weights sum to 1, are positive and keep their proportions; zeros are dropped."""
    found = Preference.of(weights).weights
    assert math.fsum(found.values()) == pytest.approx(1.0)
    assert all(value > 0 for value in found.values())
    total = math.fsum(weights.values())
    for name, value in weights.items():
        assert found.get(name, 0.0) == pytest.approx(value / total)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0, "b": 2.0}, "'a' is -1"),
        ({"a": math.nan}, "'a' is nan"),
        ({"a": math.inf}, "'a' is inf"),
        ({"a": 0.0}, "all weights are 0"),
        ({}, "all weights are 0"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[str, float], message: str) -> None:
    """The weight that is wrong is named with its value."""
    with pytest.raises(PreferenceError, match=message):
        Preference.of(weights)


def test_weights_that_overflow_are_refused() -> None:
    """Finite weights whose sum is not finite are an error of the user's, not an OverflowError."""
    with pytest.raises(PreferenceError):
        Preference.of({"a": 1.7e308, "b": 1.7e308})


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("concise", {"concise": 1.0}),
        ("concise,friendly", {"concise": 0.5, "friendly": 0.5}),
        ("  concise , friendly ", {"concise": 0.5, "friendly": 0.5}),
        ("concise=0.7,friendly=0.3", {"concise": 0.7, "friendly": 0.3}),
        ("concise=7,friendly=3", {"concise": 0.7, "friendly": 0.3}),
        ("concise = 3, friendly", {"concise": 0.75, "friendly": 0.25}),
        ("concise=1,friendly=0", {"concise": 1.0}),
        ("my-org/model:7b=1", {"my-org/model:7b": 1.0}),
    ],
)
def test_names_and_weights(text: str, weights: dict[str, float]) -> None:
    """Names without a number count 1; spaces and scale do not matter."""
    found = parse_preference(text)
    assert found.text is None
    assert found.weights == pytest.approx(weights)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("short and funny, please", "short and funny, please"),
        ("Be concise!", "Be concise!"),
        ("text:concise", "concise"),
        ("text: concise,friendly ", "concise,friendly"),
        ("concise,", "concise,"),
    ],
)
def test_sentences(text: str, sentence: str) -> None:
    """Anything that is not names is a sentence; "text:" forces one."""
    assert parse_preference(text) == Preference(text=sentence)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("text:", "empty"),
        ("text:  ", "empty"),
        ("concise=much", "'much'"),
        ("concise=", "concise"),
        ("concise=-1,friendly=2", "-1"),
        ("concise=nan", "nan"),
        ("concise=0", "all weights are 0"),
        ("concise,concise", "twice"),
        ("concise=1=2", "'1=2'"),
    ],
)
def test_broken_preferences_are_refused(text: str, message: str) -> None:
    """What cannot be meant is an error that shows the place."""
    with pytest.raises(PreferenceError, match=message):
        parse_preference(text)


@given(text=st.text(max_size=60))
def test_any_text_is_a_preference_or_a_preference_error(text: str) -> None:
    """No text makes the parser fail in another way, and the result is either weights or a sentence."""
    try:
        found = parse_preference(text)
    except PreferenceError:
        return
    assert (found.text is None) == bool(found.weights)
    if found.text is None:
        assert math.fsum(found.weights.values()) == pytest.approx(1.0)


@given(weights=weights_of)
def test_written_weights_are_read_back(weights: dict[str, float]) -> None:
    """A preference written as name=weight means the same when it is read."""
    text = ",".join(f"{name}={value!r}" for name, value in weights.items())
    assert parse_preference(text) == Preference.of(weights)


def test_preset() -> None:
    """A preset's name stands for its weights, only where the whole text is the name."""
    assert ROSTER.parse("boss").weights == pytest.approx({"concise": 0.75, "friendly": 0.25})
    assert ROSTER.parse(" boss ").weights == pytest.approx({"concise": 0.75, "friendly": 0.25})
    assert set(ROSTER.parse("boss,friendly").weights) == {"boss", "friendly"}


def resolve(text: str, *, reads_text: bool = False) -> dict[str, float]:
    """Lambda of ROSTER for a preference's text."""
    return ROSTER.resolve(ROSTER.parse(text), reads_text=reads_text)


def test_experts_of_one_dimension_share_its_weight() -> None:
    """Two experts of one dimension get half of its weight each."""
    assert resolve("concise=0.6,friendly=0.4") == pytest.approx({"short-a": 0.3, "short-b": 0.3, "kind": 0.4})


def test_a_preference_may_name_experts() -> None:
    """An expert's own name gives it the weight alone, and adds up with its dimension's."""
    assert resolve("short-a") == {"short-a": 1.0}
    assert resolve("short-a,concise") == pytest.approx({"short-a": 0.75, "short-b": 0.25})


def test_the_base_takes_part_only_when_named() -> None:
    """The base is an expert like others when a preference names it."""
    assert resolve("base,friendly") == pytest.approx({"base": 0.5, "kind": 0.5})


@given(weights=st.dictionaries(st.sampled_from(["concise", "friendly", "grumpy", "kind", "base"]), st.floats(0.01, 9)))
def test_lambda_sums_to_one_in_the_rosters_order(weights: dict[str, float]) -> None:
    """Lambda is positive, sums to 1, and lists experts as the configuration does."""
    if not weights:
        return
    found = ROSTER.resolve(Preference.of(weights), reads_text=False)
    assert math.fsum(found.values()) == pytest.approx(1.0)
    assert all(value > 0 for value in found.values())
    assert list(found) == [name for name in ROSTER.dimension_of if name in found]


def test_a_dimension_nobody_serves_is_left_out() -> None:
    """A known dimension without an expert loses its share to the others; alone it is an error."""
    assert resolve("polite,friendly") == {"kind": 1.0}
    with pytest.raises(PreferenceError, match="no expert serves 'polite'"):
        resolve("polite")


@pytest.mark.parametrize(("wrong", "near"), [("concize", "concise"), ("frendly", "friendly"), ("bos", "boss")])
def test_a_wrong_name_gets_the_nearest_one(wrong: str, near: str) -> None:
    """The error's hint names the nearest known name."""
    with pytest.raises(PreferenceError, match=wrong) as caught:
        resolve(wrong)
    assert caught.value.hint is not None
    assert f"Did you mean {near!r}?" in caught.value.hint


def test_a_sentence_for_a_trained_pcm() -> None:
    """A PCM that reads text gets every expert but the base, at equal weights."""
    found = resolve("something quite else, please", reads_text=True)
    assert found == pytest.approx(dict.fromkeys(("short-a", "short-b", "kind", "cross"), 0.25))


def test_a_sentence_without_a_pcm_must_name_dimensions() -> None:
    """Without a PCM the names found in the sentence count; without names it is refused."""
    assert resolve("Please be Friendly to me!") == {"kind": 1.0}
    with pytest.raises(PreferenceError, match="names no dimension"):
        resolve("as you like it, please")


@given(text=st.sampled_from([*NAMES, "base", "kind"]))
def test_roster_without_base_or_presets(text: str) -> None:
    """A minimal roster resolves the names that it has and refuses the rest."""
    roster = Roster({"kind": "friendly"})
    if text in ("kind", "friendly"):
        assert roster.resolve(roster.parse(text), reads_text=False) == {"kind": 1.0}
    else:
        with pytest.raises(PreferenceError):
            roster.resolve(roster.parse(text), reads_text=False)


def test_describe_a_single_dimension() -> None:
    """One dimension is its own sentence, without a number."""
    assert describe_preference(Preference({"concise": 1.0}), {"concise": "Be short."}) == "Be short."


def test_describe_equal_weights() -> None:
    """Equal shares are written without numbers, in the order of the names."""
    preference = Preference({"friendly": 1 / 3, "concise": 1 / 3, "x": 1 / 3})
    assert describe_preference(preference, {"concise": "Be short.", "friendly": "Be kind."}) == "Be short. Be kind. x"


def test_describe_unequal_weights() -> None:
    """Unequal shares stand behind the sentences, the largest first."""
    preference = Preference({"friendly": 0.25, "concise": 0.75})
    assert describe_preference(preference, {"concise": "Be short."}) == "Be short. (75%) friendly (25%)"


def test_describe_a_sentence() -> None:
    """A sentence is passed on as it is."""
    assert describe_preference(Preference(text="any way"), {}) == "any way"
