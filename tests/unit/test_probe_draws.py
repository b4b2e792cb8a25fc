"""What the doctor makes of draws without logprobs."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from mope_bb.errors import AlignmentError
from mope_bb.providers.drawing import ONE_DRAW, DrawAsk, piece_of_draw
from mope_bb.providers.endpoint import WireExpert
from mope_bb.providers.findings import ExpertReport
from mope_bb.providers.probe_draws import DRAWS, DrawProbe
from mope_bb.providers.wire import Reply
from mope_bb.types import Context, Message, Piece

QUESTIONS = [Context((Message("user", "Hi"),)), Context((Message("user", "And?"),))]


class Drawing:
    """An endpoint that draws these texts, one after the other, and then the last one again and again."""

    def __init__(self, *texts: str) -> None:
        self._texts = list(texts)

    async def draw(self, context: Context, ask: DrawAsk = ONE_DRAW) -> Reply:
        """See `WireExpert`."""
        return Reply((), text=self._texts.pop(0) if len(self._texts) > 1 else self._texts[0])

    async def read_draw(self, reply: Reply) -> Piece:
        """See `WireExpert`."""
        return piece_of_draw(reply, None, expert="e")


def verdict(*texts: str) -> str:
    """What the doctor says of an endpoint that draws `texts`."""
    report = ExpertReport("e", "chat")
    probe = DrawProbe(cast("WireExpert", cast("Any", Drawing(*texts))), QUESTIONS, report)

    async def run() -> None:
        await probe.checks()[0][1]()

    asyncio.run(run())
    return report.findings["logprobs"].verdict


@pytest.mark.parametrize("lost", ["\ufffd", "\ufffdri", ""])
def test_a_draw_that_cannot_be_told_is_one(lost: str) -> None:
    """Half a character now and then is no fault of the endpoint: chat meets it as seldom."""
    assert verdict("Use", lost, "Use") == "ok"
    assert verdict(lost, "Use") == "ok"


def test_the_same_again_and_again() -> None:
    """From every question: it does not sample."""
    assert verdict("Use") == "warning"
    assert verdict(*["Use"] * DRAWS, "Yes") == "warning"


def test_nothing_can_be_told() -> None:
    """Then it is no expert, and the first thing that is said of it is why."""
    with pytest.raises(AlignmentError, match="without text"):
        verdict("")
    with pytest.raises(AlignmentError, match="which is not one token"):
        verdict("Use", "x" * 5000)
