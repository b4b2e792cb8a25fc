"""An answer with a form: some pieces are given by it, the others are drawn among those that fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from mope_bb.errors import ConstraintError, ContextLengthError, TopKError
from mope_bb.pcm.constraint import Constraint, forced_step
from mope_bb.pcm.course import Course
from mope_bb.pcm.fitting import Fitting
from mope_bb.pcm.merging import merge_fitting
from mope_bb.pcm.runner import PathJudgement
from mope_bb.types import END, Piece, TokenDistribution, TokenStep

_log = logging.getLogger(__name__)


class Formed:
    """The steps of one answer that must have a form."""

    def __init__(self, course: Course, constraint: Constraint) -> None:
        self._course = course
        self._form = Fitting(constraint, self._spell)
        self._was_heard = False
        self._held: list[TokenStep] = []

    @property
    def is_bound(self) -> bool:
        """The form forbids something."""
        return not self._form.constraint.is_free

    async def begin(self) -> None:
        """See `Fitting.begin`."""
        await self._form.begin(self._course.context.response, self._course.options.max_tokens)

    async def steps(self, num_left: int) -> list[TokenStep]:
        """The next steps, at least one and at most `num_left`."""
        course, form = self._course, self._form
        # What was drawn when the plan changed, or an expert failed, may not have been told.
        form.follow(course.context.response)
        num_left -= len(self._held)
        given = self._give((await form.given(num_left))[:num_left])
        self._held += given
        # A conversation that no expert can read must not be answered by the form alone: until one has said something,
        # what is given is held back.
        if len(given) == num_left or (given and (self._was_heard or given[-1].piece == END)):
            return self._let_go([])
        try:
            steps, shapes = await self._draw(num_left - len(given))
        except ContextLengthError:
            # Nobody is needed to end the answer.
            if not self._was_heard or not (end := await form.end()):
                raise
            return self._let_go(self._give(end[:num_left]))
        self._was_heard = True
        if steps:
            course.go_on(steps, shapes)
        return self._let_go(steps or await self._go_alone())

    async def _go_alone(self) -> list[TokenStep]:
        """The next piece of what completes the answer, as where an expert wants to end it; none was heard to say it."""
        end = await self._form.end()
        if not end:
            raise ConstraintError("no expert says anything that fits the form of the answer")
        if not self._course.effort.num_unheard:
            _log.warning(
                "no expert lists anything that fits the form of the answer, which goes on by the form alone there; "
                "a larger `top_k` may help"
            )
        self._course.count(num_unheard=1)
        return self._give(end[:1])

    def _let_go(self, steps: list[TokenStep]) -> list[TokenStep]:
        """`steps` behind those that were held back."""
        held, self._held = self._held, []
        return held + steps

    def _give(self, pieces: Sequence[Piece]) -> list[TokenStep]:
        steps = [forced_step(piece, self._course.policy_version) for piece in pieces]
        for piece in pieces:
            self._form.advance(piece)
        self._course.go_on(steps)
        return steps

    async def _draw(self, num_left: int) -> tuple[list[TokenStep], list[Tensor]]:
        """Steps and log pi of each; none where no expert says anything that fits."""
        course, form = self._course, self._form
        move = course.pace.choose(num_left=num_left, num_context=course.num_context)
        lists, expected, judged = await course.ask_and_judge(move.num_ahead)
        steps: list[TokenStep] = []
        shapes: list[Tensor] = []
        for position, said in enumerate(lists):
            here = PathJudgement(judged.head_scores[position : position + 1], judged.gate, judged.policy_version)
            drawn = await self._draw_one(said, here, num_left - len(steps))
            if drawn is None and not steps and (named := await self._ask_named()):
                drawn = await self._draw_one(named, here, num_left)
            if drawn is None:
                break
            steps.append(drawn[0])
            shapes.append(drawn[1])
            goes_on = position < len(expected) and steps[-1].piece == expected[position] and self.is_bound
            if not goes_on or await form.given(num_left - len(steps)):
                break
        return steps, shapes

    async def _draw_one(
        self, said: Sequence[TokenDistribution], judged: PathJudgement, num_left: int
    ) -> tuple[TokenStep, Tensor] | None:
        course, form = self._course, self._form
        lists, fits = await form.read(said), form.constraint.mask
        merged = merge_fitting(course.plan, lists, judged.head_scores[0], judged.gate, fits)
        drawn = merged and await form.draw(merged, course.shape, course.uniform, num_left)
        return (course.step(merged, drawn[1], drawn[0], judged), drawn[1]) if merged and drawn else None

    async def _ask_named(self) -> list[TokenDistribution]:
        """What all say of pieces that fit, where none of these is on any list; nothing where one cannot be asked."""
        course = self._course
        names = course.plan.asked
        if not course.pool.can_say_more(names):
            return []
        pieces = self._form.constraint.allowed_among(await course.pool.vocabulary(names[0]))
        course.count(num_round_trips=1, num_generated=len(names))
        try:
            return await course.pool.ask_among(names, course.context, pieces)
        except TopKError:
            return []

    async def _spell(self, data: bytes) -> tuple[Piece, ...]:
        return await self._course.pool.spell(self._course.plan.asked[0], data)
