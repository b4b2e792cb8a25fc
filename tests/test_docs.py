"""The documentation says what the code does."""

from __future__ import annotations

from mope_bb.providers.registry import PROVIDERS
from tests.provider_table import PAGE, page_with_table


def test_the_table_of_providers_is_made_from_the_code() -> None:
    """`python -m tests.provider_table` rewrites it."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page)


def test_every_provider_is_in_the_table() -> None:
    """All but those that have no wire."""
    page = PAGE.read_text(encoding="utf-8")
    missing = [name for name in PROVIDERS if f"| `{name}` |" not in page]
    assert missing == ["local", "scripted"]
