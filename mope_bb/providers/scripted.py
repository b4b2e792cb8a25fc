"""A deterministic expert for docs and tests: at each position of the answer it says what its script says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from mope_bb.cache import DistributionCache
from mope_bb.config import ExpertConfig
from mope_bb.errors import ConfigError
from mope_bb.providers.base import Capabilities, Expert, build_distribution
from mope_bb.types import END, Context, Piece, TokenDistribution

END_WORD: Final = "<end>"
CAPABILITIES: Final = Capabilities(prefill="pieces", ids_in=False, ids_out=False)


class ScriptedExpert(Expert):
    """Position t of the answer has the distribution `script[t]`; after the script the answer ends."""

    capabilities = CAPABILITIES

    def __init__(self, name: str, script: Sequence[Mapping[str, float]]) -> None:
        """Each step maps text to its probability, "<end>" to that of the end; the sum must not exceed 1.

        Raises ConfigError.
        """
        self.name = name
        self._script = [_parse_step(name, position, step) for position, step in enumerate(script)]

    async def next_tokens(self, context: Context, *, top_k: int) -> TokenDistribution:
        position = len(context.response)
        entries = self._script[position] if position < len(self._script) else [(END, 0.0)]
        return build_distribution(entries, top_k=top_k, end_ids=(-1,), vocab_size=None, expert=self.name)

    async def fingerprint(self) -> str:
        return "scripted"

    async def aclose(self) -> None:
        """Nothing to free."""


def _parse_step(name: str, position: int, step: Mapping[str, float]) -> list[tuple[Piece, float]]:
    total = math.fsum(step.values())
    if not step or not all(0 < value <= 1 for value in step.values()) or total > 1 + 1e-9:
        raise ConfigError(
            f"expert {name!r}: step {position} of the script is {dict(step)!r}",
            hint="Expected probabilities above 0 that add up to at most 1.",
        )
    return [(END if text == END_WORD else Piece(text.encode()), math.log(value)) for text, value in step.items()]


def open_expert(config: ExpertConfig, cache: DistributionCache | None) -> ScriptedExpert:
    """Build the expert from `script`; nothing to cache."""
    del cache
    return ScriptedExpert(config.name, config.script)
