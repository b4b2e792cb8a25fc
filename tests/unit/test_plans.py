"""From a preference to a plan: which rule, who is asked, with which weights."""

from __future__ import annotations

from typing import Any

import pytest

from mope_bb.config import Config, parse_config
from mope_bb.errors import ConfigError, PreferenceError
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.plans import build_plan, configured_rule
from mope_bb.preferences import parse_preference

BASE: dict[str, Any] = {"name": "plain", "provider": "scripted", "base": True}
STYLED: list[dict[str, Any]] = [
    {"name": name, "provider": "scripted", "dimension": name} for name in ("concise", "friendly")
]


def config_of(*experts: dict[str, Any], **tables: Any) -> Config:
    """A configuration of these experts."""
    return parse_config({"experts": list(experts), **tables})


@pytest.mark.parametrize(
    ("asked", "configured", "trained", "expected"),
    [
        ("product", "geometric", "linear", "product"),
        (None, "geometric", "product", "geometric"),
        (None, None, "product", "product"),
        (None, None, None, "linear"),
    ],
)
def test_who_chooses_the_rule(asked: str | None, configured: str | None, trained: str | None, expected: str) -> None:
    """Who asks, then the configuration, then what the PCM was trained for, then the paper."""
    config = config_of(*STYLED, merge={} if configured is None else {"rule": configured})
    assert configured_rule(config, asked, trained=trained).name == expected


def test_rule_has_the_configured_constants() -> None:
    """Scale and plausibility come from [merge], whoever chose the rule; an unknown rule is an error."""
    config = config_of(*STYLED, merge={"product_scale": 0.5, "plausibility": 0.2})
    assert configured_rule(config, "product") == MergeRule("product", 0.5, 0.2)
    with pytest.raises(ConfigError, match="unknown merge rule 'median'"):
        configured_rule(config, trained="median")


def test_plan_asks_the_base_where_the_rule_needs_it() -> None:
    """The product asks the base first; the others ask only those who serve the preference."""
    config = config_of(*STYLED, BASE)
    preference = parse_preference("friendly=0.25,concise=0.75")
    styled = ("concise", "friendly")
    for rule, asked in ((MergeRule("product"), ("plain", *styled)), (MergeRule(), styled)):
        plan = build_plan(config, preference, rule, reads_text=False)
        assert plan.asked == asked
        assert plan.lambdas == pytest.approx((0.75, 0.25))
        assert plan.log_lambda.exp().tolist() == pytest.approx([0.75, 0.25])


def test_product_without_base_is_an_error() -> None:
    """The error says what to add."""
    with pytest.raises(ConfigError, match="needs a base expert") as caught:
        build_plan(config_of(*STYLED), parse_preference("concise"), MergeRule("product"), reads_text=False)
    assert "base = true" in str(caught.value.hint)


def test_sentences_ask_everyone_if_they_are_read() -> None:
    """A PCM that reads gets the sentence and all styled experts; without one the sentence must name dimensions."""
    config = config_of(*STYLED, BASE)
    sentence = parse_preference("text:be nice")
    plan = build_plan(config, sentence, MergeRule("product"), reads_text=True)
    assert plan.asked == ("plain", "concise", "friendly")
    assert "be nice" in plan.preference_text
    with pytest.raises(PreferenceError):
        build_plan(config, sentence, MergeRule("product"), reads_text=False)


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        ("concise", ""),
        ("concise=0.7,friendly=0.3", ""),
        ("concise,witty", "Make me laugh."),
        ("concise=0.5,witty=0.3,dry=0.2", "Make me laugh. (30%) dry (20%)"),
        ("Short and friendly, please.", "Short and friendly, please."),
    ],
)
def test_the_pcm_reads_what_the_weights_do_not_say(preference: str, expected: str) -> None:
    """Names of served dimensions are in lambda already; sentences, and dimensions without an expert, are read."""
    dimensions = {"concise": {"text": "Be brief."}, "witty": {"text": "Make me laugh."}, "dry": {}}
    config = config_of(*STYLED, dimensions=dimensions)
    plan = build_plan(config, parse_preference(preference), MergeRule(), reads_text=True)
    assert plan.preference_text == expected


def test_a_pcm_can_read_names_as_well() -> None:
    """`reads_names`: every form of a preference is text."""
    config = config_of(*STYLED, dimensions={"concise": {"text": "Be brief."}}, pcm={"reads_names": True})
    plan = build_plan(config, parse_preference("concise=0.75,friendly=0.25"), MergeRule(), reads_text=True)
    assert plan.preference_text == "Be brief. (75%) friendly (25%)"
