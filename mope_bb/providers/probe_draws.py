"""What a live endpoint does that is asked without logprobs: the cells of `mope-bb doctor` where lists have none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from mope_bb.errors import AlignmentError
from mope_bb.providers.drawing import DrawAsk, is_lost
from mope_bb.providers.endpoint import WireExpert
from mope_bb.providers.findings import ExpertReport
from mope_bb.types import END, Context, Piece

DRAWS: Final = 5
"""From each question, at most."""
MEANING: Final = (
    "It takes part in chat under the linear rule, at temperature and top_p 1; training and evaluation refuse it."
)
SAME: Final = (
    "At temperature 1 it drew the same token each time. Where a server does not sample, answers are not those of the "
    'mixture: `transformers serve` needs provider = "transformers".'
)
NOT_CONTINUED: Final = (
    "Name the `provider` that serves this address, or use text completions of this server: without a begun answer that "
    "goes on it cannot be an expert."
)


class DrawProbe:
    """The checks of one endpoint, after it has answered once."""

    def __init__(self, expert: WireExpert, questions: Sequence[Context], report: ExpertReport) -> None:
        self._expert = expert
        self._questions = questions
        self._report = report

    def checks(self) -> Sequence[tuple[str, Callable[[], Awaitable[None]]]]:
        """Cells and what finds them out."""
        return (("logprobs", self._draws), ("prefill", self._prefill), ("latency", self._latency))

    async def _draws(self) -> None:
        if await self._varies():
            self._report.add("logprobs", "ok", "draws only, no logprobs (chat, linear rule)", MEANING)
        else:
            self._report.add("logprobs", "warning", "draws only, always the same", SAME)

    async def _varies(self) -> bool:
        lost: AlignmentError | None = None
        can_tell = False
        for question in self._questions:
            drawn: set[Piece | str] = set()
            for _ in range(DRAWS):
                reply = await self._expert.draw(question)
                try:
                    drawn.add(await self._expert.read_draw(reply))
                    can_tell = True
                except AlignmentError as error:
                    if not is_lost(reply.text or ""):
                        raise
                    # It is a draw like others; where there are no others nothing can be drawn here.
                    lost = error
                    drawn.add(reply.text or "")
                if len(drawn) > 1:
                    return True
        if lost is not None and not can_tell:
            raise lost
        return False

    async def _prefill(self) -> None:
        if self._expert.capabilities.prefill == "none":
            self._report.add("prefill", "error", "none", NOT_CONTINUED)
            return
        for question in self._questions:
            first, both = [await self._expert.draw(question, DrawAsk(number, temperature=0.0)) for number in (1, 2)]
            try:
                piece = await self._expert.read_draw(first)
            except AlignmentError:
                continue
            if piece == END:
                continue
            second = await self._expert.draw(question.extended(piece), DrawAsk(temperature=0.0))
            begun, went_on = first.text or "", second.text or ""
            if begun + went_on == both.text:
                self._report.add("prefill", "ok", "honoured")
            else:
                what = "ignored" if went_on == begun else "not honoured"
                self._report.add("prefill", "error", what, f"A begun answer is not continued. {NOT_CONTINUED}")
            return
        self._report.add("prefill", "unknown", "no token to continue")

    async def _latency(self) -> None:
        seconds = []
        for _ in range(DRAWS):
            started = time.perf_counter()
            await self._expert.draw(self._questions[0])
            seconds.append(time.perf_counter() - started)
        self._report.add("latency", "ok", f"{1000 * statistics.median(seconds):.0f} ms a token")
