"""Draft and score: one expert writes ahead, and the others say what they think of what it wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from mope_bb.pcm.course import Course
from mope_bb.pcm.pacing import Move
from mope_bb.pcm.speculation import verify
from mope_bb.providers.pool import together
from mope_bb.types import END, Context, DraftStep, Piece, TokenDistribution, TokenStep


class Drafting:
    """The drafts of one answer."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._begun: tuple[Move, asyncio.Task[tuple[DraftStep, ...]]] | None = None

    @property
    def begun(self) -> Move | None:
        """The move whose draft is already being written."""
        return None if self._begun is None else self._begun[0]

    async def steps(self, move: Move, drafter: str, num_left: int) -> list[TokenStep]:
        """What is kept of a draft, and behind a rejected piece one from the difference of the distributions."""
        course = self._course
        draft = _testable(await self._take(drafter, move))
        path = [step.piece for step in draft]
        self._begin_next(move, drafter, draft, num_left - len(path))
        others = [name for name in course.plan.asked if name != drafter]
        asking = together([self._score(name, path[:-1]) for name in others])
        scores, judged = await course.with_judging(path[:-1], asking)
        said = {drafter: [step.distribution for step in draft], **dict(zip(others, scores, strict=True))}
        lists = [[said[name][position] for name in course.plan.asked] for position in range(len(draft))]
        if others:
            course.count(num_round_trips=1, num_scored=len(others) * len(draft))
        course.uses_drafts |= course.options.temperature > 0
        steps: list[TokenStep] = []
        shapes: list[Tensor] = []
        is_kept = True
        for step, merged in zip(draft, course.merge(lists, judged), strict=True):
            shapes.append(course.shape(merged.log_pi))
            verdict = verify(shapes[-1], merged.candidates, step, (course.uniform(), course.uniform()))
            steps.append(course.step(merged, shapes[-1], verdict.index, judged))
            is_kept = verdict.is_kept
            if not is_kept:
                break
        course.count(num_drafted=len(steps), num_accepted=len(steps) - (not is_kept))
        if not is_kept:
            await self.drop()
        course.go_on(steps, shapes)
        return steps

    async def drop(self) -> None:
        """What is being written is not wanted any more."""
        begun, self._begun = self._begun, None
        if begun is not None:
            _, drafting = begun
            drafting.cancel()
            await asyncio.gather(drafting, return_exceptions=True)

    async def _take(self, drafter: str, move: Move) -> tuple[DraftStep, ...]:
        begun, self._begun = self._begun, None
        self._course.count(num_round_trips=1)
        return await (begun[1] if begun else self._draft(drafter, self._course.context, move))

    def _begin_next(self, move: Move, drafter: str, draft: Sequence[DraftStep], num_left: int) -> None:
        """Have the next draft written while this one is scored."""
        num_next = min(move.num_ahead, num_left)
        if move.begins_next and num_next > 0 and draft[-1].index is not None and draft[-1].piece != END:
            following = replace(move, num_ahead=num_next)
            behind = self._course.context.extended(*(step.piece for step in draft))
            self._begun = following, asyncio.ensure_future(self._draft(drafter, behind, following))

    async def _draft(self, drafter: str, context: Context, move: Move) -> tuple[DraftStep, ...]:
        course = self._course
        # Counted at once: what is begun early and not used was generated all the same.
        course.count_generated(drafter, move.num_ahead)
        drafting = course.pool.draft(
            drafter,
            context,
            num_tokens=move.num_ahead,
            temperature=move.sharpness * course.options.temperature,
            seed=course.draft_seed(),
        )
        steps = await course.timed(drafter, "draft", drafting, len)
        course.count_generated(drafter, len(steps) - move.num_ahead)
        return steps

    async def _score(self, name: str, path: Sequence[Piece]) -> tuple[TokenDistribution, ...]:
        course = self._course
        return await course.timed(name, "score", course.pool.score(name, course.context, path), len)


def _testable(draft: Sequence[DraftStep]) -> Sequence[DraftStep]:
    """The draft up to the first piece that is not on its own list: what was written after it is of no use."""
    for position, step in enumerate(draft):
        if step.index is None:
            return draft[: position + 1]
    return draft
