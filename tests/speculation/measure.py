"""Sampled answers of known experts against their exact distribution, by Pearson's chi-square."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from typing import Final, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from mope_bb.config import DecodingConfig
from mope_bb.pcm import course, pacing
from mope_bb.pcm.decode import decode
from mope_bb.pcm.gates import Gate
from mope_bb.pcm.merging import Merged, Plan, merge_path
from mope_bb.pcm.mixture import MergeRule
from mope_bb.pcm.pacing import AnswerPace, Move, Pace, Request
from mope_bb.pcm.runner import UserWeights
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import Context, Message, SamplingOptions, TokenDistribution
from tests.speculation.experts import PIECES, KnownExpert, PlaceScorer, known_pool, make_tables
from tests.speculation.reference import Reference

THRESHOLD: Final = 1e-4
"""A correct implementation is below it once in 10,000 seeds."""
MAX_CELLS: Final = 100
MIN_EXPECTED: Final = 5.0
LAMBDAS: Final = (0.5, 0.3, 0.2)
QUESTION: Final = Context((Message("user", "Go on."),))
NUM_OPEN: Final = 64
"""Answers that are written at the same time."""

RuleName = Literal["linear", "geometric", "product"]
Answer = tuple[int, ...]
"""Places in the vocabulary."""


@dataclass(frozen=True)
class Setup:
    """What is sampled from."""

    rule: RuleName
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 3
    without_lists: str | None = None
    """An expert that can only be made to draw a piece."""
    is_scored: bool = False
    """By a scorer that says something else at every position; else the user's own weights act."""

    @property
    def plan(self) -> Plan:
        """Three styled experts; the product asks the base as well."""
        return Plan(MergeRule(self.rule), ("red", "green", "blue"), LAMBDAS, base="base", preference_text="")

    def exact(self) -> dict[Answer, float]:
        """The probability of every answer."""
        tables = make_tables()
        base = tables.pop("base")
        return Reference(tables, base, LAMBDAS, **asdict(self)).answers()


@dataclass(frozen=True)
class Mode:
    """How the experts are asked."""

    settings: DecodingConfig
    begins_next: bool | None = None
    """Whether each draft is begun before the one before it is tested; None: where it seems to be worth it."""
    drafting_s: float = 1.0
    """What a draft seems to take, beside 1 s for a question."""
    scoring_s: float = 1.0
    spread: float = 0.3
    """Powers of ten over which these seconds seem to vary."""


def settings(mode: Literal["auto", "lockstep", "lookahead", "draft"], max_ahead: int) -> DecodingConfig:
    """Without a limit on what is generated."""
    return DecodingConfig(mode=mode, max_ahead=max_ahead, max_generated=100.0)


SETUPS: Final = {
    "linear": Setup("linear"),
    "geometric, scored": Setup("geometric", max_tokens=4, is_scored=True),
    "product": Setup("product"),
    "linear, temperature 0.7, top_p 0.9": Setup("linear", temperature=0.7, top_p=0.9, max_tokens=5),
}
WITHOUT_LISTS: Final = Setup("linear", without_lists="green", is_scored=True)
MODES: Final = {
    "lockstep": Mode(settings("lockstep", 3)),
    "lookahead": Mode(settings("lookahead", 3)),
    "draft": Mode(settings("draft", 2), begins_next=False),
    "draft, next begun": Mode(settings("draft", 2), begins_next=True),
    "auto": Mode(settings("auto", 3), drafting_s=2.0, scoring_s=3.0, spread=1.0),
}


