"""A server of the nano zoo for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mope_bb.zoo.serving import ZooServer
from tests.server.serving import Served, served


@pytest.fixture(scope="session")
def zoo_server(nano_experts: ZooServer) -> Iterator[Served]:
    """The real zoo behind the real server."""
    with served(nano_experts.config()) as server:
        yield server
