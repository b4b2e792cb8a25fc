"""Settings of the unit tests: hypothesis draws the same examples each time, and keeps nothing on disk."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unit", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("unit")
