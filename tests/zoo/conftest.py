"""The nano zoo: two of its models served by the real llama.cpp server, and copies of it that a test may damage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mope_bb.zoo.build import Zoo, build_zoo
from mope_bb.zoo.serving import ZooServer, serve_zoo


@pytest.fixture(scope="session")
def nano_server(nano: Zoo) -> Iterator[ZooServer]:
    """The base and one expert, served."""
    with serve_zoo(nano, names=["base", "concise"], parallel=2) as server:
        yield server


@pytest.fixture
def own_nano(nano: Zoo, tmp_path: Path) -> Zoo:
    """A copy in the home `tmp_path`, to be damaged: the session's own zoo is read by the other tests meanwhile."""
    shutil.copytree(nano.root, tmp_path / "zoo" / nano.root.name)
    return build_zoo(size="nano", home=tmp_path)
