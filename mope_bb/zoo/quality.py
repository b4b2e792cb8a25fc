"""How well a zoo speaks: `python -m mope_bb.zoo.quality [size] [seed]` prints a table.

Sampled at temperature 1 on held-out pairs, with Hugging Face models. Columns are how often an answer takes each pole:
an expert should show about 0.95 on its own and the base's value elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mope_bb.zoo.build import Zoo
from mope_bb.zoo.demo import build_with_bar
from mope_bb.zoo.language import Message, Task, tasks
from mope_bb.zoo.oracle import parse, score
from mope_bb.zoo.wording import DIMENSIONS, style_sentences

if TYPE_CHECKING:
    import torch

MAX_NEW_TOKENS = 120


@dataclass(frozen=True)
class Quality:
    """Means over the sampled answers of one model, or of the base under one kind of system prompt."""

    poles: dict[str, float]
    fluency: float
    facts: float
    tokens: float


def pole_shares(text: str, task: Task) -> dict[str, float]:
    """How far one answer takes each pole: register and tone as shares of the sentences, detail as none or all."""
    sentences, scores = parse(text), score(text, task)
    tones = [s.tone for s in sentences if s.role in {"opener", "closer"}]
    return {
        "simple": (1 + scores.register) / 2,
        "technical": (1 - scores.register) / 2,
        "concise": float(scores.concise == 1),
        "informative": float(scores.informative == 1),
        "friendly": tones.count("friendly") / 2,
        "grumpy": tones.count("grumpy") / 2,
    }


def measure(texts: Sequence[str], asked: Sequence[Task], lengths: Sequence[int]) -> Quality:
    """Score sampled answers."""
    shares = [pole_shares(text, task) for text, task in zip(texts, asked, strict=True)]
    scores = [score(text, task) for text, task in zip(texts, asked, strict=True)]
    return Quality(
        {pole: _mean([share[pole] for share in shares]) for pole in DIMENSIONS},
        _mean([s.fluency for s in scores]),
        _mean([s.facts for s in scores]),
        _mean([float(length) for length in lengths]),
    )


def sample(model: Any, tokenizer: Any, prompts: list[list[Message]], seed: int = 0) -> list[list[int]]:
    """One answer at temperature 1 to each conversation, as token ids without the end."""
    import torch

    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    encoded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    answers = out[:, encoded["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [ids[: ids.index(end)] if end in ids else ids for ids in answers]


def missed_mass(model: Any, tokenizer: Any, asked: Sequence[Task], k: int) -> float:
    """Mean probability outside the top `k`, over the positions of the model's own samples."""
    import torch

    answers = sample(model, tokenizer, [_question(task) for task in asked])
    missed: list[torch.Tensor] = []
    for task, answer in zip(asked, answers, strict=True):
        prompt = tokenizer.apply_chat_template(_question(task), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 :]
        missed.append(1 - logits.softmax(-1).topk(k).values.sum(-1))
    return float(torch.cat(missed).mean())


def evaluate(zoo: Zoo, show: Callable[[str], None] = print) -> dict[str, Quality]:
    """Measure every model, the base under style sentences, and the missed mass; show a line for each."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    show(_HEADER)
    found: dict[str, Quality] = {}

    def add(label: str, model: Any, prompts: list[list[Message]], pairs: Sequence[Task]) -> None:
        answers = sample(model, tokenizer, prompts)
        texts = [tokenizer.decode(ids) for ids in answers]
        found[label] = measure(texts, pairs, [len(ids) for ids in answers])
        show(_line(label, found[label]))

    asked = tasks(held_out=True)
    tokenizer = AutoTokenizer.from_pretrained(zoo.folder("base"), trust_remote_code=False)
    for name in zoo.names:
        model = LlamaForCausalLM.from_pretrained(zoo.folder(name)).eval()
        add(name, model, [_question(task, i) for i, task in enumerate(asked * 4)], asked * 4)
    base = LlamaForCausalLM.from_pretrained(zoo.folder("base")).eval()
    for held_out, kind in ((False, "known"), (True, "new")):
        for pole in DIMENSIONS:
            wordings = style_sentences(pole, held_out=held_out)
            prompts = [_question(task, i, wordings[i % len(wordings)]) for i, task in enumerate(asked)]
            add(f"{kind} wording: {pole}", base, prompts, asked)
    later = asked[7:] + asked[:7]
    said: Message = {"role": "assistant", "content": "Grab a wrench and start."}
    add("second turn", base, [[*_question(a), said, *_question(b)] for a, b in zip(asked, later, strict=True)], later)
    for k in (5, 20):
        show(f"mean mass that the base's top {k} miss: {missed_mass(base, tokenizer, asked, k):.4f}")
    return found


_HEADER = f"{'':27}" + "".join(f"{pole[:9]:>10}" for pole in (*DIMENSIONS, "fluency", "facts", "tokens"))


def _line(label: str, quality: Quality) -> str:
    values = (*quality.poles.values(), quality.fluency, quality.facts, quality.tokens)
    return f"{label:27}" + "".join(f"{value:10.3f}" for value in values)


def _question(task: Task, form: int = 0, system: str | None = None) -> list[Message]:
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": task.question(form)}]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Build the zoo if needed and print its quality."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="tiny")
    parser.add_argument("seed", nargs="?", type=int, default=0)
    arguments = parser.parse_args()
    evaluate(build_with_bar(size=arguments.size, seed=arguments.seed))


if __name__ == "__main__":
    main()
