"""The zoo in this process: the configuration that training and evaluation use, without any server."""

from __future__ import annotations

from typing import Any

from mope_bb.config import Config, parse_config
from mope_bb.zoo.build import Zoo
from mope_bb.zoo.serving import dimension_tables
from mope_bb.zoo.wording import DIMENSIONS, POLES

MAX_TOKENS = 120
"""The longest answers of the grammar have about 80 tokens."""
MAX_MINUTES = 5.75
"""Of a training, however slow the machine is: with its last batch it stays below six."""


def local_config(zoo: Zoo, *, train: dict[str, Any] | None = None) -> Config:
    """The zoo's models as `local` experts, its reward models, its preferences, with settings of [train] in `train`."""
    experts = [
        {
            "name": name,
            **({"base": True} if name == "base" else {"dimension": name}),
            "provider": "local",
            "model": str(zoo.folder(name)),
            "device": "cpu",
        }
        for name in zoo.names
    ]
    # One version old: the learner and the sampler, each on a core, never wait for each other longer than they must.
    settings: dict[str, Any] = {
        "max_tokens": MAX_TOKENS,
        "max_minutes": MAX_MINUTES,
        "max_staleness": 1,
        **(train or {}),
    }
    settings["preferences"] = {"axes": POLES, **settings.get("preferences", {})}
    return parse_config(
        {
            "experts": experts,
            "dimensions": dimension_tables(zoo, DIMENSIONS),
            "pcm": {"path": str(zoo.pcm), "device": "cpu"},
            "cache": {"enabled": False},
            "train": settings,
        },
        source="the zoo's configuration",
    )
