"""Real vLLM and `transformers serve` for the tests of this folder, started when a test first asks for one.

    make vllm-env
    .venv/bin/python -m pytest tests/engines --engines

Without `--engines` or MOPE_BB_ENGINES=1 all of them are skipped: the environment has 3 GB and a server takes half a
minute to start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mope_bb.zoo.build import Zoo
from tests.engines.adapters import build_adapter
from tests.engines.servers import API_KEY, READY_WITHIN_S, EngineServer, serve_transformers, serve_vllm

POLE = "concise"
"""Whose reward model is served."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--engines`; known where this folder is named on the command line."""
    parser.addoption("--engines", action="store_true", help="run the tests that start vLLM and transformers serve")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip this folder unless it is asked for; where it is, a start counts into the time of the first test."""
    ours = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    asked_for = config.getoption("engines", default=False) or os.environ.get("MOPE_BB_ENGINES") == "1"
    skip = pytest.mark.skip(reason="starts real engines: `make vllm-env`, then pytest tests/engines --engines")
    for item in ours:
        item.add_marker(pytest.mark.timeout(2 * READY_WITHIN_S) if asked_for else skip)


@pytest.fixture(scope="session")
def adapters(nano: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRA adapters of the nano zoo's base."""
    root = tmp_path_factory.mktemp("adapters")
    folders = {name: root / name for name in ("one", "two")}
    for seed, folder in enumerate(folders.values()):
        build_adapter(nano.folder("base"), folder, seed=seed)
    return folders


@pytest.fixture(scope="session")
def vllm(nano: Zoo, adapters: dict[str, Path]) -> Iterator[EngineServer]:
    """The nano zoo's base and the two adapters behind one vLLM that gives whole vocabularies, `/inference` open."""
    folder = nano.folder("base")
    with serve_vllm(folder, name="base", lora=adapters, max_logprobs=-1, extra=["--enable-scale-out"]) as url:
        yield EngineServer(url, "base", folder, adapters)


@pytest.fixture(scope="session")
def vllm_locked(nano: Zoo) -> Iterator[EngineServer]:
    """The nano zoo's base behind a vLLM as strangers run it: at most 20 logprobs, and API_KEY is wanted."""
    folder = nano.folder("base")
    with serve_vllm(folder, name="base", max_logprobs=20, extra=["--api-key", API_KEY]) as url:
        yield EngineServer(url, "base", folder, {})


@pytest.fixture(scope="session")
def vllm_scorer(nano: Zoo) -> Iterator[EngineServer]:
    """A reward model of the nano zoo behind vLLM."""
    folder = nano.reward_model(POLE)
    with serve_vllm(folder, name="scorer", runner="pooling") as url:
        yield EngineServer(url, "scorer", folder, {})


@pytest.fixture(scope="session")
def transformers_server(nano: Zoo) -> Iterator[EngineServer]:
    """The nano zoo's base behind `transformers serve`, which gives no logprobs."""
    folder = nano.folder("base")
    with serve_transformers(folder) as url:
        yield EngineServer(url, str(folder), folder, {})
