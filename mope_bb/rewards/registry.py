"""Which module a reward's `kind` means. The only place that knows them; each is imported when first used."""

from __future__ import annotations

from collections.abc import Collection

from mope_bb.config import Config, RewardConfig
from mope_bb.errors import ConfigError
from mope_bb.rewards.base import PairwiseRewardModel, RewardModel, RewardPanel
from mope_bb.usage import Account, reward_name


def open_reward_panel(config: Config, dimensions: Collection[str], account: Account | None = None) -> RewardPanel:
    """Open the reward models of `dimensions`, as their `[dimensions.NAME]` tables say; the panel closes them.

    `account` is what those are counted against that are asked over HTTP. Raises ConfigError for a dimension without a
    reward, and what the models raise.
    """
    settings = {name: _settings(config, name) for name in dimensions}
    models: dict[str, RewardModel | PairwiseRewardModel] = {}
    try:
        for name, reward in settings.items():
            models[name] = _open(name, reward, config.dimensions[name].text)
            if account is not None:
                models[name].charge(account.meter(reward_name(name)))
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return RewardPanel(models)


def _settings(config: Config, dimension: str) -> RewardConfig:
    section = config.dimensions.get(dimension)
    if section is None or section.reward is None:
        raise ConfigError(
            f"the dimension {dimension!r} has no reward",
            hint=f'Write reward = {{ kind = "classifier", path = "FOLDER" }} in [dimensions.{dimension}]; other kinds: '
            "function, remote, judge.",
        )
    return section.reward


def _open(dimension: str, reward: RewardConfig, text: str | None) -> RewardModel | PairwiseRewardModel:
    if reward.kind == "classifier":
        from mope_bb.rewards.classifier import open_classifier

        return open_classifier(dimension, reward)
    if reward.kind == "remote":
        from mope_bb.rewards.remote import open_remote

        return open_remote(dimension, reward)
    if reward.kind == "judge":
        from mope_bb.rewards.judge import open_judge

        return open_judge(dimension, reward, text=text)
    from mope_bb.rewards.function import open_function

    return open_function(dimension, reward)
