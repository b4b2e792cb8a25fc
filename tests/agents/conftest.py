"""A real `mope-bb serve` on the real zoo, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mope_bb.zoo.serving import ZooServer
from tests.agents.serving import serve_mope


@pytest.fixture(scope="session")
def zoo_config_path(nano_experts: ZooServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `mope.toml` with all experts of the zoo."""
    path = tmp_path_factory.mktemp("zoo") / "mope.toml"
    nano_experts.write_config(path)
    return path


@pytest.fixture(scope="session")
def mope_url(zoo_config_path: Path) -> Iterator[str]:
    """The address of its endpoint, up to "/v1"."""
    with serve_mope(zoo_config_path) as url:
        yield f"{url}/v1"
