"""What a command says of its calls and their cost, once it has ended, also where it has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mope_bb.usage import Account


@contextmanager
def usage_shown(account: Account, cache_hits: Callable[[], int]) -> Iterator[None]:
    """One line on standard error at the end, if any endpoint has told of tokens or the cache has answered."""
    from mope_bb.usage import describe_usage

    try:
        yield
    finally:
        if account.total.num_told or cache_hits():
            click.echo(describe_usage(account, cache_hits=cache_hits()), err=True)
