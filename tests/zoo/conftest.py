"""Two models of the nano zoo, served by the real llama.cpp server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mope_bb.zoo.build import Zoo
from mope_bb.zoo.serving import ZooServer, serve_zoo


@pytest.fixture(scope="session")
def nano_server(nano: Zoo) -> Iterator[ZooServer]:
    """The base and one expert, served."""
    with serve_zoo(nano, names=["base", "concise"], parallel=2) as server:
        yield server
