"""Tiny random reward models on disk, with the traps of real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from mope_bb.types import Message

WORDS = ("good", "bad", "short", "answer", "what", "is", "this", "a", "very", "long")
CONTROLS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CONTEXT = 32
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def conversation(*texts: str) -> tuple[Message, ...]:
    """A conversation in which user and assistant take turns."""
    return tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, each a token; the end of a message is also the padding."""
    vocabulary = {token: n for n, token in enumerate((*CONTROLS, "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(CONTROLS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=list(CONTROLS[1:]),
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
    )


def save_llama(folder: Path, *, num_labels: int = 1) -> Path:
    """A random decoder whose configured padding is the token that ends every conversation."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """A random encoder, which reads its first token."""
    tokenizer = build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        num_labels=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `save_llama`."""
    return save_llama(tmp_path_factory.mktemp("rewards") / "llama")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `save_bert`."""
    return save_bert(tmp_path_factory.mktemp("rewards") / "bert")
