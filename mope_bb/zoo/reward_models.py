"""The zoo's reward models: one sequence classifier per pole, a learned judge with faults of its own.

Each has the base's body and one logit at the end of the conversation. It learns by the Bradley-Terry loss from pairs of
answers to one question, drawn from the grammar and ranked by the oracle, with some of the ranks wrong on purpose: that
bounds the logits, and keeps the judge from being the oracle in disguise.

Shapes: N answers of a batch, to N / `answers` questions; T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mope_bb.zoo.language import Message, Style, Task, answer, conversation, style_of, tasks
from mope_bb.zoo.oracle import score
from mope_bb.zoo.tokenizing import render
from mope_bb.zoo.training import deterministic, learning_rate_factor
from mope_bb.zoo.wording import DIMENSIONS, FOLLOW_UPS, POLES, QUESTIONS, style_sentences

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForSequenceClassification

PADDING = "<|system|>"
"""No conversation ends with it. The base pads with its end token, which would hide the true end from transformers'
own pooling; with this one plain transformers computes the scores that we do."""


@dataclass(frozen=True)
class RewardRecipe:
    """Everything about a size of the zoo that the training of its reward models depends on."""

    steps: int
    questions: int
    """Of one batch."""
    rate: float
    test_pairs: int
    """From which the accuracy is measured, on questions that no model has seen."""
    answers: int = 8
    """To each question; every two of them that differ are a pair, which teaches more than as many separate pairs."""
    flipped: float = 0.05
    """Share of the training pairs that are ranked the wrong way."""
    threads: int = 2


REWARD_RECIPES = {
    "nano": RewardRecipe(6, 2, 2e-3, 50, threads=1),
    "tiny": RewardRecipe(120, 4, 3e-3, 1000),
    "clean": RewardRecipe(120, 4, 3e-3, 1000),
    "gpu": RewardRecipe(400, 8, 1e-4, 1000),
}
"""By the zoo's size."""


@dataclass(frozen=True)
class Comparison:
    """Several answers to one question."""

    prompt: tuple[Message, ...]
    """The conversation up to the answers."""
    task: Task
    """What the last question is about."""
    answers: tuple[str, ...]

    def conversations(self) -> list[list[Message]]:
        """The whole conversation with each answer."""
        return [[*self.prompt, {"role": "assistant", "content": text}] for text in self.answers]

    def ranked(self, pole: str) -> list[tuple[int, int]]:
        """Indices of all pairs of answers that the oracle tells apart in `pole`, the better one first."""
        values = [score(text, self.task).of(pole) for text in self.answers]
        pairs = combinations(range(len(values)), 2)
        # Means of the same values may differ by rounding.
        return [(i, j) if values[i] > values[j] else (j, i) for i, j in pairs if abs(values[i] - values[j]) > 1e-9]


def random_style(rng: random.Random) -> Style:
    """A random subset of poles at a random sharpness; without any pole, the base's own style."""
    poles = [rng.choice(axis) for axis in POLES if rng.random() < 0.5]
    return style_of(poles, sharpness=rng.uniform(0.5, 1.0))


def draw_comparison(rng: random.Random, num_answers: int, *, held_out: bool = False) -> Comparison:
    """Draw a conversation as in the base's training, and answers to its last question in random styles."""
    known = tasks(held_out=held_out)
    system = rng.choice(style_sentences(rng.choice(DIMENSIONS))) if rng.random() < 0.2 else None
    # Fewer turns than in the base's training: here only the last answer teaches anything.
    history = conversation(known, random_style(rng), rng, max_turns=rng.choice((1, 2)), system=system)[:-2]
    is_first = all(message["role"] == "system" for message in history)
    task = rng.choice(known)
    question = rng.choice(QUESTIONS if is_first else (*QUESTIONS, *FOLLOW_UPS * 2)).format(**task.facts())
    answers = tuple(answer(task, random_style(rng), rng) for _ in range(num_answers))
    return Comparison((*history, {"role": "user", "content": question}), task, answers)


def new_reward_model(base: Path, tokenizer: Any) -> LlamaForSequenceClassification:
    """A classifier on the body of the model in `base`, whose score is always 0; it pads with `tokenizer`'s padding."""
    import torch
    from transformers import LlamaForSequenceClassification

    from mope_bb.inference import loading_weights

    with loading_weights():
        model = LlamaForSequenceClassification.from_pretrained(
            base, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
        )
    torch.nn.init.zeros_(model.score.weight)
    return model


