"""Opening the experts of a plan, and going on without those that fail."""

from __future__ import annotations

import logging

from mope_bb.errors import ProviderError
from mope_bb.pcm.merging import Plan
from mope_bb.providers.pool import ExpertPool

_log = logging.getLogger(__name__)


async def open_experts(pool: ExpertPool, plan: Plan, *, waits: bool) -> None:
    """Open the experts of `plan`; `waits`: also for one that is down. Raises ProviderError."""
    if not waits:
        pool.check_not_down(plan.asked)
    await pool.open(plan.asked)


def drop_failed(plan: Plan, error: ProviderError, *, is_allowed: bool) -> Plan:
    """`plan` without the expert that `error` names, with a warning. Raises `error` where that cannot be."""
    left = plan.without(error.expert or "")
    if left is None or not (is_allowed and error.retryable):
        raise error
    _log.warning("%s; the answer goes on without this expert", error)
    return left
