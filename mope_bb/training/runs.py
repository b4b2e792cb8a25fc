"""A run: what it works with, and what identifies it, so that only the same run is resumed (`run.json`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mope_bb.config import Config
from mope_bb.errors import ConfigError
from mope_bb.pcm.bench import ExpertBench
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.model import PreferenceControlModel
from mope_bb.rewards.base import RewardPanel
from mope_bb.training.scoring import prompt_key
from mope_bb.training.team import Team
from mope_bb.types import Message
from mope_bb.usage import Account

Prompts = Sequence[tuple[Message, ...]]
FILE: Final = "run.json"
FREE: Final = frozenset(
    {
        "prompts",
        "output_dir",
        "max_steps",
        "max_minutes",
        "max_in_flight",
        "save_steps",
        "save_total_limit",
        "rollout_timeout_s",
        "stall_timeout_s",
    }
)
"""Settings of [train] that a resumed run may change."""
EXPERT_FIELDS: Final = ("provider", "model", "dimension", "base", "system", "top_k")


@dataclass(frozen=True, slots=True)
class Ablation:
    """What a run leaves out, to show what it was good for."""

    shuffles_rewards: bool = False
    """Rewards are dealt out at random within each batch: nothing can be learned from them."""
    is_context_free: bool = False
    """The PCM's scores before the first token hold for the whole answer."""
    uses_features: bool = True
    """Whether the experts' features have a weight."""


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """Everything a run needs, opened."""

    config: Config
    rule: MergeRule
    pcm: PreferenceControlModel
    bench: ExpertBench
    panel: RewardPanel
    prompts: Prompts
    output_dir: Path
    ablation: Ablation = field(default_factory=Ablation)
    team: Team = field(default_factory=Team)
    """Learner processes; this one is the first."""
    account: Account = field(default_factory=Account)
    """What the run has asked of endpoints, in earlier processes as well, and what it may."""


def describe_run(
    config: Config, *, rule: str, reference: str, ablation: Mapping[str, Any], prompts: Sequence[tuple[Message, ...]]
) -> dict[str, Any]:
    """What makes this run what it is. Addresses, keys and time limits are not part of it: servers may move."""
    return {
        "rule": rule,
        "ablation": dict(ablation),
        "reference": reference,
        "num_prompts": len(prompts),
        "prompts": hashlib.sha256("\n".join(map(prompt_key, prompts)).encode()).hexdigest(),
        "experts": {one.name: {name: getattr(one, name) for name in EXPERT_FIELDS} for one in config.experts},
        "dimensions": {name: one.model_dump(mode="json") for name, one in config.dimensions.items()},
        "merge": config.merge.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
    }


def write_run_file(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `run.json`. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{FILE}.tmp"
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / FILE)
    except OSError as error:
        raise ConfigError(f"the run's folder {str(folder)!r} cannot be written: {error}") from None


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in `folder`."""
    return (folder / FILE).exists() or (folder / "metrics.jsonl").exists()


def check_same_run(folder: Path, document: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the first difference, unless `document` describes the run begun in `folder`."""
    try:
        before: Any = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if not isinstance(before, dict) or not isinstance(before.get("train", {}), dict):
            raise ValueError(f"{FILE} does not describe a run")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the run in {str(folder)!r} cannot be resumed: {error}") from None
    now = json.loads(json.dumps(document))
    for one in (before, now):
        one["train"] = {name: value for name, value in one.get("train", {}).items() if name not in FREE}
    if found := _first_difference(before, now, ""):
        raise ConfigError(
            f"the run in {str(folder)!r} cannot be resumed: {found}",
            hint="Change it back, or start a new run with another --out and this one's checkpoint as `path` in [pcm].",
        )


def _first_difference(before: Any, now: Any, where: str) -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in (*before, *(name for name in now if name not in before)):
            if name not in now or name not in before:
                missing = "now" if name not in now else "when it began"
                return f"{where}{name!r} is not there {missing}"
            if found := _first_difference(before[name], now[name], f"{where}{name}."):
                return found
        return None
    return None if before == now else f"{where.rstrip('.')!r} was {before!r} when it began and is {now!r} now"


def keep_rows(file: Path, num_steps: int) -> None:
    """Drop the rows of metrics.jsonl after step `num_steps`, and a torn last one. Raises ConfigError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= num_steps]
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(file)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read or written: {error}") from None
