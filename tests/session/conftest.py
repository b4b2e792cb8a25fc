"""Sessions of scripted experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest

from mope_bb.config import Config, parse_config

Script = Sequence[Mapping[str, float]]


@pytest.fixture
def scripted() -> Callable[..., Config]:
    """Build the configuration of experts that say what their script says; each has its own name as dimension."""

    def build(base: str | None = None, **scripts: Script) -> Config:
        experts = [
            {
                "name": name,
                "provider": "scripted",
                "script": script,
                **({"base": True} if name == base else {"dimension": name}),
            }
            for name, script in scripts.items()
        ]
        return parse_config({"experts": experts, "cache": {"enabled": False}})

    return build
