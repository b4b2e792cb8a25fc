"""The limit on requests: what cuts it, what lets it grow, what holds requests back; and the queue in front of it."""

from __future__ import annotations

import asyncio
import random

import pytest

from mope_bb.limits import (
    FIRST_BREAK_S,
    MAX_RETRY_AFTER_S,
    TRIPS_AFTER,
    AdaptiveLimit,
    Circuit,
    Outcome,
    RequestQueue,
)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fill(limit: AdaptiveLimit) -> list[int]:
    """Begin requests while there is room."""
    begun = []
    while limit.has_room():
        begun.append(limit.begin())
    return begun


def round_trip(limit: AdaptiveLimit, outcome: Outcome = Outcome.SUCCEEDED) -> None:
    """As many requests as are allowed, all of which end in this way."""
    for begun in fill(limit):
        limit.end(begun, outcome)


def throttle(limit: AdaptiveLimit) -> None:
    """A round trip in which everything is refused."""
    round_trip(limit, Outcome.THROTTLED)


def test_a_burst_of_429s_counts_once() -> None:
    """All that was sent before the cut tells of the same overload; what was sent after it counts again."""
    limit = AdaptiveLimit(100)
    begun = fill(limit)
    for one in begun[:50]:
        limit.end(one, Outcome.THROTTLED)
    assert limit.value == 80
    later = fill(limit)
    for one in begun[50:]:
        limit.end(one, Outcome.THROTTLED)
    assert limit.value == 80
    limit.end(later[0], Outcome.THROTTLED)
    assert limit.value < 80


def test_a_cut_starts_from_what_was_under_way() -> None:
    """A limit that nobody reaches says nothing of what the endpoint can bear."""
    limit = AdaptiveLimit(256)
    begun = [limit.begin() for _ in range(10)]
    limit.end(begun[0], Outcome.THROTTLED)
    assert limit.value == 8


def test_one_request_is_always_allowed() -> None:
    """However often it is cut."""
    limit = AdaptiveLimit(4)
    for _ in range(20):
        throttle(limit)
    assert limit.value == 1
    assert limit.has_room()


def test_it_grows_by_one_in_a_row_of_successes_up_to_where_it_began() -> None:
    """As many successes as it allows requests, and 20 at least."""
    limit = AdaptiveLimit(30)
    throttle(limit)
    assert limit.value == 24
    round_trip(limit)
    assert limit.value == 25
    for _ in range(100):
        round_trip(limit)
    assert limit.value == 30
    small = AdaptiveLimit(5)
    throttle(small)
    for _ in range(4):
        round_trip(small)
    assert small.value == 4
    round_trip(small)
    assert small.value == 5


def test_it_does_not_grow_where_it_is_not_reached() -> None:
    """Successes of a few requests do not show that more would succeed."""
    limit = AdaptiveLimit(100)
    throttle(limit)
    for _ in range(1000):
        begun = [limit.begin() for _ in range(10)]
        for one in begun:
            limit.end(one, Outcome.SUCCEEDED)
    assert limit.value == 80


@pytest.mark.parametrize(("outcome", "expected"), [(Outcome.FAILED, 24), (Outcome.ABANDONED, 25)])
def test_other_failures_pause_growth_and_never_cut(outcome: Outcome, expected: int) -> None:
    """After a 5xx or a time-out the successes are counted anew; a request that was given up counts as nothing."""
    limit = AdaptiveLimit(30)
    throttle(limit)
    for _ in range(10):
        round_trip(limit, outcome)
    assert limit.value == 24
    begun = fill(limit)
    for one in begun[:-1]:
        limit.end(one, Outcome.SUCCEEDED)
    limit.end(begun[-1], outcome)
    limit.end(limit.begin(), Outcome.SUCCEEDED)
    assert limit.value == expected
    assert limit.in_flight == 0


def test_retry_after_holds_requests_back() -> None:
    """For as long as the endpoint asks, the longest of several, and not for ever."""
    clock = Clock()
    limit = AdaptiveLimit(10, clock=clock)
    begun = fill(limit)
    limit.end(begun[0], Outcome.THROTTLED, retry_after_s=5.0)
    limit.end(begun[1], Outcome.THROTTLED, retry_after_s=2.0)
    for one in begun[2:]:
        limit.end(one, Outcome.SUCCEEDED)
    assert not limit.has_room()
    clock.now += 4.5
    assert limit.pause_s == pytest.approx(0.5)
    assert not limit.has_room()
    clock.now += 0.6
    assert limit.has_room()
    limit.end(limit.begin(), Outcome.THROTTLED, retry_after_s=1e6)
    assert limit.pause_s == pytest.approx(MAX_RETRY_AFTER_S)


