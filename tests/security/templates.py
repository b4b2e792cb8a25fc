"""Tokenizers with chat templates like those of the common model families, made here in a moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mope_bb.chat_tokenizer import ChatTokenizer

CHATML: Final = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% if m['tool_call_id'] %}{{ m['tool_call_id'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA: Final = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA: Final = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)
GLUED: Final = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}"
"""Messages stand side by side, with nothing between them."""
CUT_OUT: Final = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'].replace('<think>', '') + '<|im_end|>' }}{% endfor %}"
)
"""Something is taken out of the middle of messages, as some templates do with thoughts."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of template and tokenizer."""

    template: str
    controls: tuple[str, ...]
    bos: str | None = None
    is_normalized: bool = False
    """Its tokenizer puts characters together, and leaves out what is not seen, before it looks for control tokens."""


FAMILIES: Final = {
    "chatml": Family(CHATML, ("<|im_end|>", "<|im_start|>", "<|endoftext|>")),
    "llama": Family(LLAMA, ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")),
    "gemma": Family(GEMMA, ("<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>"), bos="<bos>"),
    "mistral": Family(MISTRAL, ("</s>", "<s>", "[INST]", "[/INST]"), bos="<s>"),
    "normalising": Family(CHATML, ("<|im_end|>", "<|im_start|>"), is_normalized=True),
    "glued": Family(GLUED, ("</s>", "<s>", "[INST]"), bos="<s>"),
    "cut out": Family(CUT_OUT, ("<|im_end|>", "<|im_start|>")),
}


def build_tokenizer(family: Family) -> tuple[ChatTokenizer, Any]:
    """The tokenizer as experts have it, and the one of transformers within."""
    bytes_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: place for place, char in enumerate(bytes_of)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if family.is_normalized:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace("\u200b", ""), normalizers.Replace("\u00ad", "")]
        )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=family.is_normalized) for name in family.controls]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.controls[0],
        bos_token=family.bos,
        additional_special_tokens=list(family.controls[1:]) if not family.is_normalized else None,
        chat_template=family.template,
    )
    return ChatTokenizer(fast, source="made here"), fast
