"""An answer as it is drawn: tokens, or typed events, while it runs; the whole afterwards."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

from mope_bb.errors import ContextLengthError
from mope_bb.events import Event, Finished, TextDelta, ToolCallDelta
from mope_bb.pcm.decode import OpenAnswer
from mope_bb.pcm.merging import Plan
from mope_bb.preferences import PreferenceLike
from mope_bb.text import TextAssembler
from mope_bb.tools import CallReader, Form
from mope_bb.types import Answer, Effort, FinishReason, SamplingOptions, Token, TokenStep


@dataclass(frozen=True, slots=True)
class Opened:
    """An answer whose experts are open."""

    answer: OpenAnswer
    num_prompt_tokens: int
    dropped: tuple[str, ...] = ()
    """Experts that failed before it began."""


class AnswerStream:
    """Tokens as they are drawn: `async for token in stream`; afterwards `stream.answer` is the whole.

    Leaving the loop early, or cancelling the task, cancels the requests that are under way.
    """

    def __init__(
        self,
        open_answer: Callable[[Plan], Awaitable[Opened]],
        *,
        options: SamplingOptions,
        seed: int,
        plan: Plan,
        make_plan: Callable[[PreferenceLike], Plan],
        form: Form | None = None,
    ) -> None:
        """`make_plan` gives the plan for another preference, for `steer`."""
        self._open_answer = open_answer
        self._opened: Opened | None = None
        self._seed = seed
        self._plan = plan
        self._make_plan = make_plan
        self._form = form or Form()
        self._options = options
        self._calls = CallReader()
        self._steps: list[TokenStep] = []
        self._texts: list[str] = []
        self._finish_reason: FinishReason | None = None
        self._tokens = self._run()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._tokens

    async def events(self) -> AsyncGenerator[Event, None]:
        """The same as typed events, with text and tool calls apart: iterate this or the stream itself, not both."""
        held, is_call = "", self._form.begins_call("")
        async for token in self._tokens:
            held += token.text
            is_call = self._form.begins_call(held) if is_call is None else is_call
            if is_call:
                *ended, part = self._calls.feed(held)
                for one in ended:
                    # What the token says of the whole answer is told once, by the last event of it.
                    yield ToolCallDelta(
                        one.index, one.call_id, one.name, one.arguments, replace(token, finish_reason=None)
                    )
                yield ToolCallDelta(part.index, part.call_id, part.name, part.arguments, token)
            elif is_call is None and token.finish_reason is None:
                yield TextDelta("", token)
                continue
            else:
                yield TextDelta(held, token)
            held = ""
        yield Finished(self.answer)

    def steer(self, preference: PreferenceLike) -> Plan:
        """Go on with another preference, from the next token on. Raises PreferenceError."""
        self._plan = self._make_plan(preference)
        if self._opened is not None:
            self._opened.answer.go_on_with(self._plan)
        return self._plan

    @property
    def plan(self) -> Plan:
        """Who is asked, with which weights."""
        return self._plan

    @property
    def text(self) -> str:
        """The text so far; of tool calls their JSON."""
        return "".join(self._texts)

    @property
    def answer(self) -> Answer:
        """The answer as far as it came; `finish_reason` is "length" for one that was left early."""
        opened = None if self._opened is None else self._opened.answer
        is_called = self._finish_reason == "tool_calls"
        return Answer(
            "" if is_called else self.text,
            tuple(self._steps),
            self._finish_reason or "length",
            None if opened is not None and opened.uses_drafts else self._seed,
            self._plan.rule.name,
            Effort() if opened is None else opened.effort,
            () if self._opened is None else (*self._opened.dropped, *self._opened.answer.dropped),
            self._calls.read(self.text) if is_called else (),
            0 if self._opened is None else self._opened.num_prompt_tokens,
        )

    async def aclose(self) -> None:
        """End the answer here."""
        await self._tokens.aclose()

    async def _run(self) -> AsyncGenerator[Token, None]:
        options, form = self._options, self._form
        # In the middle of a form a stop string would leave half of it.
        assembler = TextAssembler(() if form.is_call_required or form.schema is not None else options.stop)
        self._opened = await self._open_answer(self._plan)
        steps = aiter(self._opened.answer)
        try:
            async for step in steps:
                if not self._steps and form.tools and step.piece.data[:1] == b"{":
                    assembler = TextAssembler()
                self._steps.append(step)
                text = assembler.feed(step.piece)
                reason: FinishReason | None = None
                if assembler.is_stopped or len(self._steps) == options.max_tokens:
                    # What was held back as a possible stop string is text after all.
                    text += assembler.flush()
                    reason = self._reason(self.text + text, is_stopped=assembler.is_stopped)
                yield self._told(Token(text, step, reason))
                if reason is not None:
                    return
        except ContextLengthError:
            # If the prompt did fit, the answer has grown to the end of an expert's context.
            if all(step.is_forced for step in self._steps):
                raise
            yield self._told(Token(assembler.flush(), self._steps[-1], "length"))
        finally:
            await steps.aclose()

    def _reason(self, text: str, *, is_stopped: bool) -> FinishReason:
        if not is_stopped:
            return "length"
        return "tool_calls" if self._form.begins_call(text) else "stop"

    def _told(self, token: Token) -> Token:
        self._texts.append(token.text)
        self._finish_reason = token.finish_reason
        return token
