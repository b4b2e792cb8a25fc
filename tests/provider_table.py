"""The table of docs/providers.md, made from the adapters' own facts: `python -m tests.provider_table` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mope_bb.providers.base import Capabilities
from mope_bb.providers.dialects import CHAT, COMPLETIONS, NATIVE, Dialect
from mope_bb.providers.findings import DRAFTS, SCORING

PAGE: Final = Path(__file__).parents[1] / "docs" / "providers.md"
BEGIN: Final = "<!-- made by tests/provider_table.py -->"
END: Final = "<!-- end -->"
REAL: Final = {
    "llamacpp": "llama.cpp",
    "llamacpp-completions": "llama.cpp",
    "llamacpp-chat": "llama.cpp",
    "vllm": "vLLM on CPU",
    "vllm-chat": "vLLM on CPU",
    "vllm-generate": "vLLM on CPU",
    "transformers": "`transformers serve`",
    "mope": "`mope-bb serve`",
}
"""Providers that are tested against the software itself; the others against stand-ins with a real model behind them."""
PREFILL: Final = {
    "ids": "token ids",
    "text": "text after the template",
    "messages": "the assistant's last message",
    "pieces": "pieces",
    "none": "**nothing**",
}


def rows() -> Iterator[str]:
    """The lines of the table."""
    yield (
        "| `provider` | route | k | continues an answer by | ids in / out | bytes | end of answer | logprobs | "
        "T sent | drafts | scores a draft by | tested against | source |"
    )
    yield "|" + "---|" * 13
    for route, table in (("native", NATIVE), ("completions", COMPLETIONS), ("chat", CHAT)):
        for name, dialect in table.items():
            yield row(name, route, dialect)


def row(name: str, route: str, dialect: Dialect) -> str:
    """One provider."""
    facts: Capabilities = dialect.capabilities
    ids = " / ".join("yes" if there else "no" for there in (facts.ids_in, facts.ids_out))
    cells = (
        f"`{name}`",
        route,
        str(facts.max_top_k or "any") if facts.gives_lists else "-",
        PREFILL[facts.prefill],
        ids,
        "exact" if facts.byte_exact else "whole characters",
        "visible" if facts.eos_visible else "hidden",
        facts.logprob_scale if facts.gives_lists else "**none**",
        f"{dialect.temperature:g}",
        DRAFTS[facts.drafts],
        SCORING[facts.score] if facts.gives_lists and facts.prefill != "none" else "-",
        REAL.get(name, "stand-in"),
        dialect.source,
    )
    return "| " + " | ".join(cells) + " |"


def page_with_table(page: str) -> str:
    """The page with its table as it should be."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n\n" + "\n".join(rows()) + "\n\n" + END + after


def main() -> None:
    """Write the table."""
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
