"""What weights could reach at best: an oracle that knows the grammar's state chooses them, tuned by the oracle's score.

For each state of the answer (before the opener, after it, after the core, after some details ...) and each wanted pole
of the detail dimension one weight per wanted expert is chosen by coordinate ascent on training questions. No PCM of
the same rule that sees only these states could do better; one that sees more may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.pcm.heads import HeadRows
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.rollouts import RolloutRequest
from mope_bb.zoo.language import MAX_DETAILS
from mope_bb.zoo.oracle import parse
from mope_bb.zoo.wording import POLES

STATES: Final = (
    "start",
    "after opener",
    "after core",
    "after 1-3 details",
    "after 4 details",
    "after closer",
    "inside",
)
TUNED: Final = STATES[:5]
"""Elsewhere the grammar leaves no choice of style."""
LINEAR_CHOICES: Final = (
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
    (0.5, 0.5, 0.0),
    (0.5, 0.0, 0.5),
    (0.0, 0.5, 0.5),
    (1 / 3, 1 / 3, 1 / 3),
)
"""Weights of the register, detail and tone experts."""
PRODUCT_CHOICES: Final = tuple((a, b, c) for a in (0.5, 1.0, 2.5) for b in (0.5, 1.0, 2.5) for c in (0.5, 1.0, 2.5))
"""beta of the register, detail and tone experts."""
LINEAR_FLOOR: Final = 1e-6

Table = dict[tuple[str, str], tuple[float, float, float]]
"""(state, wanted pole of the detail dimension) -> weights of the register, detail and tone experts."""


class GrammarReader:
    """Follows one answer piece by piece and names its state."""

    def __init__(self) -> None:
        self.state = STATES[0]
        self._pending = b""
        self._num_details = 0

    def feed(self, data: bytes) -> None:
        """The answer goes on with `data`."""
        self._pending += data
        text = self._pending.decode(errors="replace").strip()
        if not text:
            return
        self.state = "inside"
        # Most pieces end inside a word, where no sentence is complete.
        if text[-1].isalnum():
            return
        found = parse(text)
        if len(found) != 1 or found[0].role == "unknown":
            return
        self._pending = b""
        if found[0].role == "detail":
            self._num_details += 1
        if found[0].role in ("core", "detail"):
            steps = ("after core", *["after 1-3 details"] * (MAX_DETAILS - 1), "after 4 details")
            self.state = steps[min(self._num_details, MAX_DETAILS)]
        else:
            self.state = "after opener" if found[0].role == "opener" else "after closer"


class GrammarHead(HeadRows):
    """Scores that give each expert the table's weight, whatever the rule."""

    def __init__(self, table: Table, tokenizer: ChatTokenizer, rule: MergeRule) -> None:
        self._table = table
        self._pieces = tokenizer.pieces
        self._rule = rule
        self._readers: list[GrammarReader] = []
        self._wanted: list[tuple[str, ...]] = []
        self._names: tuple[str, ...] = ()

    def start(self, requests: Sequence[RolloutRequest], names: Sequence[str]) -> Tensor:
        self._readers = [GrammarReader() for _ in requests]
        self._wanted = [request.plan.experts for request in requests]
        self._names = tuple(names)
        return self._scores()

    def advance(self, ids: Tensor) -> Tensor:
        for reader, token_id in zip(self._readers, ids.tolist(), strict=True):
            reader.feed(self._pieces[token_id].data)
        return self._scores()

    def keep(self, rows: Tensor) -> None:
        self._readers = [self._readers[row] for row in rows.tolist()]
        self._wanted = [self._wanted[row] for row in rows.tolist()]

    def _scores(self) -> Tensor:
        scores = torch.zeros(len(self._readers), len(self._names))
        for row, (reader, wanted) in enumerate(zip(self._readers, self._wanted, strict=True)):
            weights = self._table.get((reader.state, detail_pole(wanted)))
            if weights is not None:
                for name in wanted:
                    scores[row, self._names.index(name)] = self._score(weights[axis_of(name)])
        return scores

    def _score(self, weight: float) -> float:
        """The score at which the rule gives `weight`, lambda being even."""
        if self._rule.name == "product":
            return math.atanh(math.log(weight) / self._rule.product_scale)
        return math.log(max(weight, LINEAR_FLOOR))


def axis_of(pole: str) -> int:
    """0 for register, 1 for detail, 2 for tone."""
    return next(axis for axis, poles in enumerate(POLES) if pole in poles)


def detail_pole(wanted: Sequence[str]) -> str:
    """Which pole of the detail dimension is wanted."""
    return next(pole for pole in wanted if pole in POLES[1])


def tune_table(
    rule: MergeRule,
    rate: Callable[[Table], dict[str, float]],
    *,
    passes: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> Table:
    """The best table found by coordinate ascent.

    `rate` samples with a table and gives the mean oracle score for each wanted detail pole: the two halves of a table
    do not influence each other, so one sampling rates a choice for both.
    """
    choices = PRODUCT_CHOICES if rule.name == "product" else LINEAR_CHOICES
    even = (1.0, 1.0, 1.0) if rule.name == "product" else (1 / 3, 1 / 3, 1 / 3)
    table: Table = {(state, pole): even for state in TUNED for pole in POLES[1]}
    best = rate(table)
    for _ in range(passes):
        for state in TUNED:
            start = dict(table)
            for choice in choices:
                found = rate(start | {(state, pole): choice for pole in POLES[1]})
                for pole, value in found.items():
                    if value > best[pole]:
                        best[pole], table[state, pole] = value, choice
            progress(f"{rule.name}, {state}: {best}")
    return table
