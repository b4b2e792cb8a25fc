"""A draft that is begun before the one before it is tested: it is used, or cancelled, and never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from mope_bb.errors import ProviderError, RequestError, ServerError
from mope_bb.pcm.decode import OpenAnswer, decode
from mope_bb.pcm.pacing import Pace
from mope_bb.pcm.runner import UserWeights
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import Context, DraftStep, Piece, SamplingOptions, TokenDistribution
from tests.speculation.experts import Array, KnownExpert, known_pool, make_tables
from tests.speculation.measure import QUESTION, Mode, RandomPace, Setup, settings, steered

MODE = Mode(settings("draft", 2), begins_next=True)
PLAN = Setup("linear").plan


class Watched(KnownExpert):
    """Hangs, and refuses, as it is told; counts its drafts."""

    def __init__(self, name: str, table: Array) -> None:
        super().__init__(name, table)
        self.may_go_on = asyncio.Event()
        """Whether a draft is given that does not begin at the start of the answer."""
        self.may_go_on.set()
        self.refused: dict[str, type[ProviderError]] = {}
        """How such a "draft" or "score" is refused."""
        self.num_drafts = self.num_open = 0

    async def draft(
        self, context: Context, *, top_k: int, num_tokens: int, temperature: float = 1.0, seed: int | None = None
    ) -> tuple[DraftStep, ...]:
        self.num_drafts += 1
        self.num_open += 1
        try:
            if context.response:
                await self.may_go_on.wait()
        finally:
            self.num_open -= 1
        self._refuse("draft", context)
        return await super().draft(context, top_k=top_k, num_tokens=num_tokens, temperature=temperature, seed=seed)

    async def score(self, context: Context, draft: Sequence[Piece], *, top_k: int) -> tuple[TokenDistribution, ...]:
        self._refuse("score", context)
        return await super().score(context, draft, top_k=top_k)

    def _refuse(self, request: str, context: Context) -> None:
        if context.response and request in self.refused:
            raise self.refused[request]("it does not go on", expert=self.name)


@dataclass
class Desk:
    """Three experts that always agree, on a list that leaves nothing out: every draft is kept, and none ends."""

    pool: ExpertPool
    experts: dict[str, Watched]
    pace: Pace = field(default_factory=lambda: RandomPace(MODE))

    def open(self, max_tokens: int) -> OpenAnswer:
        """An answer."""
        options = SamplingOptions(max_tokens=max_tokens)
        return decode(QUESTION, PLAN, self.pool, UserWeights(), options, seed=0, pace=self.pace)

    def total(self, count: Callable[[Watched], int]) -> int:
        """Over the experts."""
        return sum(map(count, self.experts.values()))


@asynccontextmanager
async def open_desk() -> AsyncIterator[Desk]:
    """A desk; at its end no task and no draft may be left."""
    table = make_tables()["red"]
    table[:, 3:] = 1e-300  # three pieces are all that is ever said: the list is whole, and END is not on it
    table /= table.sum(axis=1, keepdims=True)
    experts = [Watched(name, table) for name in PLAN.asked]
    with steered():
        async with known_pool(experts) as pool:
            desk = Desk(pool, {expert.name: expert for expert in experts})
            yield desk
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert desk.total(lambda expert: expert.num_open) == 0


def on_a_desk(play: Callable[[Desk], Coroutine[None, None, None]]) -> None:
    """Run `play`."""

    async def run() -> None:
        async with open_desk() as desk:
            await play(desk)

    asyncio.run(run())


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6])
def test_each_draft_is_used(max_tokens: int) -> None:
    """Drafts follow each other without a gap or an overlap, and none goes beyond the end."""

    async def play(desk: Desk) -> None:
        answer = desk.open(max_tokens)
        steps = [step async for step in answer]
        assert len(steps) == max_tokens
        assert desk.total(lambda expert: expert.num_drafts) == (max_tokens + 1) // 2
        assert answer.effort.num_generated == answer.effort.num_accepted == max_tokens

    on_a_desk(play)


def test_leaving_cancels_the_begun_draft() -> None:
    """A reader who closes the answer after its first piece leaves no draft behind."""

    async def play(desk: Desk) -> None:
        for expert in desk.experts.values():
            expert.may_go_on.clear()
        steps = aiter(desk.open(8))
        await anext(steps)
        assert desk.total(lambda expert: expert.num_open) == 1
        await steps.aclose()
        assert desk.total(lambda expert: expert.num_open) == 0

    on_a_desk(play)


def test_cancelling_cancels_the_begun_draft() -> None:
    """So does a task that is cancelled while it waits for the draft."""

    async def play(desk: Desk) -> None:
        for expert in desk.experts.values():
            expert.may_go_on.clear()
        has_begun = asyncio.Event()

        async def read() -> None:
            async for _ in desk.open(8):
                has_begun.set()

        reading = asyncio.create_task(read())
        await has_begun.wait()
        assert desk.total(lambda expert: expert.num_open) == 1
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert desk.total(lambda expert: expert.num_open) == 0

    on_a_desk(play)


def test_failing_expert_cancels_the_begun_draft() -> None:
    """An expert that fails to score ends the answer, and the draft that was begun meanwhile."""

    async def play(desk: Desk) -> None:
        for expert in desk.experts.values():
            expert.refused = {"score": ServerError}
        with pytest.raises(ServerError):
            async for _ in desk.open(8):
                pass
        assert desk.total(lambda expert: expert.num_drafts) == 3  # the first, the second, and the one begun meanwhile

    on_a_desk(play)


def test_refused_draft(caplog: pytest.LogCaptureFixture) -> None:
    """Where drafts are refused the answer goes on in lockstep, and such an expert is not asked for a draft again."""

    async def play(desk: Desk) -> None:
        for expert in desk.experts.values():
            expert.refused = {"draft": RequestError}
        assert len([step async for step in desk.open(8)]) == 8
        assert not any(desk.pace.can(name, "draft") for name in desk.experts)
        assert all(desk.pace.can(name, "score") for name in desk.experts)
        assert len(caplog.records) == 3
        asked = desk.total(lambda expert: expert.num_drafts)
        assert len([step async for step in desk.open(8)]) == 8
        assert desk.total(lambda expert: expert.num_drafts) == asked

    on_a_desk(play)


def test_refused_score(caplog: pytest.LogCaptureFixture) -> None:
    """Who refuses to score may still draft, for the others to score."""

    async def play(desk: Desk) -> None:
        desk.experts["green"].refused = {"score": RequestError}
        for _ in range(10):
            assert len([step async for step in desk.open(8)]) == 8
        assert not desk.pace.can("green", "score")
        assert all(desk.pace.can(name, "draft") for name in desk.experts)
        assert len(caplog.records) == 1
        before = {name: expert.num_drafts for name, expert in desk.experts.items()}
        assert len([step async for step in desk.open(8)]) == 8
        after = {name: expert.num_drafts for name, expert in desk.experts.items()}
        assert after == before | {"green": before["green"] + 4}

    on_a_desk(play)
