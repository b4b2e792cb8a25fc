"""A home of each test's own, and the endpoints of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import no_server_config, scripted_config, stand_in, zoo_config

__all__ = ["no_server_config", "scripted_config", "stand_in", "zoo_config"]  # fixtures


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the log of this test is."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MOPE_BB_HOME", str(folder))
    return folder
