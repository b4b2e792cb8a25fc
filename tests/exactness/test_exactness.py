"""The merge against a dense float64 oracle, on real engines. `make evidence` runs the same on 2,000 steps each."""

from __future__ import annotations

import asyncio

import pytest

from mope_bb.zoo.serving import ZooServer
from tests.exactness.measure import TOLERANCES, Measurement, kinds_of


@pytest.mark.parametrize("setup", ["local", "llamacpp", pytest.param("mixed", marks=pytest.mark.slow)])
def test_merge_equals_the_dense_oracle(nano_experts: ZooServer, setup: str) -> None:
    """Full lists give the oracle's distribution; short ones stay within the reported missed mass."""
    measurement = Measurement(nano_experts, kinds_of(setup), noisy_engine=setup != "local")
    result = asyncio.run(measurement.run(num_steps=60))
    tolerance = TOLERANCES[setup]
    assert result.num_steps >= 60
    assert result.num_steps_not_ascii > 0
    assert result.probability_gap <= tolerance.full
    assert result.tv_excess <= tolerance.tv_slack
    # The bound says something: the lists really miss mass at k = 5.
    assert max(result.tv[5]) > 0.01
