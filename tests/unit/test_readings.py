"""What is read off a model's rows: the logprobs of a log softmax, by one call for all requests that read alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mope_bb.inference import BatchedModel
from mope_bb.providers.local import Top, TopAndDrawn, draw_token
from mope_bb.readings import Tensors
from tests.unit.test_inference import VOCAB, Held, llama, plain_rows, start

__all__ = ["start"]  # a fixture


@dataclass(frozen=True)
class Sums:
    """Each row's sum times `factor`; remembers how many rows it was given at a time."""

    factor: float
    seen: list[int] = field(compare=False)

    def __call__(self, rows: Tensor) -> Tensors:
        self.seen.append(len(rows))
        return (self.factor * rows.sum(dim=1),)


def test_equal_readings_share_a_call(start: Callable[..., BatchedModel]) -> None:
    """Of five requests in one forward, those with equal readings are read together; each gets what belongs to it."""
    model = llama()
    runner = start(model, num_slots=8)
    seen: list[int] = []
    asks = [([n, n + 1, n + 2], 1 + n % 2, Sums(float(n % 2 + 1), seen)) for n in range(5, 10)]

    async def run() -> list[Tensors]:
        held = Held(runner)
        (blocker,) = await held.ask([])
        asked = [asyncio.ensure_future(runner.read(ids, count, reading)) for ids, count, reading in asks]
        await asyncio.sleep(0)
        held.release()
        await blocker
        return await asyncio.gather(*asked)

    for (ids, count, reading), (sums,) in zip(asks, asyncio.run(run()), strict=True):
        expected = reading.factor * plain_rows(model, ids)[-count:].sum(dim=1)
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
    assert sorted(seen) == [2, 6]  # two requests for a row each, three for two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_is_that_of_a_log_softmax(dtype: torch.dtype) -> None:
    """The best ids and their logprobs, and a drawn id whose logprob is to the last bit what the list says of it."""
    rows = (8.0 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))).to(dtype)
    logprobs = torch.log_softmax(rows.double(), dim=-1)
    values, ids = Top(10)(rows)
    torch.testing.assert_close(values, torch.topk(logprobs, 10).values, rtol=0, atol=1e-12)
    torch.testing.assert_close(values, logprobs.gather(1, ids), rtol=0, atol=1e-12)
    for uniform in (0.0, 0.3, 0.9):
        again, listed, drawn, said = TopAndDrawn(Top(VOCAB), 1.0, uniform)(rows)
        assert torch.equal(again[:, :10], values)
        assert drawn[:, 0].tolist() == [draw_token(row, 1.0, uniform) for row in logprobs]
        places = (listed == drawn).nonzero()[:, 1]
        assert torch.equal(again.gather(1, places[:, None]), said)
