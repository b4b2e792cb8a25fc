"""No input makes a parser raise what is not of our errors, or accept what is no distribution.

A million inputs are a part of `make evidence`; here a small share of them, and all that ever failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from mope_bb.providers import sglang
from tests.fuzz.measure import CORPUS, Fuzzer, measure, open_fuzzer, read_kept

NUM_INPUTS = 20_000
ONLY_ERRORS = {"errors", "error bodies", "retry-after"}
"""What they read is a refusal, so that an error is all that can come of it."""


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    """Of all parsers."""
    with open_fuzzer() as opened:
        yield opened


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_what_once_failed(path: Path, fuzzer: Fuzzer) -> None:
    """Each input that a defect was found with is accepted or refused."""
    name, data = read_kept(path)
    fuzzer.feed(fuzzer.parsers[name], data)


def test_damaged_input() -> None:
    """Nothing fails, and every parser gets both input that it accepts and input that it refuses."""
    found = measure(NUM_INPUTS, seed=7)
    assert found["failures"] == []
    assert sum(one["inputs"] for one in found["parsers"].values()) == NUM_INPUTS
    assert all(one["refused"] for one in found["parsers"].values())
    assert {name for name, one in found["parsers"].items() if not one["accepted"]} == ONLY_ERRORS


def test_the_same_seed_gives_the_same_inputs() -> None:
    """So that a failure can be had again."""
    first, second = (measure(300, seed=1)["parsers"] for _ in range(2))
    assert first == second


def test_a_parser_that_checks_nothing_fails() -> None:
    """The fuzzer finds a defect: an adapter that takes whatever stands in the place of a logprob."""
    with patch.object(sglang, "checked_logprob", lambda value: value):
        found = measure(1_000, seed=1, names={"sglang"})
    assert any("TypeError" in failure for failure in found["failures"])
    assert found["parsers"]["sglang"]["failed"] > 0
