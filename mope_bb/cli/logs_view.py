"""How `mope-bb logs` shows answers to people."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import click

from mope_bb.cli.plain import first_line, json_text, plain
from mope_bb.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from mope_bb.logs import LogEntry
    from mope_bb.logs_file import Brief

WIDTH_WITHOUT_TERMINAL = 160


def print_answer(number: int, entry: LogEntry, *, is_traced: bool) -> None:
    """One answer with its conversation; `is_traced`: in the colours of its experts. Raises ConfigError."""
    from mope_bb.logs import text_of

    for key, value in _facts(number, entry):
        click.echo(click.style(f"{key:<13}", dim=True) + plain(value))
    for message in entry.messages:
        click.echo(click.style(f"\n{plain(message.get('role', '?'))}", bold=True))
        click.echo(plain(text_of(message.get("content")) or json_text(message.get("content"))))
    click.echo(click.style("\nanswer", bold=True))
    if is_traced:
        _print_trace(number, entry)
    else:
        click.echo(plain(entry.answer))
    for call in entry.tool_calls:
        click.echo(f"{plain(call.name)}({plain(call.arguments)})")


def print_briefs(found: Sequence[Brief], *, as_json: bool, heading: str) -> None:
    """A list of answers: a table for people, or JSON lines."""
    if as_json:
        for brief in found:
            click.echo(json_text(brief._asdict()))
    elif found:
        _print_table(_table(found, heading))


def _table(found: Sequence[Brief], heading: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("when", no_wrap=True)
    table.add_column("source", no_wrap=True)
    table.add_column("preference", ratio=2, no_wrap=True)
    table.add_column("question", ratio=3, no_wrap=True)
    table.add_column(heading, ratio=4, no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for one in found:
        is_failed = one.state not in ("stop", "length", "tool_calls", "stopped")
        said = one.answer or (f"({one.state})" if is_failed or one.state == "tool_calls" else "")
        values = (
            one.id,
            local_time(one.started_at, is_short=True),
            one.source,
            one.preference or "",
            one.question,
            said,
            one.num_tokens,
        )
        # What a user or a model wrote is data, hence `Text`: no markup is read in it.
        table.add_row(*(Text(first_line(value, 200)) for value in values), style="red" if is_failed else None)
    return table


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL).print(table)


def _print_trace(number: int, entry: LogEntry) -> None:
    from mope_bb.cli.why import print_carried
    from mope_bb.types import Piece

    if not entry.trace:
        raise ConfigError(f"answer {number} has no trace", hint="It has no tokens, or was recorded without one.")
    print_carried(
        [(Piece(token.data, token.token_id), token.carriers) for token in entry.trace],
        entry.lambdas,
        is_drawn=any(token.drawn_by is not None for token in entry.trace),
    )


def _facts(number: int, entry: LogEntry) -> Iterator[tuple[str, object]]:
    """What is said of an answer above it."""
    yield "id", f"{number} (conversation {entry.conversation})"
    yield "when", f"{local_time(entry.started_at)}, {_seconds(entry):.1f} s"
    yield "source", f"{entry.source}, mope-bb {entry.version}"
    yield "model", entry.model
    if entry.pcm is not None:
        yield "pcm", entry.pcm
    yield "preference", entry.preference or "all dimensions alike"
    yield "weights", ", ".join(f"{name} {value:.0%}" for name, value in entry.lambdas.items())
    yield "merge", entry.merge
    yield "sampling", ", ".join(f"{name} {value}" for name, value in entry.options.items() if value not in (None, []))
    if entry.seed is not None:
        yield "seed", entry.seed
    yield "tokens", f"{entry.num_prompt_tokens:,} read, {entry.num_completion_tokens:,} answered"
    if entry.dropped:
        yield "without", ", ".join(map(str, entry.dropped))
    if entry.cost is not None:
        yield "cost", f"{entry.cost:.4g}"
    yield "ended by", entry.finish_reason or f"{entry.error_class}: {entry.error_message}"


def _seconds(entry: LogEntry) -> float:
    try:
        began, ended = (datetime.fromisoformat(text) for text in (entry.started_at, entry.ended_at))
        return (ended - began).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def local_time(text: object, *, is_short: bool = False) -> str:
    """A time of the log as the user's clock shows it; `is_short`: without the year where it is this one."""
    try:
        moment, now = datetime.fromisoformat(str(text)).astimezone(), datetime.now()
        return moment.strftime("%m-%d %H:%M" if is_short and moment.year == now.year else "%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):
        return "" if text is None else str(text)
