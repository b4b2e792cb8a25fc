"""All stand-ins by provider, started when first used."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.endpoints import native, openai_chat, openai_completions
from tests.endpoints.engine import Handler, StandIn, TinyEngine, serving

MODEL: Final = "tiny"
ROUTES: Final[Mapping[str, Mapping[tuple[str, str], Handler]]] = {
    **openai_completions.ROUTES,
    **openai_chat.ROUTES,
    **native.ROUTES,
}
BASE_PATHS: Final[Mapping[str, str]] = {
    **openai_completions.BASE_PATHS,
    **openai_chat.BASE_PATHS,
    **native.BASE_PATHS,
}
"""Path of `base_url`, where it is not "/v1"."""
FAULTS: Final[Mapping[str, frozenset[str]]] = {**openai_completions.FAULTS, **openai_chat.FAULTS}
"""How an endpoint misbehaves of its own accord."""


class StandIns:
    """One server for each provider, all with the model of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engine: TinyEngine | None = None
        self._running: dict[str, StandIn] = {}
        self._stack = ExitStack()

    def open(self, provider: str) -> StandIn:
        """The stand-in for this provider."""
        if self._engine is None:
            self._engine = TinyEngine(self._folder)
        if provider not in self._running:
            stand_in = StandIn({MODEL: self._engine}, ROUTES[provider], faults=FAULTS.get(provider, frozenset()))
            self._running[provider] = self._stack.enter_context(serving(stand_in))
        return self._running[provider]

    def table(self, provider: str) -> dict[str, object]:
        """The settings of an expert that is served by it."""
        return {
            "base_url": self.open(provider).url + BASE_PATHS.get(provider, "/v1"),
            "model": MODEL,
            "tokenizer": str(self._folder),
            "max_retries": 0,
            **openai_chat.SETTINGS.get(provider, {}),
        }

    def close(self) -> None:
        """Stop all."""
        self._stack.close()