class RandomPace(Pace):
    """Speeds that are noise from a seed: every length, drafter and kind of move gets its turn, alike in every run."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode.settings)
        self.mode = mode
        self._random = random.Random(0)

    @property
    def begins_early(self) -> bool:
        """In every mode, and with many answers open as well."""
        return True

    def observe(self, name: str, request: Request, num_positions: int, seconds: float) -> None:
        """Measured times would make the moves differ from run to run."""

    def seconds(self, name: str, request: Request, num_positions: int) -> float:
        seconds = {"draft": self.mode.drafting_s, "score": self.mode.scoring_s}.get(request, 1.0)
        return seconds * math.pow(10.0, self.mode.spread * self._random.random())


class SteeredPace(AnswerPace):
    """Begins drafts early, or does not, as the mode says."""

    def choose(self, *, num_left: int, num_context: int) -> Move:
        move = super().choose(num_left=num_left, num_context=num_context)
        if move.drafter is None or not isinstance(self._pace, RandomPace) or self._pace.mode.begins_next is None:
            return move
        return replace(move, begins_next=self._pace.mode.begins_next)


@contextmanager
def steered() -> Iterator[None]:
    """Answers are paced by a `SteeredPace`, with a new choice after every move, so that all kinds follow each other."""
    with patch.object(course, "AnswerPace", SteeredPace), patch.object(pacing, "REFRESH", 1):
        yield


@dataclass
class Sampled:
    """Answers, and what they cost."""

    answers: dict[int, Answer] = field(default_factory=dict)
    """By seed."""
    efforts: Counter[str] = field(default_factory=Counter)
    """Sums of the fields of `Effort`."""
    num_with_drafts: int = 0
    """Answers in which drafts took part."""

    @property
    def num_tokens(self) -> int:
        """END among them."""
        return sum(map(len, self.answers.values()))

    @property
    def share_kept(self) -> float:
        """Of the drafted pieces."""
        return self.efforts["num_accepted"] / max(1, self.efforts["num_drafted"])

    def test(self, exact: Mapping[Answer, float]) -> ChiSquare:
        """Against the exact distribution."""
        return chi_square(Counter(self.answers.values()), exact)


def sample(setup: Setup, mode: Mode, num_answers: int, *, is_repeatable: bool = False) -> Sampled:
    """One answer for each of the seeds 0, 1, ..."""
    return asyncio.run(_sample(setup, mode, range(num_answers), is_repeatable=is_repeatable))


NUM_PROCESSES: Final = 2


@contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """For `sample_widely`; they import torch once."""
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=multiprocessing.get_context("spawn")) as found:
        yield found


def sample_widely(workers: ProcessPoolExecutor, setup: Setup, mode: Mode, num_answers: int) -> Sampled:
    """The same as `sample`, shared among processes."""
    found = Sampled()
    shares = [range(first, num_answers, NUM_PROCESSES) for first in range(NUM_PROCESSES)]
    for part in workers.map(_sample_share, repeat(setup), repeat(mode), shares):
        found.answers |= part.answers
        found.efforts.update(part.efforts)
        found.num_with_drafts += part.num_with_drafts
    return found


def _sample_share(setup: Setup, mode: Mode, seeds: Sequence[int]) -> Sampled:
    torch.set_num_threads(1)
    return asyncio.run(_sample(setup, mode, seeds, is_repeatable=False))


async def _sample(setup: Setup, mode: Mode, seeds: Sequence[int], *, is_repeatable: bool) -> Sampled:
    sampled = Sampled()
    options = SamplingOptions(setup.temperature, setup.top_p, setup.max_tokens)
    plan, pace = setup.plan, RandomPace(mode)
    scorer = PlaceScorer() if setup.is_scored else UserWeights()
    waiting = iter(seeds)

    async def write(pool: ExpertPool) -> None:
        for seed in waiting:
            opened = decode(QUESTION, plan, pool, scorer, options, seed=seed, pace=pace, is_repeatable=is_repeatable)
            sampled.answers[seed] = tuple([PIECES.index(step.piece) async for step in opened])
            sampled.efforts.update(asdict(opened.effort))
            sampled.num_with_drafts += opened.uses_drafts

    experts = [
        KnownExpert(name, table, gives_lists=name != setup.without_lists) for name, table in make_tables().items()
    ]
    async with known_pool(experts) as pool:
        with steered(), patch.object(course, "merge_path", remembering(merge_path)):
            await asyncio.gather(*(write(pool) for _ in range(NUM_OPEN)))
    return sampled


MergePath = Callable[[Plan, Sequence[Sequence[TokenDistribution]], Tensor, Gate], tuple[Merged, ...]]


def remembering(merge: MergePath) -> MergePath:
    """`merge`, once for each of the few different paths: the experts give the same list objects again and again."""
    known: dict[tuple[object, ...], tuple[Merged, ...]] = {}

    def merged(
        plan: Plan, path: Sequence[Sequence[TokenDistribution]], head_scores: Tensor, gate: Gate
    ) -> tuple[Merged, ...]:
        key = (head_scores.numpy().tobytes(), *(id(one) for lists in path for one in lists))
        if key not in known:
            known[key] = merge(plan, path, head_scores, gate)
        return known[key]

    return merged


@dataclass(frozen=True)
class ChiSquare:
    """Pearson's test."""

    statistic: float
    num_cells: int
    p_value: float


def chi_square(counts: Mapping[Answer, int], exact: Mapping[Answer, float]) -> ChiSquare:
    """Answers of a kind that is expected less than 5 times, and those beyond the 99 most probable, are one cell.

    An answer that cannot be makes the p-value 0.
    """
    num_answers = sum(counts.values())
    if any(answer not in exact for answer in counts):
        return ChiSquare(float("inf"), 0, 0.0)
    cells = [(num_answers * exact[answer], counts.get(answer, 0)) for answer in sorted(exact, key=exact.__getitem__)]
    joined = [cells.pop(0)]
    while len(cells) >= MAX_CELLS or cells[0][0] < MIN_EXPECTED or sum(e for e, _ in joined) < MIN_EXPECTED:
        joined.append(cells.pop(0))
    cells.append((sum(expected for expected, _ in joined), sum(count for _, count in joined)))
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    halves = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return ChiSquare(statistic, len(cells), float(torch.special.gammaincc(halves[0], halves[1])))