class HiddenLimit:
    """An endpoint that takes so many requests at a time and refuses what comes on top; a tick is a round trip."""

    def __init__(self, limit: AdaptiveLimit, seed: int) -> None:
        self.limit = limit
        self.rng = random.Random(seed)
        self.num_refused = self.num_served = 0

    def run(self, allowed: int, num_ticks: int, failing: float = 0.0) -> list[int]:
        """The limit after each of the last half of the ticks, while the endpoint takes `allowed` requests."""
        seen = []
        for tick in range(num_ticks):
            requests = list(enumerate(fill(self.limit)))
            self.rng.shuffle(requests)
            for place, one in requests:
                if place >= allowed:
                    self.num_refused += 1
                    self.limit.end(one, Outcome.THROTTLED)
                else:
                    self.num_served += 1
                    self.limit.end(one, Outcome.FAILED if self.rng.random() < failing else Outcome.SUCCEEDED)
            if tick >= num_ticks // 2:
                seen.append(self.limit.value)
        return seen


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_a_hidden_limit_that_moves(seed: int) -> None:
    """Within 20 % of it, up and down; where it has settled, less than one request in fifty is refused."""
    server = HiddenLimit(AdaptiveLimit(256), seed)
    for allowed in (40, 100, 12, 60):
        assert all(0.79 * allowed <= value <= 1.2 * allowed for value in server.run(allowed, 400)), allowed
    server.num_refused = server.num_served = 0
    server.run(60, 1000)
    assert server.num_refused < 0.02 * server.num_served


def test_failures_of_the_server_leave_the_limit_where_it_is() -> None:
    """While a fifth of the requests fails, a limit of 50 neither shrinks nor grows."""
    server = HiddenLimit(AdaptiveLimit(256), seed=0)
    server.run(50, 200)
    before = server.limit.value
    assert set(server.run(50, 100, failing=0.2)) == {before}