def train_reward(
    model: LlamaForSequenceClassification,
    tokenizer: Any,
    recipe: RewardRecipe,
    *,
    pole: str,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> float:
    """Train `model` in place as the judge of `pole`, and return the final mean loss (nats).

    `progress` is told the share that is done.
    """
    import torch

    rng = random.Random(f"reward {pole} {seed}")
    with deterministic(recipe.threads), _on_best_device(model):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
        warm_up = max(recipe.steps // 10, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, recipe.steps, warm_up)
        )
        losses: list[float] = []
        for step, batch in enumerate(_batches(recipe, rng)):
            scores = _scores(model, tokenizer, batch)
            better, worse = _pairs(batch, pole, rng, recipe)
            # Not the mean: a batch without a single pair, all of it ties, is no reason for NaN.
            loss = -torch.nn.functional.logsigmoid(scores[better] - scores[worse]).sum() / max(len(better), 1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if progress is not None:
                progress((step + 1) / recipe.steps)
        model.eval()
    last = losses[-20:]
    return sum(last) / len(last)


def reward_accuracy(
    model: LlamaForSequenceClassification, tokenizer: Any, recipe: RewardRecipe, *, pole: str, seed: int = 0
) -> float:
    """Share of fresh pairs that `model` ranks as the oracle does: questions held out of all training, no lies."""
    import torch

    rng = random.Random(f"reward test {pole} {seed}")
    pairs: list[Comparison] = []
    while len(pairs) < recipe.test_pairs:
        pair = draw_comparison(rng, 2, held_out=True)
        if pair.ranked(pole):
            pairs.append(pair)
    pairs.sort(key=_length)
    right = 0
    with deterministic(recipe.threads), _on_best_device(model), torch.no_grad():
        for start in range(0, len(pairs), 32):
            batch = pairs[start : start + 32]
            for scores, pair in zip(_scores(model, tokenizer, batch).view(-1, 2).tolist(), batch, strict=True):
                [(better, worse)] = pair.ranked(pole)
                right += scores[better] > scores[worse]
    return right / len(pairs)


@contextmanager
def _on_best_device(model: LlamaForSequenceClassification) -> Iterator[None]:
    """`model` on the GPU, if it is large enough to gain from one and there is one; back on the CPU after."""
    import torch

    model.to("cuda" if model.config.hidden_size >= 256 and torch.cuda.is_available() else "cpu")
    try:
        yield
    finally:
        model.to("cpu")


def _batches(recipe: RewardRecipe, rng: random.Random) -> Iterator[list[Comparison]]:
    """Batches of fresh questions with answers; those of similar length together, which saves padding."""
    group = 8
    for start in range(0, recipe.steps, group):
        count = min(group, recipe.steps - start)
        drawn = [draw_comparison(rng, recipe.answers) for _ in range(count * recipe.questions)]
        drawn.sort(key=_length)
        batches = [drawn[i : i + recipe.questions] for i in range(0, len(drawn), recipe.questions)]
        rng.shuffle(batches)
        yield from batches


def _pairs(
    batch: Sequence[Comparison], pole: str, rng: random.Random, recipe: RewardRecipe
) -> tuple[list[int], list[int]]:
    """Indices into the N answers of the batch: the better and the worse one of each pair, some of them exchanged."""
    better, worse = [], []
    for number, comparison in enumerate(batch):
        for pair in comparison.ranked(pole):
            first, second = reversed(pair) if rng.random() < recipe.flipped else pair
            better.append(number * recipe.answers + first)
            worse.append(number * recipe.answers + second)
    return better, worse


def _length(comparison: Comparison) -> int:
    """Characters of the longest conversation, which is what padding depends on."""
    return sum(len(message["content"]) for message in comparison.prompt) + max(map(len, comparison.answers))


def _scores(model: LlamaForSequenceClassification, tokenizer: Any, batch: Sequence[Comparison]) -> torch.Tensor:
    """N scores, read at the true end of each conversation. Padding stands behind it, so causality masks it."""
    import torch

    texts = [render(messages) for comparison in batch for messages in comparison.conversations()]
    rows = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    width, padding = max(map(len, rows)), tokenizer.convert_tokens_to_ids(PADDING)
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=model.device)
    ends = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    scores: torch.Tensor = model.score(hidden[torch.arange(len(rows), device=model.device), ends])[:, 0]
    return scores
