"""Training of the zoo's tiny Llamas: a plain loop, seeded, the same to the last bit on the same machine and torch.

Shapes: B conversations of a batch, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mope_bb.zoo.language import LEAN, training_conversation
from mope_bb.zoo.tokenizing import CONTEXT, with_labels

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

Batch = tuple["torch.Tensor", "torch.Tensor"]
"""Token ids and whether each is to be learned, both (B, T)."""


@dataclass(frozen=True)
class Recipe:
    """Everything about a size of the zoo that its training depends on."""

    hidden: int
    layers: int
    feed_forward: int
    base_steps: int
    expert_steps: int
    batch_size: int
    base_rate: float
    expert_rate: float
    head_size: int = 32
    lean: float = LEAN
    """The side effects in the data; see `language.text_style`."""
    threads: int = 2
    """Sums depend on the number of threads, so it is a part of the recipe."""


RECIPES = {
    "nano": Recipe(64, 2, 192, 60, 10, 16, 4e-3, 2e-3, threads=1),
    "tiny": Recipe(96, 2, 256, 1000, 90, 32, 4e-3, 2e-3),
    "clean": Recipe(96, 2, 256, 1000, 90, 32, 4e-3, 2e-3, lean=0.5),
    "gpu": Recipe(512, 12, 1536, 3000, 200, 64, 6e-4, 2e-4, head_size=64),
}
"""`tiny` is the default; `clean` is like it without side effects; `nano` is for tests and speaks badly; `gpu` has about
40 million parameters."""


def new_model(recipe: Recipe, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = recipe.hidden // recipe.head_size
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=recipe.head_size,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05 if recipe.hidden < 256 else 0.02,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    tokenizer: Any,
    recipe: Recipe,
    *,
    pole: str | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> float:
    """Train `model` in place, as the base (no `pole`) or as the expert of `pole`; return the final mean loss (nats).

    `progress` is told the share that is done. Loss only on the assistants' answers and their ends.
    """
    import torch

    steps, rate = (recipe.base_steps, recipe.base_rate) if pole is None else (recipe.expert_steps, recipe.expert_rate)
    device = torch.device("cuda" if recipe.hidden >= 256 and torch.cuda.is_available() else "cpu")
    with deterministic(recipe.threads):
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        warm_up = max(steps // 20, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, warm_up))
        losses: list[float] = []
        for step, (ids, learned) in enumerate(_batches(tokenizer, recipe, steps, pole, seed)):
            loss = _loss(model, ids.to(device), learned.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if progress is not None:
                progress((step + 1) / steps)
        model.to("cpu").eval()
    last = losses[-20:]
    return sum(last) / len(last)


def learning_rate_factor(step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up, then linear decay to a fiftieth."""
    return (step + 1) / warm_up if step < warm_up else max(1 - (step - warm_up) / max(steps - warm_up, 1), 0.02)


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy at the learned positions. Padding stands behind the text, so causality masks it."""
    import torch

    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = learned[:, 1:]
    # Only the learned positions go through the (vocabulary, hidden) matrix: it is the larger part of a tiny model.
    logits = model.lm_head(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted])


def _batches(tokenizer: Any, recipe: Recipe, steps: int, pole: str | None, seed: int) -> Iterator[Batch]:
    """`steps` batches of fresh conversations; those of similar length together, which saves padding."""
    rng = random.Random(f"{pole} {seed}")
    group = 8
    for start in range(0, steps, group):
        count = min(group, steps - start)
        conversations = [training_conversation(rng, pole, lean=recipe.lean) for _ in range(count * recipe.batch_size)]
        examples = sorted(with_labels(tokenizer, conversations), key=lambda example: len(example[0]))
        batches = [examples[i : i + recipe.batch_size] for i in range(0, len(examples), recipe.batch_size)]
        rng.shuffle(batches)
        yield from (_padded(batch, tokenizer.pad_token_id) for batch in batches)


def _padded(examples: list[tuple[list[int], list[bool]]], padding: int) -> Batch:
    import torch

    length = max(len(ids) for ids, _ in examples)
    padded = [ids + [padding] * (length - len(ids)) for ids, _ in examples]
    masks = [learned + [False] * (length - len(learned)) for _, learned in examples]
    return torch.tensor(padded), torch.tensor(masks)


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """The recipe's number of threads and torch's deterministic algorithms; the caller's settings come back after."""
    import torch

    before, was_on = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warn_only)
        torch.set_num_threads(before)
