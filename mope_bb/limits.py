"""How many requests an endpoint gets at a time: a limit that learns from its 429s, a circuit that opens where it is
down, and the queue in front of both.

Additive increase, multiplicative decrease, as in TCP. What waits here waits in our own memory, before a connection is
asked for: however many requests come at once, none of them times out while it is being connected.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

MAX_IN_FLIGHT: Final = 256
MAX_RETRY_AFTER_S: Final = 120.0
"""A longer `Retry-After` is not waited for."""
SHRINKAGE: Final = 0.8
MIN_CLEAN: Final = 20
"""Growth takes at least this many successes in a row: at a small limit a step too far costs a large share of 429s."""
TRIPS_AFTER: Final = 5
"""So many failures in a row mean that an endpoint is down; as many tries has a single request by default."""
FIRST_BREAK_S: Final = 1.0
LONGEST_BREAK_S: Final = 30.0


class Outcome(Enum):
    """How a request ended, as far as the limit is concerned."""

    SUCCEEDED = auto()
    THROTTLED = auto()
    """429: there were too many."""
    DOWN = auto()
    """No connection, no answer in time, or the server itself failed (5xx)."""
    FAILED = auto()
    """Any other failure: it answers, so that it is there; no reason to ask for less, and none to ask for more."""
    ABANDONED = auto()
    """Nobody waited for the reply any more."""


class AdaptiveLimit:
    """The limit, without a queue: AIMD on 429s alone.

    It starts at `most` and never exceeds it. A 429 cuts it to 0.8 of what was reached since the last cut, once for all
    requests that were sent before this cut: they tell of the same overload. It grows by 1 after as many successes in a
    row as it allows requests (20 at least), if it was reached meanwhile; another failure begins that row anew.
    """

    def __init__(self, most: int = MAX_IN_FLIGHT, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that only rise."""
        self._most = most
        self._clock = clock
        self._limit = float(most)
        self._num_cuts = 0
        self._num_clean = 0
        self._was_reached = False
        self._peak = 0
        self._resumes_at = 0.0
        self.in_flight = 0
        """Requests under way."""

    @property
    def value(self) -> int:
        """How many requests may be under way."""
        return int(self._limit)

    @property
    def pause_s(self) -> float:
        """How long the endpoint asked to be left alone from now on; 0 = it did not."""
        return max(0.0, self._resumes_at - self._clock()) if self._resumes_at else 0.0

    def has_room(self) -> bool:
        """Whether a request may be sent now."""
        return self.in_flight < int(self._limit) and not self.pause_s

    def begin(self) -> int:
        """Count a request that is sent now; what it returns belongs to this request, for `end`."""
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)
        if self.in_flight >= int(self._limit):
            self._was_reached = True
        return self._num_cuts

    def end(self, begun: int, outcome: Outcome, retry_after_s: float | None = None) -> None:
        """Count the end of a request. `retry_after_s` is how long a 429 asks to wait."""
        is_current = begun == self._num_cuts
        if outcome is Outcome.SUCCEEDED:
            if is_current:
                self._num_clean += 1
                if self._num_clean >= max(MIN_CLEAN, int(self._limit)):
                    self._begin_row(self._limit + 1 if self._was_reached else self._limit)
        elif outcome is Outcome.THROTTLED:
            if is_current:
                self._num_cuts += 1
                self._begin_row(SHRINKAGE * min(self._limit, self._peak))
                self._peak = self.in_flight
            if retry_after_s:
                resumes_at = self._clock() + min(retry_after_s, MAX_RETRY_AFTER_S)
                self._resumes_at = max(self._resumes_at, resumes_at)
        elif outcome in (Outcome.FAILED, Outcome.DOWN):
            self._num_clean = 0
        self.in_flight -= 1

    def _begin_row(self, limit: float) -> None:
        self._limit = min(max(1.0, limit), float(self._most))
        self._num_clean = 0
        self._was_reached = False


class Circuit:
    """Whether an endpoint is asked at all: after failures in a row it is left alone, then tried by one request.

    The first break is a second; each trial that fails doubles it. Any answer, even a refusal, closes the circuit.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that only rise."""
        self._clock = clock
        self._num_failed = 0
        self._break_s = 0.0
        self._retry_at = 0.0
        self._is_tried = False

    @property
    def is_open(self) -> bool:
        """The endpoint counts as down."""
        return self._break_s > 0

    @property
    def break_s(self) -> float:
        """How long it is left alone between two trials; 0 = the circuit is closed."""
        return self._break_s

    @property
    def wait_s(self) -> float:
        """How long it is left alone from now on; 0 = a request may try it."""
        return max(0.0, self._retry_at - self._clock()) if self._break_s else 0.0

    def allows(self) -> bool:
        """Whether a request may be sent now."""
        return not self._break_s or not (self._is_tried or self.wait_s)

    def begin(self) -> None:
        """Count a request that is sent now."""
        self._is_tried = self.is_open

    def end(self, outcome: Outcome) -> None:
        """Count the end of a request."""
        if outcome is Outcome.ABANDONED:
            self._is_tried = False
        elif outcome is not Outcome.DOWN:
            self._num_failed, self._break_s, self._is_tried = 0, 0.0, False
        elif self._is_tried or not self._break_s:
            # While it is open only the trial counts: the others were sent before.
            self._num_failed += 1
            self._is_tried = False
            if self._num_failed >= TRIPS_AFTER:
                self._break_s = min(2 * self._break_s or FIRST_BREAK_S, LONGEST_BREAK_S)
                self._retry_at = self._clock() + self._break_s


class RequestQueue:
    """Requests in the order in which they came, retries first, as many at a time as the limit allows."""

    def __init__(self, limit: AdaptiveLimit, circuit: Circuit | None = None) -> None:
        self.limit = limit
        self.circuit = circuit or Circuit()
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    def begin_now(self) -> int | None:
        """`AdaptiveLimit.begin`, if there is room and nobody waits; else None."""
        return self._begin() if not self._waiting and self._has_room() else None

    async def begin(self, *, is_retry: bool = False) -> int:
        """`AdaptiveLimit.begin`, as soon as it is this request's turn."""
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if is_retry:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        self._admit()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # Its turn came in the moment in which it was cancelled: on to the next one.
                self.end(turn.result(), Outcome.ABANDONED)
            raise

    def end(self, begun: int, outcome: Outcome, retry_after_s: float | None = None) -> None:
        """`AdaptiveLimit.end`; those who wait move up."""
        self.limit.end(begun, outcome, retry_after_s)
        self.circuit.end(outcome)
        if self._waiting:
            self._admit()

    def _has_room(self) -> bool:
        return self.limit.has_room() and self.circuit.allows()

    def _begin(self) -> int:
        self.circuit.begin()
        return self.limit.begin()

    def _admit(self) -> None:
        while self._waiting and (self._waiting[0].done() or self._has_room()):
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(self._begin())
        pause_s = max(self.limit.pause_s, self.circuit.wait_s)
        if self._waiting and self._alarm is None and pause_s:
            self._alarm = asyncio.get_running_loop().call_later(pause_s, self._resume)

    def _resume(self) -> None:
        self._alarm = None
        self._admit()
