"""The README's library example runs as printed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest

from mope_bb import zoo
from mope_bb.config import parse_config
from mope_bb.zoo.serving import ZooServer

README = Path(__file__).parents[1] / "README.md"


def block(language: str) -> str:
    """The README's one code block in `language`."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, nano_experts: ZooServer) -> None:
    """`zoo.serve()` gives the nano zoo that is being served already, instead of training the default one."""
    monkeypatch.setattr(zoo, "serve", lambda: contextlib.nullcontext(nano_experts), raising=False)


def run_example() -> str:
    """What the example prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block("python"), "README.md", "exec"), {})  # noqa: S102  # our own file
    return printed.getvalue()


@pytest.mark.usefixtures("served")
def test_example_runs_as_printed() -> None:
    """Ten lines, two answers."""
    assert len(block("python").strip().splitlines()) <= 10
    assert re.search(r" (stop|length) \d+\n$", run_example())


@pytest.mark.usefixtures("served")
def test_example_runs_inside_a_running_loop() -> None:
    """Agents have an event loop already; the synchronous face must not mind."""

    async def main() -> str:
        return run_example()

    assert re.search(r" (stop|length) \d+\n$", asyncio.run(main()))


def test_configuration_example_is_valid() -> None:
    """The mope.toml of the README is accepted as it stands."""
    config = parse_config(tomllib.loads(block("toml")))
    assert [expert.name for expert in config.experts] == ["concise", "friendly"]
