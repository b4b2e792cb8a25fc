"""The zoo's tokenizer: byte-level BPE with the control tokens of its chat format, and the chat template."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from mope_bb.zoo.language import training_conversation
from mope_bb.zoo.wording import DIMENSIONS, style_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""They have the first ids; the end of a message is also the end of an answer (EOS). There is no BOS."""
END, ASSISTANT = CONTROL_TOKENS[0], CONTROL_TOKENS[3]
VOCAB_SIZE = 1280
CONTEXT = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Read by transformers and by llama.cpp alike; the system message is optional, any number of turns."""


def train_tokenizer(seed: int, conversations: int = 4000) -> PreTrainedTokenizerFast:
    """Train the tokenizer on conversations of the language; the same seed gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(f"tokenizer {seed}")
    texts = [m["content"] for _ in range(conversations) for m in training_conversation(rng)]
    texts += [s for pole in DIMENSIONS for held_out in (False, True) for s in style_sentences(pole, held_out=held_out)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=list(CONTROL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    """What `CHAT_TEMPLATE` renders, without a template engine."""
    text = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)
    return text + ASSISTANT if add_generation_prompt else text


def with_labels(tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each conversation, and which of them the model is to learn: the answers with their ends."""
    backend = tokenizer.backend_tokenizer
    end, assistant = (backend.token_to_id(token) for token in (END, ASSISTANT))
    examples = []
    for encoding in backend.encode_batch([render(messages) for messages in conversations]):
        learned, inside = [], False
        for token in encoding.ids:
            learned.append(inside)
            inside = token == assistant or (inside and token != end)
        examples.append((encoding.ids, learned))
    return examples
