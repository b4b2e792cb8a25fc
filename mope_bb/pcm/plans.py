"""From a preference to a plan: who is asked, with which weights, by which rule."""

from __future__ import annotations

from mope_bb.config import Config
from mope_bb.errors import ConfigError
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.mixture import MergeRule, build_rule
from mope_bb.preferences import Preference, describe_preference


def configured_rule(config: Config, name: str | None = None, *, trained: str | None = None) -> MergeRule:
    """The rule called `name` with the configured constants. Raises ConfigError.

    Without a name: the configuration's own, else the one that the PCM was `trained` for, else the paper's.
    """
    merge = config.merge
    return build_rule(
        name or merge.rule or trained or "linear", product_scale=merge.product_scale, plausibility=merge.plausibility
    )


def build_plan(config: Config, preference: Preference, rule: MergeRule, *, reads_text: bool) -> Plan:
    """The plan for `preference`. `reads_text`: a trained (or learning) PCM will read a sentence.

    Raises PreferenceError for what no expert serves, ConfigError for a rule whose base is not configured.
    """
    roster = config.roster()
    lambdas = roster.resolve(preference, reads_text=reads_text)
    if rule.needs_base and roster.base is None:
        raise ConfigError(
            f"the merge rule {rule.name!r} needs a base expert and none is configured",
            hint="Add `base = true` to the expert that the others were fine-tuned from.",
        )
    return Plan(
        rule,
        experts=tuple(lambdas),
        lambdas=tuple(lambdas.values()),
        base=roster.base,
        preference_text=_text_for_pcm(config, preference),
    )


def _text_for_pcm(config: Config, preference: Preference) -> str:
    """What the weights lambda do not say: a sentence, or the dimensions that no expert serves.

    A PCM that also read what lambda says would learn combinations by heart: with combinations that it was not trained
    on it then kept 64 % of its gain instead of 84 % (docs/design-notes.md).
    """
    if preference.text is not None:
        return preference.text
    served = set() if config.pcm.reads_names else set(config.roster().names())
    unserved = {name: weight for name, weight in preference.weights.items() if name not in served}
    return describe_preference(Preference(unserved), config.dimension_texts())
