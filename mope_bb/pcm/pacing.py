"""How far ahead: what was measured of the endpoints' speed and of the experts' agreement, and the move that follows.

A move is what is asked next for one open answer. Its worth is the tokens that it will probably keep by the seconds that
it will probably take. What is sampled has the same distribution whatever is chosen here.

Shapes: E experts asked, W positions of the window, m positions ahead.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from mope_bb.config import DecodingConfig
from mope_bb.providers.pool import Seat

Floats = npt.NDArray[np.float64]
Kind = Literal["lockstep", "lookahead", "draft"]
Request = Literal["ask", "draft", "score", "judge"]
LENGTHS: Final = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
WINDOW: Final = 128
"""Positions that are remembered: the last answers until an answer has enough of its own."""
REFRESH: Final = 8
"""New positions after which the window is read again."""
FORGET: Final = 0.95
"""Weight that a measured time keeps when the next one comes."""
PRIOR: Final = 5.0
"""Measurements that the mean of all experts counts for: a few slow requests must not make an expert look slow."""
SHARPNESS: Final = (1.0, 0.75, 0.55)
"""Shares of the answer's temperature at which an expert may draft. A trained product is sharper than any of its
experts: what one of them writes at a lower temperature is then kept more often."""
EVERYONE: Final = "*"
NEAREST: Final[dict[Request, tuple[Request, ...]]] = {
    "ask": ("ask", "draft", "score"),
    "draft": ("draft", "ask", "score"),
    "score": ("score", "ask", "draft"),
    "judge": ("judge",),
}
"""By which requests the time of another is guessed where none was made yet."""
UNKNOWN_AGREEMENT: Final = 0.85
FEW_OPEN: Final = 3
OUTLIER: Final = 3.0
"""A request that takes so many times as long as expected counts as this: the machine was busy with something else."""
AS_GOOD: Final[Mapping[str, float]] = {"auto": 0.9, "lookahead": 0.8, "draft": 0.8, "lockstep": 1.0}
"""Mode -> of moves that are so nearly as fast as the fastest, the one with the fewest requests for a token is taken."""
WASTE: Final[Mapping[str, float]] = {"auto": 1 / 3, "lookahead": 0.0, "draft": 1 / 3, "lockstep": 0.0}
"""Mode -> kept tokens that are worth as much as one that is generated: long drafts save requests, and go to waste."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Move:
    """What is asked next."""

    kind: Kind
    num_ahead: int = 1
    """Positions asked for."""
    drafter: str | None = None
    sharpness: float = 1.0
    """By which the answer's temperature is multiplied for the draft."""
    begins_next: bool = False
    """The next draft starts before the scores of this one are back."""


@dataclass(eq=False, slots=True)
class Line:
    """Seconds of a request for n positions, as a + b n by least squares; what is long past is forgotten."""

    _sums: Floats = field(default_factory=lambda: np.zeros(5))
    _is_warm: bool = False
    _weight: float = 0.0
    _base: float = 0.0
    _slope: float = 0.0
    _least: float = 0.0

    def add(self, num_positions: int, seconds: float) -> None:
        """One more measurement. The very first is left out: it opened the connection and learned what is served."""
        if not self._is_warm:
            self._is_warm = True
            return
        if (expected := self.seconds(num_positions)) is not None:
            seconds = min(seconds, OUTLIER * expected)
        n = float(num_positions)
        self._sums = FORGET * self._sums + np.array((1.0, n, n * n, seconds, n * seconds))
        self._weight, sum_n, squares, sum_s, products = (float(value) for value in self._sums)
        mean_n, mean_s = sum_n / self._weight, sum_s / self._weight
        spread = squares / self._weight - mean_n**2
        self._slope = max(0.0, (products / self._weight - mean_n * mean_s) / spread) if spread > 0.1 else 0.0
        self._base, self._least = mean_s - self._slope * mean_n, 0.1 * mean_s

    def seconds(self, num_positions: int) -> float | None:
        """What a request for so many positions takes; None where nothing was measured."""
        if self._weight == 0.0:
            return None
        return max(self._base + self._slope * num_positions, self._least)

    def shrunk(self, num_positions: int, expected: float) -> float:
        """`seconds`, with what is `expected` of it counted as some measurements more."""
        own = self.seconds(num_positions)
        return expected if own is None else (self._weight * own + PRIOR * expected) / (self._weight + PRIOR)


