"""How many requests an endpoint gets at a time: a limit that learns from its 429s, and the queue in front of it.

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


class Outcome(Enum):
    """How a request ended, as far as the limit is concerned."""

    SUCCEEDED = auto()
    THROTTLED = auto()
    """429: there were too many."""
    FAILED = auto()
    """Any other failure: no reason to ask for less, and none to ask for more."""
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
        elif outcome is Outcome.FAILED:
            self._num_clean = 0
        self.in_flight -= 1

    def _begin_row(self, limit: float) -> None:
        self._limit = min(max(1.0, limit), float(self._most))
        self._num_clean = 0
        self._was_reached = False


class RequestQueue:
    """Requests in the order in which they came, retries first, as many at a time as the limit allows."""

    def __init__(self, limit: AdaptiveLimit) -> None:
        self.limit = limit
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    def begin_now(self) -> int | None:
        """`AdaptiveLimit.begin`, if there is room and nobody waits; else None."""
        return self.limit.begin() if not self._waiting and self.limit.has_room() else None

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
        if self._waiting:
            self._admit()

    def _admit(self) -> None:
        while self._waiting and (self._waiting[0].done() or self.limit.has_room()):
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(self.limit.begin())
        if self._waiting and self._alarm is None and (pause_s := self.limit.pause_s):
            self._alarm = asyncio.get_running_loop().call_later(pause_s, self._resume)

    def _resume(self) -> None:
        self._alarm = None
        self._admit()
