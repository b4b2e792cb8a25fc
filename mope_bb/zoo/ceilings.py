"""What weights could reach at best: an oracle that knows the grammar's state chooses them, tuned by the oracle's score.

For each state of the answer (its start, after an opener, where the number of details is decided ...) and each wanted
pole of the detail dimension one weight per wanted expert is chosen by coordinate ascent on training questions. No PCM
of the same rule that sees only these states could do better; one that sees more may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from mope_bb.chat_tokenizer import ChatTokenizer
from mope_bb.pcm.heads import HeadRows
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.rollouts import RolloutRequest
from mope_bb.zoo.oracle import parse
from mope_bb.zoo.wording import POLES

REGISTER, DETAIL, TONE = range(3)
Weights = tuple[float, float, float]
"""Of the register, detail and tone experts."""
Table = dict[tuple[str, str], Weights]
"""(state, wanted pole of the detail dimension) -> weights."""
DECIDED_BY: Final = {
    "start": TONE,
    "core": REGISTER,
    "count": DETAIL,
    "mark": DETAIL,
    "detail": REGISTER,
    "closer": TONE,
    "inside": REGISTER,
}
"""State of the answer -> the dimension that its next piece belongs to most: where the search begins."""
MARKS: Final = {"\n": "mark", "\n-": "detail", "\n\n": "closer"}
"""What follows a sentence -> the state behind it."""
LINEAR_CHOICES: Final = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Shares of one expert; the others keep their proportions in the rest."""
LINEAR_FLOOR: Final = 1e-6


class GrammarReader:
    """Follows one answer and names its state, however the answer is cut into pieces."""

    def __init__(self) -> None:
        self.state = "start"
        self._sentence = b""

    def feed(self, data: bytes) -> None:
        """The answer goes on with `data`, which may end one sentence and begin the next."""
        for byte in data:
            self._feed(bytes((byte,)))

    def _feed(self, byte: bytes) -> None:
        self._sentence += byte
        text = self._sentence.decode(errors="replace").rstrip(" ")
        if not text.strip("\n- "):
            self.state = MARKS.get(text, self.state)
            return
        self.state = "inside"
        # Most bytes are inside a word, where no sentence is complete.
        if text[-1].isalnum():
            return
        found = parse(text)
        if len(found) == 1 and found[0].role in ("opener", "core", "detail"):
            self._sentence = b""
            self.state = "core" if found[0].role == "opener" else "count"


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
            weights = self._table[reader.state, detail_pole(wanted)]
            for name in wanted:
                scores[row, self._names.index(name)] = self._score(weights[axis_of(name)])
        return scores

    def _score(self, weight: float) -> float:
        """The score at which the rule gives `weight`, lambda being even."""
        if self._rule.name == "product":
            return math.atanh(min(max(math.log(weight) / self._rule.product_scale, -0.999), 0.999))
        return math.log(max(weight, LINEAR_FLOOR))


def axis_of(pole: str) -> int:
    """REGISTER, DETAIL or TONE."""
    return next(axis for axis, poles in enumerate(POLES) if pole in poles)


def detail_pole(wanted: Sequence[str]) -> str:
    """Which pole of the detail dimension is wanted."""
    return next(pole for pole in wanted if pole in POLES[DETAIL])


def first_table(rule: MergeRule) -> Table:
    """In each state the expert of the dimension that decides there is as strong as the rule allows."""
    if rule.name == "product":
        strong, other = math.exp(rule.product_scale), 1.0
    else:
        strong, other = 0.9, 0.05
    return {
        (state, pole): _weights([strong if axis == decides else other for axis in range(3)])
        for state, decides in DECIDED_BY.items()
        for pole in POLES[DETAIL]
    }


def neighbours(rule: MergeRule, weights: Weights) -> Iterator[Weights]:
    """Weights that differ in one expert's share (linear) or one expert's exponent (product)."""
    for axis in range(3):
        if rule.name == "product":
            reach = rule.product_scale
            for exponent in (-reach, -reach / 2, 0.0, reach / 2, reach):
                yield _weights([math.exp(exponent) if i == axis else weights[i] for i in range(3)])
        else:
            rest = sum(weights) - weights[axis]
            for share in LINEAR_CHOICES:
                others = [(1 - share) * (weights[i] / rest if rest > 0 else 0.5) for i in range(3)]
                yield _weights([share if i == axis else others[i] for i in range(3)])


def tune_table(
    rule: MergeRule,
    rate: Callable[[Table], dict[str, float]],
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> Table:
    """The best table found by one round of coordinate ascent.

    `rate` samples with a table and gives the mean oracle score for each wanted detail pole: the two halves of a table
    do not influence each other, so one sampling rates a choice for both.
    """
    table = first_table(rule)
    best = rate(table)
    for state in DECIDED_BY:
        start = {pole: table[state, pole] for pole in POLES[DETAIL]}
        # Both halves begin alike, and each keeps its own best.
        for choice in dict.fromkeys(neighbours(rule, start[POLES[DETAIL][0]])):
            found = rate(table | {(state, pole): choice for pole in POLES[DETAIL]})
            for pole, value in found.items():
                if value > best[pole]:
                    best[pole], table[state, pole] = value, choice
        progress(f"{rule.name}, {state}: " + ", ".join(f"{pole} {value:.3f}" for pole, value in best.items()))
    return table


def _weights(values: Sequence[float]) -> Weights:
    register, detail, tone = values
    return register, detail, tone
