"""Which experts `train` and `eval` work on: a configuration, or the embedded zoo in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope_bb.errors import ConfigError

if TYPE_CHECKING:
    from mope_bb.config import Config
    from mope_bb.zoo.judging import ZooJudge


@dataclass(frozen=True)
class Experts:
    """What there is to train on or to evaluate."""

    config: Config
    zoo: ZooJudge | None
    """The zoo's oracle, where the zoo is used."""


def choose_experts(path: str | None, *, size: str, seed: int, train: dict[str, Any]) -> Experts:
    """The configuration at `path`, or the zoo (built on first use); `train` are settings of the command line."""
    if path is not None:
        from mope_bb.config import load_config

        config = load_config(path)
        merged = config.train.model_dump(exclude_unset=True) | train
        if "preferences" in train:
            merged["preferences"] = config.train.preferences.model_dump(exclude_unset=True) | train["preferences"]
        # Validated again: what the command line says must keep the same rules.
        return Experts(config.model_copy(update={"train": type(config.train).model_validate(merged)}), None)
    from mope_bb.zoo.demo import build_with_bar
    from mope_bb.zoo.judging import ZooJudge
    from mope_bb.zoo.local import local_config

    return Experts(local_config(build_with_bar(size=size, seed=seed), train=train), ZooJudge())


def reading_names(config: Config) -> Config:
    """`config` with a PCM that reads a preference in every form (`[pcm] reads_names`)."""
    return config.model_copy(update={"pcm": config.pcm.model_copy(update={"reads_names": True})})


def use_cores() -> None:
    """One torch thread: matrices this small gain little from two, and lose much while a neighbour is busy."""
    import torch

    torch.set_num_threads(1)


def new_folder(path: str | None, kind: str) -> Path:
    """The output folder: the one asked for, or a fresh one below `kind`. Raises ConfigError if it cannot be made."""
    import time

    folder = Path(path) if path is not None else Path(kind) / time.strftime("%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {str(folder)!r} cannot be made: {error.strerror}", hint="Pass --out.") from None
    return folder
