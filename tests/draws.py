"""Whether what experts drew follows the distribution that they say it comes from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch

from mope_bb.types import DraftStep

P_VALUE: Final = 1e-4
"""Below it draws do not follow what they are said to follow; seeds are fixed, so a pass stays one but for rounding."""
FEWEST_IN_CELL: Final = 5.0
"""Expected draws; pieces with fewer share a cell."""
NOISE: Final = 0.1
"""Nats between the lists of one question, at a low temperature."""


def p_value(steps: Sequence[DraftStep]) -> float:
    """Of a chi-square test: do the drawn pieces follow q? Each step is a draw from one distribution."""
    assert max(abs(x - y) for step in steps for x, y in zip(step.log_q, steps[0].log_q, strict=True)) < NOISE
    drawn = Counter(step.piece for step in steps if step.index is not None)
    statistic, num_cells, rest, rest_drawn = 0.0, 0, 0.0, 0
    for piece, log_q in zip(steps[0].distribution.pieces, steps[0].log_q, strict=True):
        count = drawn.total() * math.exp(log_q)
        if count >= FEWEST_IN_CELL:
            statistic += (drawn[piece] - count) ** 2 / count
            num_cells += 1
        else:
            rest, rest_drawn = rest + count, rest_drawn + drawn[piece]
    statistic += (rest_drawn - rest) ** 2 / rest if rest > 0.0 else 0.0
    halves = torch.tensor([(num_cells - (rest == 0.0)) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves))
