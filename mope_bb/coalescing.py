"""Equal questions at one time are asked once; others that wait together travel together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import partial
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class SingleFlight(Generic[A]):
    """Who asks what another is asking already waits for that answer. Only for questions that have one answer.

    Never for what is sampled: there a second answer is another draw.
    """

    def __init__(self) -> None:
        self._following: dict[Hashable, list[asyncio.Future[A | Exception | None]]] = {}

    async def ask(self, question: Hashable, call: Callable[[], Awaitable[A]]) -> A:
        """The answer to `question`, by `call()` where nobody asks it yet. Raises what the call raised."""
        while (following := self._following.get(question)) is not None:
            told: asyncio.Future[A | Exception | None] = asyncio.get_running_loop().create_future()
            following.append(told)
            answer = await told
            if isinstance(answer, Exception):
                raise answer
            if answer is not None:
                return answer
            # Who asked was cancelled: the next one asks in its place.
        following = self._following[question] = []
        found: A | Exception | None = None
        try:
            found = await call()
            return found
        except Exception as error:
            found = error
            raise
        finally:
            del self._following[question]
            for one in following:
                if not one.done():
                    one.set_result(found)


class Coalescer(Generic[Q, A]):
    """Gathers single questions into lists: what comes up while lists are under way goes with the next one.

    A lone question is not delayed by more than one turn of the event loop.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Q]], Awaitable[Sequence[A | Exception]]],
        *,
        max_size: int,
        max_running: int | None,
    ) -> None:
        """`call` answers a list in its order, an exception in the place of an answer where only that one failed.

        `max_running` is how many lists may be under way at a time; None: any number.
        """
        self._call = call
        self._max_size = max_size
        self._max_running = max_running
        self._waiting: deque[tuple[Q, asyncio.Future[A]]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def ask(self, question: Q) -> A:
        """The answer to `question`. Raises what the call raised; a list that nobody waits for any more is cancelled."""
        if self._max_size == 1 and self._max_running is None:
            # Nothing to gather and nothing to wait for.
            (answer,) = await self._call([question])
            if isinstance(answer, Exception):
                raise answer
            return answer
        loop = asyncio.get_running_loop()
        future: asyncio.Future[A] = loop.create_future()
        self._waiting.append((question, future))
        if len(self._waiting) == 1:
            # One turn later, so that all who ask in this turn are together.
            loop.call_soon(self._begin)
        return await future

    async def aclose(self) -> None:
        """Cancel what is under way."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _begin(self) -> None:
        while self._waiting and (self._max_running is None or len(self._running) < self._max_running):
            chosen: list[tuple[Q, asyncio.Future[A]]] = []
            while self._waiting and len(chosen) < self._max_size:
                question, future = self._waiting.popleft()
                if not future.done():
                    chosen.append((question, future))
            if chosen:
                task = asyncio.ensure_future(self._serve(chosen))
                self._running.add(task)
                futures = [future for _, future in chosen]
                for future in futures:
                    future.add_done_callback(partial(self._abandon, task, futures))

    def _abandon(self, task: asyncio.Task[None], futures: Sequence[asyncio.Future[A]], _: object) -> None:
        if all(future.cancelled() for future in futures):
            task.cancel()

    async def _serve(self, chosen: Sequence[tuple[Q, asyncio.Future[A]]]) -> None:
        try:
            answers = await self._call([question for question, _ in chosen])
            for (_, future), answer in zip(chosen, answers, strict=True):
                if not future.done():
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        except Exception as error:  # noqa: BLE001  # handed to the callers
            for _, future in chosen:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._running.discard(asyncio.current_task())
            for _, future in chosen:
                future.cancel()
            self._begin()
