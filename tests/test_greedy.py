"""All weight on one expert, temperature 0: the merge must be invisible."""

from __future__ import annotations

import pytest

from mope_bb.zoo.serving import ZooServer
from tests.greedy import compare_greedy


@pytest.mark.parametrize("setup", [pytest.param("local", marks=pytest.mark.slow), "llamacpp"])
def test_one_expert_speaks_its_own_greedy_answer(nano_experts: ZooServer, setup: str) -> None:
    """Token for token on 100 prompts; only a near tie of llama.cpp may differ, and those are counted."""
    found = compare_greedy(nano_experts, setup, num_prompts=100)
    print(found)
    assert found.num_prompts == 100
    assert found.num_tokens > 500
    assert found.num_different == 0
