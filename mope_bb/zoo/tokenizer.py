"""The zoo's tokenizer: byte-level BPE trained on the zoo's own language, with one chat template for all engines."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mope_bb.zoo.facts import OBJECTS, pairs
from mope_bb.zoo.language import write_base_chat
from mope_bb.zoo.styles import DIMENSIONS, style_sentences
from mope_bb.zoo.wording import FREE_SLOTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE: Final = 1152
END_TOKEN: Final = "<|end|>"
PAD_TOKEN: Final = "<|pad|>"
ROLE_TOKENS: Final = ("<|system|>", "<|user|>", "<|assistant|>")
CONTROL_TOKENS: Final = (END_TOKEN, PAD_TOKEN, *ROLE_TOKENS)

# One template, read by Hugging Face's jinja2 and by llama.cpp's own interpreter: it keeps to what both know. An
# unknown role (a tool's answer) is rendered as the user's, so that an agent's history still renders.
CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '<|system|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- else -%}{{- '<|user|>' -}}{%- endif -%}"
    "{{- message['content'] -}}{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_NUM_CHATS: Final = 4000
_SEED: Final = 20240704


def _corpus() -> Iterator[str]:
    """Texts for the BPE. Fixed, not seeded: all zoos share one vocabulary, so that their models can be mixed."""
    rng = random.Random(_SEED)
    emoji = FREE_SLOTS["emoji"]
    without_emoji = str.maketrans("", "", "".join(emoji))
    for _ in range(_NUM_CHATS):
        for message in write_base_chat(rng):
            yield message["content"].translate(without_emoji).strip()
    for pole in DIMENSIONS:
        yield from style_sentences(pole)
    for thing in OBJECTS:
        yield from (pair.object for pair in pairs() if pair.object == thing)
    # Each emoji once: its first bytes are merged with those of its neighbours, its last byte stays a token of its own.
    # So answers really contain tokens that end in the middle of a character.
    for one in emoji:
        yield f" {one}"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; takes a second and always gives the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer=trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer that was saved with a model."""
    from transformers import PreTrainedTokenizerFast

    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return loaded
