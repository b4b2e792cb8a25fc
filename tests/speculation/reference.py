"""The exact distribution of whole answers, by METHOD's formulas over the whole vocabulary, in numpy.

Independent of the package on purpose: it shares no line with the code that it judges. Shapes: E experts, V pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from tests.speculation.experts import KNOWS_ITS_SIZE, PIECES, START, TOP_K, Array, place_scores

PRODUCT_SCALE: Final = 1.5
PLAUSIBILITY: Final = 0.1


@dataclass(frozen=True)
class Reference:
    """What is sampled from: the experts' tables and all that acts on them."""

    tables: dict[str, Array]
    """Of the styled experts, V x V."""
    base: Array
    lambdas: tuple[float, ...]
    rule: Literal["linear", "geometric", "product"]
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 3
    without_lists: str | None = None
    """The expert whose whole distribution takes part, since it draws from it."""
    is_scored: bool = False
    """By `PlaceScorer`; else the user's own weights act."""

    def answers(self) -> dict[tuple[int, ...], float]:
        """Every answer as places in the vocabulary, with its probability: up to END, or to `max_tokens`."""
        end = PIECES.index(PIECES[-1])
        found: dict[tuple[int, ...], float] = {}
        growing: dict[tuple[int, ...], float] = {(): 1.0}
        while growing:
            longer: dict[tuple[int, ...], float] = {}
            for written, probability in growing.items():
                pi = self.next_piece(len(written), written[-1] if written else START)
                for place in np.flatnonzero(pi).tolist():
                    answer = (*written, place)
                    is_whole = place == end or len(answer) == self.max_tokens
                    (found if is_whole else longer)[answer] = probability * float(pi[place])
            growing = longer
        return found

    def next_piece(self, num_written: int, last: int) -> Array:
        """pi (V), after temperature and top_p."""
        scores = np.array(place_scores(num_written, last, len(self.lambdas)) if self.is_scored else [0.0] * 3)
        return shape(self._merge(last, scores), self.temperature, self.top_p)

    def _merge(self, last: int, scores: Array) -> Array:
        lambdas = np.array(self.lambdas)
        alpha = lambdas * np.exp(scores) / (lambdas * np.exp(scores)).sum()
        styled = [
            table[last] if name == self.without_lists else top_k(table[last]) for name, table in self.tables.items()
        ]
        with np.errstate(divide="ignore"):
            if self.rule == "linear":
                # What is not on an expert's own list counts as 0; normalised once, over the candidates.
                log_pi = np.log(np.sum([a * p for a, p in zip(alpha, styled, strict=True)], axis=0))
            else:
                asked = [("base", top_k(self.base[last]))] if self.rule == "product" else []
                asked += zip(self.tables, styled, strict=True)
                candidates = np.any([p > 0 for _, p in asked], axis=0)
                log_p = np.array([np.where(p > 0, np.log(p), floor(p, name)) for name, p in asked])
                if self.rule == "geometric":
                    log_pi = alpha @ log_p
                else:
                    beta = len(lambdas) * lambdas * np.exp(PRODUCT_SCALE * np.tanh(scores))
                    log_pi = log_p[0] + beta @ (log_p[1:] - log_p[0])
                    mixture = np.where(candidates, np.exp(log_p).mean(axis=0), 0.0)
                    candidates &= mixture >= PLAUSIBILITY * mixture.max()
                log_pi = np.where(candidates, log_pi, -np.inf)
        pi = np.exp(log_pi - log_pi.max())
        normalised: Array = pi / pi.sum()
        return normalised


def top_k(row: Array) -> Array:
    """`row` (V) with 0 for what is not on the list."""
    return np.where(row >= np.sort(row)[-TOP_K], row, 0.0)


def floor(listed: Array, name: str) -> float:
    """The logprob of a piece that is not on the list: at most the smallest on it, and at most the tail; the tail's
    even share where the size of the vocabulary is known."""
    tail = 1.0 - float(listed.sum())
    if name in KNOWS_ITS_SIZE:
        tail /= len(PIECES) - TOP_K
    return math.log(min(float(listed[listed > 0].min()), tail))


def shape(pi: Array, temperature: float, top_p: float) -> Array:
    """`pi` (V) after temperature, then top_p: the smallest set of the most probable pieces whose mass reaches it."""
    if temperature == 0.0:
        return np.where(np.arange(len(pi)) == pi.argmax(), 1.0, 0.0)
    shaped = pi ** (1.0 / temperature)
    shaped /= shaped.sum()
    kept = np.zeros_like(shaped)
    for place in np.argsort(-shaped):
        if kept.sum() >= top_p:
            break
        kept[place] = shaped[place]
    normalised: Array = kept / kept.sum()
    return normalised
