"""A batch that starts together gives what the model's own plain forward gives to each row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mope_bb.row_batch import RowBatch

VOCAB = 23
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
}
WINDOW = 4
BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "classifier": lambda: LlamaForTokenClassification(LlamaConfig(**SIZES, num_labels=3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
}
every_model = pytest.mark.parametrize("name", BUILDERS)


@cache
def model(name: str) -> Any:
    """A random model of this architecture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[name]().eval()


@torch.inference_mode()
def plain(name: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """The outputs at the last ids, each row by a forward of its own."""
    return torch.stack(
        [model(name)(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0, -1] for row in rows]
    )


ids = st.integers(0, VOCAB - 1)
prompts_of = st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=5)


@every_model
@given(data=st.data())
def test_equals_the_plain_forward(name: str, data: st.DataObject) -> None:
    """Prompts of any lengths, then any ids, with any rows left out on the way."""
    rows = data.draw(prompts_of)
    batch = RowBatch(model(name))
    torch.testing.assert_close(batch.start(rows), plain(name, rows), rtol=1e-4, atol=1e-5)
    for _ in range(data.draw(st.integers(1, 6))):
        kept = data.draw(st.lists(st.integers(0, len(rows) - 1), unique=True, min_size=1).map(sorted))
        if len(kept) < len(rows):
            batch.keep(torch.tensor(kept))
            rows = [rows[i] for i in kept]
        new = [data.draw(ids) for _ in rows]
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
        torch.testing.assert_close(batch.advance(torch.tensor(new)), plain(name, rows), rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("limit", [1, 2 * VOCAB * 7])
def test_prompts_read_in_groups_give_the_same(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one row, and of two with a smaller last one, change neither the prompts' outputs nor what follows."""
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [3, 3], [12, 13, 14, 15]]
    monkeypatch.setattr("mope_bb.row_batch.MAX_OUTPUTS", limit)
    batch = RowBatch(model(name))
    torch.testing.assert_close(batch.start(rows), plain(name, rows), rtol=1e-4, atol=1e-5)
    rows = [[*row, 5] for row in rows]
    torch.testing.assert_close(batch.advance(torch.full((5,), 5)), plain(name, rows), rtol=1e-4, atol=1e-5)


@every_model
def test_memory_grows_with_the_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that outgrow the reserved room lose nothing."""
    monkeypatch.setattr("mope_bb.row_batch.MIN_CAPACITY", 1)
    rows = [[1, 2], [3]]
    batch = RowBatch(model(name))
    batch.start(rows)
    for token in range(20):
        found = batch.advance(torch.tensor([token, token + 1]))
        rows = [[*rows[0], token], [*rows[1], token + 1]]
        if token == 9:
            batch.keep(torch.tensor([1, 0]))
            batch.keep(torch.tensor([1, 0]))
    torch.testing.assert_close(found, plain(name, rows), rtol=1e-4, atol=1e-5)


def test_batch_can_be_started_again() -> None:
    """A second start forgets the first answers."""
    batch = RowBatch(model("llama"))
    batch.start([[1, 2, 3], [4]])
    batch.advance(torch.tensor([5, 6]))
    rows = [[7], [8, 9]]
    torch.testing.assert_close(batch.start(rows), plain("llama", rows), rtol=1e-4, atol=1e-5)


def test_outputs_carry_no_gradient() -> None:
    """Sampling builds no graph, even where the model is being trained."""
    assert not RowBatch(model("llama")).start([[1, 2]]).requires_grad