async def turns(count: int = 5) -> None:
    """Let everything run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_queue_keeps_the_order_and_lets_retries_go_first() -> None:
    """Who came first is sent first; what was sent before goes before what was not."""

    async def scene() -> None:
        queue = RequestQueue(AdaptiveLimit(1))
        order: list[str] = []

        async def request(name: str, *, is_retry: bool = False) -> None:
            begun = await queue.begin(is_retry=is_retry)
            order.append(name)
            queue.end(begun, Outcome.SUCCEEDED)

        first = queue.begin_now()
        assert first is not None
        assert queue.begin_now() is None
        tasks = [asyncio.ensure_future(request(name)) for name in ("a", "b")]
        await turns()
        tasks.append(asyncio.ensure_future(request("again", is_retry=True)))
        await turns()
        queue.end(first, Outcome.SUCCEEDED)
        await asyncio.gather(*tasks)
        assert order == ["again", "a", "b"]
        assert queue.limit.in_flight == 0

    asyncio.run(scene())


def test_nobody_overtakes_who_waits() -> None:
    """A place that became free belongs to the one that waits for it, not to the one that comes at that moment."""

    async def scene() -> None:
        queue = RequestQueue(AdaptiveLimit(1))
        first = queue.begin_now()
        assert first is not None
        waiting = [asyncio.ensure_future(queue.begin()) for _ in range(2)]
        await turns()
        queue.end(first, Outcome.SUCCEEDED)
        assert queue.begin_now() is None
        queue.end(await waiting[0], Outcome.SUCCEEDED)
        assert queue.begin_now() is None
        queue.end(await waiting[1], Outcome.SUCCEEDED)
        assert queue.begin_now() is not None

    asyncio.run(scene())


@pytest.mark.parametrize("after_its_turn", [False, True])
def test_who_gives_up_takes_no_place(after_its_turn: bool) -> None:
    """Cancelled while it waits, or in the moment in which its turn comes: the next one goes."""

    async def scene() -> None:
        queue = RequestQueue(AdaptiveLimit(1))
        first = queue.begin_now()
        assert first is not None
        waiting = [asyncio.ensure_future(queue.begin()) for _ in range(2)]
        await turns()
        if after_its_turn:
            queue.end(first, Outcome.SUCCEEDED)
            waiting[0].cancel()
        else:
            waiting[0].cancel()
            queue.end(first, Outcome.SUCCEEDED)
        queue.end(await asyncio.wait_for(waiting[1], 5), Outcome.SUCCEEDED)
        assert waiting[0].cancelled()
        assert queue.limit.in_flight == 0

    asyncio.run(scene())


def test_who_waits_is_woken_when_the_endpoint_takes_requests_again() -> None:
    """Though no request is under way whose end would wake it."""

    async def scene() -> None:
        queue = RequestQueue(AdaptiveLimit(3))
        first = queue.begin_now()
        assert first is not None
        queue.end(first, Outcome.THROTTLED, retry_after_s=0.05)
        assert queue.begin_now() is None
        queue.end(await asyncio.wait_for(queue.begin(), 5), Outcome.SUCCEEDED)

    asyncio.run(scene())


def fail(circuit: Circuit, count: int = 1) -> None:
    """Requests, one after the other, that find the endpoint down."""
    for _ in range(count):
        assert circuit.allows()
        circuit.begin()
        circuit.end(Outcome.DOWN)


def test_failures_in_a_row_open_the_circuit() -> None:
    """Not one fewer; and any answer in between, even a refusal, begins the row anew."""
    circuit = Circuit(clock=Clock())
    for outcome in (Outcome.SUCCEEDED, Outcome.THROTTLED, Outcome.FAILED):
        fail(circuit, TRIPS_AFTER - 1)
        circuit.begin()
        circuit.end(outcome)
    fail(circuit, TRIPS_AFTER - 1)
    assert circuit.allows()
    fail(circuit)
    assert circuit.is_open
    assert not circuit.allows()


def test_one_request_tries_whether_it_is_back() -> None:
    """After the break one goes and the others wait for it; each failure doubles the break, up to the longest."""
    clock = Clock()
    circuit = Circuit(clock=clock)
    fail(circuit, TRIPS_AFTER)
    for break_s in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        assert circuit.wait_s == break_s == circuit.break_s
        clock.now += break_s
        assert circuit.allows()
        circuit.begin()
        assert not circuit.allows()
        circuit.end(Outcome.DOWN)
    clock.now += 30.0
    circuit.begin()
    circuit.end(Outcome.SUCCEEDED)
    assert circuit.allows()
    assert not circuit.is_open


def test_requests_that_were_under_way_do_not_lengthen_the_break() -> None:
    """A server that dies under 256 requests has failed once; a trial that is given up leaves its place to another."""
    clock = Clock()
    circuit = Circuit(clock=clock)
    for _ in range(256):
        circuit.begin()
    for _ in range(256):
        circuit.end(Outcome.DOWN)
    assert circuit.break_s == FIRST_BREAK_S
    clock.now += FIRST_BREAK_S
    circuit.begin()
    circuit.end(Outcome.ABANDONED)
    assert circuit.allows()


def test_who_waits_for_a_broken_circuit_goes_on_when_it_closes() -> None:
    """One request at a time until one succeeds, then all."""

    async def run() -> tuple[int, int]:
        clock = Clock()
        queue = RequestQueue(AdaptiveLimit(8), Circuit(clock=clock))
        begun = [await queue.begin() for _ in range(TRIPS_AFTER)]
        for one in begun:
            queue.end(one, Outcome.DOWN)
        assert queue.begin_now() is None
        waiting = [asyncio.ensure_future(queue.begin()) for _ in range(6)]
        await asyncio.sleep(0)
        assert queue.limit.in_flight == 0
        clock.now += FIRST_BREAK_S
        trial = queue.begin_now()
        assert trial is None, "those who waited come first"
        waiting.append(asyncio.ensure_future(queue.begin()))
        await asyncio.sleep(0)
        num_tried = queue.limit.in_flight
        queue.end(await waiting[0], Outcome.SUCCEEDED)
        await asyncio.gather(*waiting)
        return num_tried, queue.limit.in_flight

    assert asyncio.run(run()) == (1, 6)