class Agreement:
    """How well experts can guess the merged answer, position by position: the shared past and this answer's own.

    D ways of drafting: every expert at every sharpness.
    """

    def __init__(self, num_ways: int) -> None:
        self._rows: deque[Floats] = deque(maxlen=WINDOW)
        self._num_columns = num_ways + 2

    def add(self, rows: Iterable[Floats]) -> None:
        """Rows of (D + 2): the probability that a piece drafted in each way would be kept; that the piece which every
        expert holds for the most probable is drawn, 0 where they differ; and 1. Nothing but 0 where the answer
        ended, since nothing comes after it."""
        self._rows.extend(rows)

    def copy(self) -> Agreement:
        """A window of its own that begins with this one's rows."""
        other = Agreement(self._num_columns - 2)
        other.add(self._rows)
        return other

    def survival(self, max_ahead: int) -> Floats:
        """(max_ahead + 1, D + 2): the probability that so many positions in a row are kept, and that there are so many.

        The last column is that of the answer going on.
        """
        unknown = np.full((1, self._num_columns), UNKNOWN_AGREEMENT)
        unknown[:, -1] = 1.0
        rows = np.array(self._rows) if self._rows else unknown
        logs = np.log(np.clip(rows, 1e-6, 1.0))
        sums = np.concatenate((np.zeros((1, self._num_columns)), logs.cumsum(axis=0)))
        found = np.ones((max_ahead + 1, self._num_columns))
        for ahead in range(1, max_ahead + 1):
            # Half a window of starts at least; beyond it, as if positions did not depend on each other.
            if 2 * ahead <= len(rows) or ahead == 1:
                found[ahead] = np.exp(sums[ahead:] - sums[:-ahead]).mean(axis=0)
            else:
                found[ahead] = found[ahead - 1] * rows.mean(axis=0)
        return found


class Pace:
    """What the answers of one pool have measured, for all of them."""

    def __init__(self, settings: DecodingConfig | None = None) -> None:
        self.settings = settings or DecodingConfig()
        self._lines: dict[tuple[str, Request], Line] = {}
        self._agreements: dict[tuple[object, ...], Agreement] = {}
        self._broken: set[tuple[str, Request]] = set()
        self.num_open = 0
        """Answers that are being written."""

    def observe(self, name: str, request: Request, num_positions: int, seconds: float) -> None:
        """A request of `name` took so long."""
        for key in ((name, request), (EVERYONE, request)):
            self._lines.setdefault(key, Line()).add(num_positions, seconds)

    def seconds(self, name: str, request: Request, num_positions: int) -> float:
        """How long it will probably take; by the nearest kind of request where none was made yet."""
        for known in NEAREST[request]:
            own, common = self._lines.get((name, known)), self._lines.get((EVERYONE, known))
            if common is not None and (expected := common.seconds(num_positions)) is not None:
                return expected if own is None else own.shrunk(num_positions, expected)
        return 0.0

    @property
    def begins_early(self) -> bool:
        """Whether a draft may begin before it is known that it will be of use: not where other answers keep the
        endpoints busy anyway, and not where few requests are wanted."""
        return self.settings.mode == "auto" and self.num_open <= FEW_OPEN

    def give_up(self, name: str, request: Request, reason: str) -> None:
        """This endpoint refuses such requests: no more of them."""
        if (name, request) not in self._broken:
            self._broken.add((name, request))
            _log.warning("expert %r is not asked for a %s any more: %s", name, request, reason)

    def can(self, name: str, request: Request) -> bool:
        """Whether `give_up` was not called."""
        return (name, request) not in self._broken

    def agreement(self, key: tuple[object, ...], num_ways: int) -> Agreement:
        """The window that all answers of one kind share."""
        return self._agreements.setdefault(key, Agreement(num_ways))


