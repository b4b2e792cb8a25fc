"""Staleness: how many pairs may be under way, and which of the finished ones must be trained now. Pure functions.

A pair that was begun under version v of the policy may be trained at versions v to v + max_staleness: it is *due* at
v + max_staleness. Training one batch raises the version by one. Nothing is thrown away for its age. Two rules together
keep the bound, whatever the latencies:

- admission: as many pairs are begun as can be trained in time if all of them end (arXiv 2505.24298);
- choice: a batch takes the pairs that are due first, and waits for pairs that are still running where the batches to
  come could not hold all that will be due by then (earliest due date first).

Admission alone does not bound it: with some slow prompts, later pairs overtake them and take their places in the
batches. Waiting only for the oldest running pair does not either: several of them may become due at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Staleness:
    """The bound and what it is counted in."""

    max_staleness: int
    """Versions between the first token of a pair and its training; 0 = every batch is sampled by the policy that it
    changes."""
    batch_size: int
    """Pairs that one version trains on."""

    def room(self, *, version: int, num_ended: int, num_running: int) -> int:
        """How many more pairs may be begun at `version`; `num_ended` counts all pairs ever ended, trained or not."""
        return (self.max_staleness + version + 1) * self.batch_size - (num_ended + num_running)

    def choose(self, ended: Sequence[tuple[int, int]], running: Sequence[int], *, version: int) -> list[int] | None:
        """The ids of the next batch, or None: wait for running pairs.

        `ended` are (version begun, id) of pairs that wait to be trained, `running` the versions of those not ended.
        """
        if len(ended) < self.batch_size:
            return None
        order = sorted(ended)
        rest = sorted([begun for begun, _ in order[self.batch_size :]] + list(running))
        for position, begun in enumerate(rest):
            # The batch of version + 1 holds the first batch_size of the rest, the next batch the next ones.
            if version + 1 + position // self.batch_size > begun + self.max_staleness:
                return None
        return [pair_id for _, pair_id in order[: self.batch_size]]
