"""CPU time of the token step without endpoints: lists of 100 from a vocabulary of 150,000 are merged and drawn from.

All lists of a position share 70 of their pieces. Every list is a new object, as in an answer. The gate reads features,
as a trained PCM's does; the product has the base as one expert more. A ratio is that of one round, in which both sides
merge lists of the same kind in turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.claims import Claim, at_most, median_interval, rounded
from mope_bb.pcm.gates import LinearGate
from mope_bb.pcm.merging import Merged, Plan, merge_path, merge_step
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.sampling import draw, shape_distribution
from mope_bb.types import Piece, TokenDistribution
from tests.evidence import machine_facts, tell

RULES: Final = (MergeRule("linear"), MergeRule("geometric"), MergeRule("product"))
NUM_EXPERTS: Final = (3, 8)
VOCAB_SIZE: Final = 150_000
TOP_K: Final = 100
NUM_SHARED: Final = 70
NUM_AHEAD: Final = 16
NUM_ROUNDS: Final = 9
NUM_POSITIONS: Final = 8 * NUM_AHEAD
"""Of each side in a round."""
GATE: Final = LinearGate(torch.tensor([0.3, -0.2, 1.0]))
Position = Sequence[TokenDistribution]


def main() -> None:
    """Measure and write the JSON beside this file."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": "python -m benchmarks.merge",
        "machine": machine_facts(),
        "vocab_size": VOCAB_SIZE,
        "top_k": TOP_K,
        "shared": NUM_SHARED,
        "ahead": NUM_AHEAD,
        "rounds": NUM_ROUNDS,
        "positions": NUM_POSITIONS,
        "experts": {
            str(num_experts): {rule.name: measure(rule, num_experts) for rule in RULES} for num_experts in NUM_EXPERTS
        },
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def measure(rule: MergeRule, num_experts: int) -> dict[str, Any]:
    """Milliseconds of CPU per token, one by one and along paths, and their ratio."""
    names = tuple(f"expert {n}" for n in range(num_experts))
    plan = Plan(rule, names, (1 / num_experts,) * num_experts, "base" if rule.needs_base else None, "")
    rng = np.random.default_rng(0)
    singly: list[float] = []
    along_paths: list[float] = []
    for is_counted in (False, *(True,) * NUM_ROUNDS):
        # Which comes first changes from round to round.
        sides = [(merge_singly, singly), (merge_together, along_paths)]
        for merge, times in sides if len(singly) % 2 else reversed(sides):
            spent = time_of(merge, plan, rng)
            if is_counted:
                times.append(spent)
    found = {
        "step_ms": median_interval(singly),
        "path_ms": median_interval(along_paths),
        "ratio": median_interval([path / step for path, step in zip(along_paths, singly, strict=True)]),
    }
    tell(f"{num_experts} experts, {rule.name}: {rounded(found, 3)}")
    return found


def time_of(
    merge: Callable[[Plan, Sequence[Position], torch.Tensor], Sequence[Merged]], plan: Plan, rng: np.random.Generator
) -> float:
    """Milliseconds of CPU per token over new lists."""
    paths = [[position_of(rng, len(plan.asked)) for _ in range(NUM_AHEAD)] for _ in range(NUM_POSITIONS // NUM_AHEAD)]
    scores = torch.from_numpy(rng.standard_normal((NUM_AHEAD, len(plan.experts))))
    uniforms = rng.random(NUM_AHEAD).tolist()
    began = time.process_time()
    for path in paths:
        for merged, uniform in zip(merge(plan, path, scores), uniforms, strict=True):
            draw(shape_distribution(merged.log_pi, temperature=1.0, top_p=1.0), uniform)
    return 1e3 * (time.process_time() - began) / NUM_POSITIONS


def merge_singly(plan: Plan, path: Sequence[Position], scores: torch.Tensor) -> list[Merged]:
    """A merge for each position."""
    return [merge_step(plan, position, row, GATE) for position, row in zip(path, scores, strict=True)]


def merge_together(plan: Plan, path: Sequence[Position], scores: torch.Tensor) -> tuple[Merged, ...]:
    """One merge for the whole path."""
    return merge_path(plan, path, scores, GATE)


def position_of(rng: np.random.Generator, num_lists: int) -> list[TokenDistribution]:
    """Lists that share most of their pieces, in an order of their own."""
    num_own = TOP_K - NUM_SHARED
    ids = rng.integers(VOCAB_SIZE, size=2 * (NUM_SHARED + num_lists * num_own)).tolist()
    different = list(dict.fromkeys(ids))
    shared, own = different[:NUM_SHARED], different[NUM_SHARED:]
    lists = []
    for n in range(num_lists):
        chosen = rng.permutation([*shared, *own[n * num_own : (n + 1) * num_own]]).tolist()
        # A little of the mass stays outside the list.
        masses = np.sort(rng.dirichlet(np.full(TOP_K + 1, 0.2)) + 1e-9)[:0:-1]
        pieces = tuple(Piece(b"%d" % token_id, token_id) for token_id in chosen)
        lists.append(TokenDistribution(pieces, tuple(np.log(masses / masses.sum() * 0.99).tolist()), VOCAB_SIZE))
    return lists


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the results say."""
    three, eight = (results["experts"][str(num_experts)] for num_experts in NUM_EXPERTS)
    ratios = {
        f"{num_experts} {rule}": found["ratio"]
        for num_experts, rules in results["experts"].items()
        for rule, found in rules.items()
    }
    return [
        at_most(0.5).claim(
            "ms of CPU to merge a token, 3 experts", {name: one["step_ms"] for name, one in three.items()}
        ),
        at_most(1.0).claim(
            "ms of CPU to merge a token, 8 experts", {name: one["step_ms"] for name, one in eight.items()}
        ),
        at_most(0.75).claim(f"of that along a path of {NUM_AHEAD}", ratios),
    ]


if __name__ == "__main__":
    main()