class AnswerPace:
    """Chooses the moves of one open answer."""

    def __init__(self, pace: Pace, seats: Sequence[Seat], key: tuple[object, ...], *, is_repeatable: bool) -> None:
        """`key`: answers of one key agree alike. `is_repeatable`: nothing that endpoints draw may take part."""
        self._pace = pace
        self._seats = seats
        self._shared = pace.agreement(key, len(SHARPNESS) * len(seats))
        self._own = self._shared.copy()
        self._may_draft = not is_repeatable
        self._num_new = REFRESH
        self._survival = np.ones((1, len(SHARPNESS) * len(seats) + 2))
        self._move = Move("lockstep")
        self.num_kept = 0
        self.num_generated: dict[str, int] = dict.fromkeys((seat.name for seat in seats), 0)

    def learn(self, rows: Sequence[Floats]) -> None:
        """Rows for `Agreement.add`, sharpness by sharpness, one for each token that was kept."""
        self._shared.add(rows)
        self._own.add(rows)
        self._num_new += len(rows)
        self.num_kept += len(rows)

    def choose(self, *, num_left: int, num_context: int) -> Move:
        """The best move while `num_left` more tokens are wanted and the prompt has about `num_context` tokens."""
        if not self._may_go_ahead():
            return Move("lockstep")
        # Weighing all moves takes as long as merging a token: not before there is something new to go by.
        if self._num_new >= REFRESH or not self._is_possible(self._move):
            self._move = self._best(num_context)
            self._num_new = 0
        return replace(self._move, num_ahead=min(self._move.num_ahead, num_left))

    def _is_possible(self, move: Move) -> bool:
        return move.drafter is None or self._can_draft(move.drafter)

    def _can_draft(self, drafter: str) -> bool:
        """Neither it nor those who would score what it writes have refused."""
        return all(self._pace.can(seat.name, "draft" if seat.name == drafter else "score") for seat in self._seats)

    def _best(self, num_context: int) -> Move:
        settings = self._pace.settings
        longest = settings.max_ahead
        self._survival = self._own.survival(longest)
        lockstep = self._lockstep(num_context)
        moves = [lockstep] if settings.mode in ("auto", "lockstep") else []
        lengths = [length for length in LENGTHS if length <= longest]
        if settings.mode in ("auto", "lookahead"):
            moves += [self._lookahead(length, num_context) for length in lengths]
        if settings.mode in ("auto", "draft") and self._may_draft:
            moves += self._drafts(lengths or [1], num_context)
        allowed = [one for one in moves if self._is_allowed(one, lockstep)]
        if not allowed:
            return lockstep.move
        enough = AS_GOOD[settings.mode] * max(one.tokens_per_second for one in allowed)
        good = [one for one in allowed if one.tokens_per_second >= enough]
        waste = WASTE[settings.mode]
        return max(good, key=lambda one: one.kept * (1 - waste * one.generated_per_token)).move

    def _may_go_ahead(self) -> bool:
        """Whether what was generated so far leaves room for another guess."""
        limit = self._pace.settings.max_generated * self.num_kept + self._pace.settings.max_ahead
        return max(self.num_generated.values()) <= limit

    def _is_allowed(self, one: _Forecast, lockstep: _Forecast) -> bool:
        if one.move.kind == "lockstep":
            return True
        if one.generated_per_token > self._pace.settings.max_generated:
            return False
        return one.price_per_token <= lockstep.price_per_token * (1 + 1e-9)

    def _kept(self, column: int, ahead: int) -> float:
        """Tokens that `ahead` positions give: each position that is reached gives one."""
        return float(self._survival[:ahead, column].sum())

    def _generated(self, ahead: int) -> float:
        """Tokens that a draft of `ahead` positions has: it ends where the answer ends."""
        return float(self._survival[:ahead, -1].sum())

    def _lockstep(self, num_context: int) -> _Forecast:
        seconds = max(self._seconds("ask", 1), self._judging(1))
        price = sum(num_context * seat.input_price + seat.output_price for seat in self._seats)
        return _Forecast(Move("lockstep"), 1.0, seconds, 1.0, price)

    def _lookahead(self, ahead: int, num_context: int) -> _Forecast:
        kept, generated = self._kept(-2, ahead), self._generated(ahead)
        seconds = max(
            self._pace.seconds(seat.name, "draft" if seat.can_continue else "ask", ahead if seat.can_continue else 1)
            for seat in self._seats
        )
        # Most of the judging is done when the lists are there.
        seconds = max(seconds, self._judging(1)) + (self._judging(ahead) if ahead > 1 else 0.0)
        price = sum(num_context * seat.input_price + generated * seat.output_price for seat in self._seats)
        if not all(seat.can_continue and self._pace.can(seat.name, "draft") for seat in self._seats):
            kept = 1.0
        return _Forecast(Move("lookahead", ahead), kept, seconds, generated / kept, price / kept)

    def _drafts(self, lengths: Sequence[int], num_context: int) -> list[_Forecast]:
        found = []
        for column, drafter in enumerate(self._seats):
            others = [seat for seat in self._seats if seat is not drafter]
            if drafter.can_draft and self._can_draft(drafter.name):
                way = self._best_way(column, drafter)
                for ahead in lengths:
                    found += self._draft(way, drafter, others, ahead, num_context)
        return found

    def _best_way(self, column: int, drafter: Seat) -> int:
        """The way of drafting of one expert that is kept most often."""
        ways = range(column, len(SHARPNESS) * len(self._seats), len(self._seats))
        longest = len(self._survival) - 1
        return max(ways if drafter.can_sharpen else ways[:1], key=lambda way: self._kept(way, longest))

    def _draft(self, way: int, drafter: Seat, others: Sequence[Seat], ahead: int, num_context: int) -> list[_Forecast]:
        kept, generated = self._kept(way, ahead), self._generated(ahead)
        all_kept = float(self._survival[ahead, way])
        drafting = self._pace.seconds(drafter.name, "draft", ahead)
        scoring = max([self._judging(ahead), *(self._pace.seconds(seat.name, "score", ahead) for seat in others)])
        price = num_context * drafter.input_price + generated * drafter.output_price
        for seat in others:
            num_requests = 1 if seat.scores_at_once else ahead
            price += num_requests * ((num_context + ahead) * seat.input_price + seat.output_price)
        move = Move("draft", ahead, drafter.name, SHARPNESS[way // len(self._seats)])
        alone = _Forecast(move, kept, drafting + scoring, generated / kept, price / kept)
        if not others or not self._pace.begins_early:
            return [alone]
        # The next draft, begun early, is there at once where this one is kept whole, and lost where it is not.
        early = _Forecast(
            replace(move, begins_next=True),
            kept,
            drafting + scoring - all_kept * min(drafting, scoring),
            generated * (2 - all_kept) / kept,
            price * (2 - all_kept) / kept,
        )
        return [alone, early]

    def _seconds(self, request: Request, num_positions: int) -> float:
        return max(self._pace.seconds(seat.name, request, num_positions) for seat in self._seats)

    def _judging(self, num_positions: int) -> float:
        return self._pace.seconds("", "judge", num_positions)


@dataclass(frozen=True, slots=True)
class _Forecast:
    move: Move
    kept: float
    seconds: float
    generated_per_token: float
    """By the expert that generates most."""
    price_per_token: float

    @property
    def tokens_per_second(self) -> float:
        return self.kept / max(self.seconds, 1e-9)
