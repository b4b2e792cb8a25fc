"""Llamas with random weights that behave like experts: one base for all, sure of some tokens and not of others."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE: Final = 8192
CONTEXT: Final = 4096
CONTROL_TOKENS: Final = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|user|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NUM_TEMPLATE_IDS: Final = 2
LETTERS: Final = "abcdefghij"
"""In prompts: each of them is one id."""
LAYERS: Final = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}


def build_tokenizer() -> Any:
    """A byte-level BPE of `VOCAB_SIZE` tokens: bytes, and pairs of ASCII that begin with none of `LETTERS`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [token for token in alphabet if is_text(token)]
    pairs = [(first, second) for first in printable if first not in LETTERS for second in printable]
    pairs = pairs[: VOCAB_SIZE - len(CONTROL_TOKENS) - len(alphabet)]
    vocab = {token: n for n, token in enumerate([*CONTROL_TOKENS, *alphabet, *map("".join, pairs)])}
    assert len(vocab) == VOCAB_SIZE
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=CONTROL_TOKENS[0],
        pad_token=CONTROL_TOKENS[0],
        additional_special_tokens=list(CONTROL_TOKENS[1:]),
        chat_template=TEMPLATE,
    )


def is_text(token: str) -> bool:
    """Whether a token of the byte-level alphabet is printable ASCII."""
    return token.replace("\u0120", " ").isascii() and token not in CONTROL_TOKENS


def save_experts(
    folder: Path,
    num_experts: int,
    *,
    shape: Mapping[str, Any] = {},  # never changed
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Path]:
    """Folders of Llamas with the tokenizer; their distributions lie about 0.4 nats apart. They write ASCII without end.

    The weights are numbers of bfloat16, so that a program which loads them as such computes with the same. `device` is
    where they are made, `dtype` how they are saved, `shape` what differs from `LAYERS`.
    """
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        **(LAYERS | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT} | dict(shape)),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folders = [folder / f"expert-{n}" for n in range(num_experts)]
    for seed, target in enumerate(folders):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            with torch.device(device):
                model = LlamaForCausalLM(config)
            torch.manual_seed(1 + seed)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
            head = model.get_output_embeddings().weight
            head.mul_(9.0 * (LAYERS["hidden_size"] / config.hidden_size) ** 0.5)  # about 3 nats of entropy
            head[len(tokenizer) :] = 0.0
            head[[n for token, n in tokenizer.get_vocab().items() if not is_text(token)]] = 0.0
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        model.to(dtype).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return folders


def local_experts(folders: Sequence[Path], *, top_k: int = 20, device: str = "cpu") -> dict[str, Any]:
    """The content of a configuration that runs them here."""
    experts = [
        {
            "name": one.name,
            "dimension": one.name,
            "provider": "local",
            "model": str(one),
            "device": device,
            "top_k": top_k,
        }
        for one in folders
    ]
    return {
        "experts": experts,
        "dimensions": {one.name: {"text": one.name} for one in folders},
        "cache": {"enabled": False},
    }


def prompt_of(num_ids: int, seed: int) -> str:
    """A message that has `num_ids` ids when it is rendered."""
    generator = random.Random(f"{num_ids} {seed}")
    return "".join(generator.choice(LETTERS) for _ in range(num_ids - NUM_TEMPLATE_IDS))
