"""Shared by all tests: the zoo on which the real engines speak, built once and kept in MOPE_BB_TEST_HOME."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mope_bb.zoo.build import Zoo, build_zoo
from mope_bb.zoo.serving import ZooServer, serve_zoo
from tests.command_line import mope
from tests.endpoints.stand_ins import StandIns

__all__ = ["mope"]  # a fixture for all

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every program that the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported for the tests is not looked through again by each full garbage collection.

    It is most of a million objects: a collection took up to two seconds of a slow machine, in which deadlines passed.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def zoo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's zoos are built."""
    chosen = os.environ.get("MOPE_BB_TEST_HOME")
    return Path(chosen) if chosen else tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session", autouse=True)
def own_home(zoo_home: Path) -> Iterator[None]:
    """What the tests keep, logs of chats among it, is not put beside what the developer keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPE_BB_HOME", os.environ.get("MOPE_BB_HOME") or str(zoo_home))
        yield


@pytest.fixture(scope="session")
def nano(zoo_home: Path) -> Zoo:
    """A quickly trained zoo: real models that speak badly."""
    return build_zoo(size="nano", home=zoo_home)


@pytest.fixture(scope="session")
def nano_experts(nano: Zoo) -> Iterator[ZooServer]:
    """All of the nano zoo behind the real llama.cpp server."""
    with serve_zoo(nano) as server:
        yield server


@pytest.fixture(scope="session")
def stand_ins(nano: Zoo) -> Iterator[StandIns]:
    """Stand-ins for endpoints that cannot run here, with a model of the nano zoo behind them."""
    found = StandIns(nano.folder("concise"))
    yield found
    found.close()
