"""What `mope-bb doctor` says of reward models: those behind HTTP are asked to score one short answer."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from mope_bb.config import Config
from mope_bb.errors import MopeError, RewardError
from mope_bb.rewards.registry import open_reward_panel
from mope_bb.types import Message

ASKED: Final = ("remote", "judge")
PROMPT: Final = (Message("user", "How do I fix a bike?"),)
ANSWERS: Final = ("Check the chain first.", "No idea.")
"""An answer, and the reference that it is measured against."""


@dataclass(frozen=True, slots=True)
class RewardReport:
    """What became of one reward model."""

    dimension: str
    kind: str
    verdict: Literal["ok", "error"]
    value: str
    advice: str = ""

    @property
    def can_run(self) -> bool:
        """It gave a score."""
        return self.verdict == "ok"


def probe_rewards(config: Config, dimensions: Collection[str]) -> list[RewardReport]:
    """Ask the reward models of `dimensions` that are behind HTTP. Blocks; raises nothing that they caused."""
    found = []
    for name in dimensions:
        reward = config.dimensions[name].reward
        if reward is not None and reward.kind in ASKED:
            found.append(_probe(config, name, reward.kind))
    return found


def _probe(config: Config, dimension: str, kind: str) -> RewardReport:
    started = time.perf_counter()
    try:
        panel = open_reward_panel(config, [dimension])
        try:
            found = panel.wins([PROMPT], ANSWERS[:1], ANSWERS[1:], [[dimension]])[0]
        finally:
            panel.close()
    except MopeError as error:
        return RewardReport(dimension, kind, "error", type(error).__name__, error.in_words)
    if isinstance(found, RewardError):
        return RewardReport(dimension, kind, "error", "no score", found.in_words)
    win = found.wins[dimension]
    return RewardReport(dimension, kind, "ok", f"scores, {win:.2f} here, {time.perf_counter() - started:.2f} s")
