"""Questions that travel together: order, sizes, failures, and lists that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from mope_bb.coalescing import Coalescer, SingleFlight


class Server:
    """Doubles numbers, list by list, each when it is told to."""

    def __init__(self) -> None:
        self.lists: list[list[int]] = []
        self.go = asyncio.Event()
        self.num_cancelled = 0

    async def answer(self, questions: Sequence[int]) -> list[int | Exception]:
        self.lists.append(list(questions))
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if 99 in questions:
            raise ConnectionError("the whole list")
        return [ValueError(str(one)) if one < 0 else 2 * one for one in questions]


async def turns(count: int = 5) -> None:
    """Let everything run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_those_who_ask_together_travel_together() -> None:
    """One list per turn; while it is under way the next one gathers, up to its size; answers find who asked."""

    async def scene() -> tuple[list[list[int]], list[int]]:
        server = Server()
        desk: Coalescer[int, int] = Coalescer(server.answer, max_size=3, max_running=1)
        first = [asyncio.ensure_future(desk.ask(one)) for one in (1, 2)]
        await turns()
        later = [asyncio.ensure_future(desk.ask(one)) for one in (3, 4, 5, 6)]
        await turns()
        assert server.lists == [[1, 2]]
        server.go.set()
        return server.lists, await asyncio.gather(*first, *later)

    lists, answers = asyncio.run(scene())
    assert lists == [[1, 2], [3, 4, 5], [6]]
    assert answers == [2, 4, 6, 8, 10, 12]


def test_one_failure_costs_one_question() -> None:
    """An exception in an answer's place is raised there only; a call that fails is raised everywhere."""

    async def scene() -> list[object]:
        server = Server()
        server.go.set()
        desk: Coalescer[int, int] = Coalescer(server.answer, max_size=2, max_running=None)
        return list(await asyncio.gather(*map(desk.ask, (1, -1, 99, 2, 3)), return_exceptions=True))

    one, bad, lost, also, three = asyncio.run(scene())
    assert (one, three) == (2, 6)
    assert isinstance(bad, ValueError)
    assert isinstance(lost, ConnectionError)
    assert isinstance(also, ConnectionError)


def test_without_lists_each_question_goes_alone() -> None:
    """At once, with its own failure; who gives up cancels the call."""

    async def scene() -> Server:
        server = Server()
        desk: Coalescer[int, int] = Coalescer(server.answer, max_size=1, max_running=None)
        asked = [asyncio.ensure_future(desk.ask(one)) for one in (1, -2, 99, 4)]
        await asyncio.sleep(0)
        assert server.lists == [[1], [-2], [99], [4]]
        asked[3].cancel()
        server.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in found] == [int, ValueError, ConnectionError, asyncio.CancelledError]
        return server

    assert asyncio.run(scene()).num_cancelled == 1


def test_a_list_that_nobody_waits_for_is_cancelled() -> None:
    """Not before the last of its askers has gone; one who went before it left is not in it."""

    async def scene() -> Server:
        server = Server()
        desk: Coalescer[int, int] = Coalescer(server.answer, max_size=4, max_running=1)
        asked = [asyncio.ensure_future(desk.ask(one)) for one in (1, 2, 3)]
        asked[2].cancel()
        await turns()
        asked[0].cancel()
        await turns()
        assert server.num_cancelled == 0
        asked[1].cancel()
        await turns()
        await desk.aclose()
        return server

    server = asyncio.run(scene())
    assert (server.lists, server.num_cancelled) == ([[1, 2]], 1)


def test_closing_ends_everything() -> None:
    """Those who wait are cancelled, not left waiting."""

    async def scene() -> None:
        server = Server()
        desk: Coalescer[int, int] = Coalescer(server.answer, max_size=1, max_running=1)
        asked = asyncio.ensure_future(desk.ask(1))
        await turns()
        await desk.aclose()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(scene())


class Counted:
    """Answers "yes" when it is told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> str:
        self.num_asked += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return "yes"


def test_equal_questions_at_one_time_are_asked_once() -> None:
    """Others are asked on their own, and so is the same one afterwards: nothing is remembered here."""

    async def run() -> None:
        flight, call, other = SingleFlight[str](), Counted(), Counted()
        asked = [asyncio.ensure_future(flight.ask("one", call)) for _ in range(5)]
        asked.append(asyncio.ensure_future(flight.ask("two", other)))
        await turns()
        assert (call.num_asked, other.num_asked) == (1, 1)
        call.go.set()
        other.go.set()
        assert await asyncio.gather(*asked) == ["yes"] * 6
        assert await flight.ask("one", call) == "yes"
        assert call.num_asked == 2

    asyncio.run(run())


def test_a_failure_is_everyones() -> None:
    """All who waited for the same answer get the error, and the next one asks anew."""

    async def run() -> None:
        flight, call = SingleFlight[str](), Counted()
        call.error = ConnectionError("gone")
        asked = [asyncio.ensure_future(flight.ask("one", call)) for _ in range(3)]
        await turns()
        call.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert found == [call.error] * 3
        call.error = None
        assert await flight.ask("one", call) == "yes"

    asyncio.run(run())


def test_who_leaves_costs_the_others_nothing() -> None:
    """A follower leaves alone; when the one who asks is cancelled, one of the others asks in its place."""

    async def run() -> None:
        flight, call = SingleFlight[str](), Counted()
        asked = [asyncio.ensure_future(flight.ask("one", call)) for _ in range(4)]
        await turns()
        asked[2].cancel()
        await turns()
        assert call.num_asked == 1
        asked[0].cancel()
        await turns()
        assert call.num_asked == 2
        call.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in found] == [True, False, True, False]
        assert (found[1], found[3]) == ("yes", "yes")

    asyncio.run(run())
