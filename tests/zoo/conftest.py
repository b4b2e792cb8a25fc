"""A nano zoo: real models that speak badly, built once per session and served by the real llama.cpp server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mope_bb.zoo.build import Zoo, build_zoo
from mope_bb.zoo.serving import ZooServer, serve_zoo


@pytest.fixture(scope="session")
def nano_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's zoo is built; `MOPE_BB_TEST_HOME` keeps it between sessions."""
    chosen = os.environ.get("MOPE_BB_TEST_HOME")
    return Path(chosen) if chosen else tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def nano_zoo(nano_home: Path) -> Zoo:
    """A zoo of the size for tests."""
    return build_zoo(size="nano", home=nano_home)


@pytest.fixture(scope="session")
def nano_server(nano_zoo: Zoo) -> Iterator[ZooServer]:
    """The base and one expert, served."""
    with serve_zoo(nano_zoo, names=["base", "concise"], parallel=2) as server:
        yield server
