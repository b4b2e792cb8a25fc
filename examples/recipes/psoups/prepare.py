"""Makes what the recipe needs beside the adapters: the tokenizer with its chat template, and prompts, one a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

HERE = Path(__file__).parent


def write_tokenizer(model: str, folder: Path) -> None:
    """Tulu's tokenizer has no chat template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    tokenizer.chat_template = (HERE / "tulu.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)


def write_prompts(source: Path, target: Path) -> int:
    """RLPHF's data are one JSON list of {"id": ..., "prompt": ...}; returns how many there were."""
    prompts = [entry["prompt"] for entry in json.loads(source.read_text(encoding="utf-8"))]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(prompts)


if __name__ == "__main__":
    data, base = Path(sys.argv[1]), sys.argv[2]
    print(write_prompts(data / "alpaca_gpt4_10k.json", HERE / "prompts.jsonl"), "prompts to train on")
    print(write_prompts(data / "koala_eval_50.json", HERE / "koala.jsonl"), "prompts to evaluate on")
    write_tokenizer(base, HERE / "tulu-tokenizer")
