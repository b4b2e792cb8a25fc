"""One open answer, token by token. Chat, server, evaluation and rollouts all come through here.

          ask the experts  |  score with the PCM          (at the same time)
          merge -> shape -> draw

Experts are asked ahead where that is faster (`pacing`). That changes how often they are asked, and never the
distribution that is sampled: a list that is known early is used only if the answer has gone the way it was asked for,
and a piece that an expert drafted is tested against the merged distribution (`speculation`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from torch import Tensor

from mope_bb.errors import ContextLengthError, ProviderError
from mope_bb.pcm import expert_first
from mope_bb.pcm.constraint import Constraint
from mope_bb.pcm.course import REFUSALS, Course
from mope_bb.pcm.drafting import Drafting
from mope_bb.pcm.formed import Formed
from mope_bb.pcm.merging import Plan
from mope_bb.pcm.opening import drop_failed, open_experts
from mope_bb.pcm.pacing import Move, Pace
from mope_bb.pcm.runner import Scorer
from mope_bb.pcm.sampling import draw
from mope_bb.providers.pool import ExpertPool
from mope_bb.types import END, Context, Effort, SamplingOptions, TokenStep

T = TypeVar("T")


class OpenAnswer:
    """An answer that is being written: an async iterator of its steps, made by `decode`."""

    def __init__(
        self,
        context: Context,
        plan: Plan,
        pool: ExpertPool,
        scorer: Scorer,
        options: SamplingOptions,
        *,
        seed: int,
        pace: Pace | None = None,
        is_repeatable: bool = False,
        drops_failed: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        """The steps of one answer, END included, at most `options.max_tokens` pieces: `async for step in decode(...)`.

        `pace` is what the answers of one pool have measured together. `is_repeatable` keeps out what endpoints draw by
        themselves: there is then one uniform number per step from a generator of this answer's own, and equal seeds
        and equal distributions give equal answers. `drops_failed`: an expert whose endpoint is down, or keeps failing,
        is left out from there on; the base of a rule that needs one and the last expert are not. `constraint` is the
        form that the answer must have, as far as `max_tokens` allows. Raises ConfigError here; ProviderError,
        BudgetError, AlignmentError, ConstraintError, PcmError on the way.
        """
        self._course = Course(context, plan, pool, scorer, options, seed=seed, pace=pace or Pace())
        self._drafting = Drafting(self._course)
        self._formed = None if constraint is None else Formed(self._course, constraint)
        self._is_repeatable = is_repeatable
        self._drops_failed = drops_failed
        self._unlisted: tuple[str, ...] = ()
        self._was_bound = False
        self._may_be_cached = True
        self._next_plan: Plan | None = None
        self.dropped: tuple[str, ...] = ()
        """Experts that failed and were left out."""

    def __aiter__(self) -> AsyncGenerator[TokenStep, None]:
        return self._steps()

    @property
    def plan(self) -> Plan:
        """Who is asked: from an expert's failure on without it, where that is allowed."""
        return self._course.plan

    @property
    def effort(self) -> Effort:
        """What the experts did so far."""
        return self._course.effort

    @property
    def uses_drafts(self) -> bool:
        """Whether chance at an endpoint took part: then the seed alone does not give this answer again."""
        return self._course.uses_drafts

    def go_on_with(self, plan: Plan) -> None:
        """From the next step on, `plan` says who is asked."""
        self._next_plan = plan

    async def _steps(self) -> AsyncGenerator[TokenStep, None]:
        course = self._course
        await self._going_on(self._begin)
        if self._formed is not None:
            await self._formed.begin()
        num_left = course.options.max_tokens
        course.shared_pace.num_open += 1
        try:
            while num_left > 0:
                if self._next_plan is not None:
                    await self._change_plan(self._next_plan)
                steps = await self._going_on(partial(self._block, num_left))
                for number, step in enumerate(steps, 1):
                    num_left -= 1
                    yield step
                    if self._next_plan is not None and number < len(steps):
                        # What was drawn for the old plan and is not yet said is taken back.
                        course.take_back(len(steps) - number)
                        break
                if step.piece == END:
                    return
        finally:
            course.shared_pace.num_open -= 1
            await self._drafting.drop()

    async def _begin(self) -> None:
        """Open the experts of the plan and make ready what they all begin with."""
        course, plan, is_bound = self._course, self._course.plan, self._is_bound
        await open_experts(course.pool, plan, waits=not self._drops_failed)
        self._unlisted = tuple(name for name in plan.asked if not course.pool.seat(name).gives_lists)
        if self._unlisted:
            expert_first.check_plan(plan, self._unlisted, course.options, has_form=self._formed is not None)
        await course.begin(is_repeatable=self._is_repeatable, is_bound=is_bound)
        self._was_bound = is_bound

    async def _going_on(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work()` gives; where an expert fails that may be dropped, what it gives without that expert."""
        while True:
            try:
                return await work()
            except ProviderError as error:
                self._course.plan = drop_failed(self._course.plan, error, is_allowed=self._drops_failed)
                self.dropped = (*self.dropped, error.expert or "")
                await self._drafting.drop()
                await self._going_on(self._begin)

    async def _change_plan(self, plan: Plan) -> None:
        self._next_plan = None
        self._course.plan = plan
        await self._drafting.drop()
        await self._going_on(self._begin)

    @property
    def _is_bound(self) -> bool:
        """There is a form, and it forbids something."""
        return self._formed is not None and self._formed.is_bound

    async def _block(self, num_left: int) -> list[TokenStep]:
        """The next steps, at least one and at most `num_left`."""
        course = self._course
        if self._formed is not None and self._formed.is_bound:
            return await self._formed.steps(num_left)
        if self._was_bound:  # the form has turned out to be any text
            await self._begin()
        if self._unlisted:
            return [await expert_first.draw_step(course, self._unlisted)]
        if self._may_be_cached and (lists := await course.pool.recall(course.plan.asked, course.context)) is not None:
            for name, distribution in zip(course.plan.asked, lists, strict=True):
                course.known.learn_one(name, distribution)
            return await self._look_ahead(Move("lockstep"))
        # Beyond what an earlier answer has left, nothing is in the cache.
        self._may_be_cached = False
        # What is begun is always used: a choice that knows how long a draft took would know something of what is in it.
        move = self._drafting.begun or course.pace.choose(num_left=num_left, num_context=course.num_context)
        if move.drafter is not None:
            try:
                return await self._drafting.steps(move, move.drafter, num_left)
            except REFUSALS as error:
                await self._drafting.drop()
                if not isinstance(error, ContextLengthError):  # a draft may be too long where one token is not
                    name = error.expert or move.drafter
                    course.shared_pace.give_up(name, "draft" if name == move.drafter else "score", error.message)
                move = Move("lockstep")
        return await self._look_ahead(move)

    async def _look_ahead(self, move: Move) -> list[TokenStep]:
        """All are asked for the next positions, in lockstep for one; pieces are drawn while all of them are known."""
        course = self._course
        lists, expected, judged = await course.ask_and_judge(move.num_ahead)
        steps: list[TokenStep] = []
        shapes: list[Tensor] = []
        for position, merged in enumerate(course.merge(lists, judged)):
            shapes.append(course.shape(merged.log_pi))
            steps.append(course.step(merged, shapes[-1], draw(shapes[-1], course.uniform()), judged))
            if position == len(expected) or steps[-1].piece != expected[position]:
                break
        course.go_on(steps, shapes)
        return steps


decode = OpenAnswer
"""The one code path: `async for step in decode(...)`."""
