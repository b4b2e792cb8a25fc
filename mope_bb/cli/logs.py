"""`mope-bb logs`: the chats that were kept, to look at, search, export and delete."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from mope_bb.cli.logs_view import local_time, print_answer, print_briefs
from mope_bb.cli.plain import json_text, plain
from mope_bb.errors import ConfigError

if TYPE_CHECKING:
    from mope_bb.logs import LogEntry
    from mope_bb.logs_file import LogFile, Which

Command = TypeVar("Command", bound=Callable[..., Any])
HOW_TO_FILL = "`mope-bb chat` fills it, unless --no-log or `enabled = false` in [logs] says otherwise."
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
COUNT_OPTION = click.option(
    "-n", "--count", type=click.IntRange(1), default=20, show_default=True, help="How many at most."
)


class ListByDefault(click.Group):
    """`mope-bb logs` lists, and takes the options of `list`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asks_for_help = bool(args) and args[0] in ctx.help_option_names
        if not asks_for_help and (not args or args[0].startswith("-")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=ListByDefault)
def logs() -> None:
    """Look at, search, export and delete the chats that were kept. Without a command: the newest."""


def _which(command: Command) -> Command:
    """The options that say which log is meant."""
    config = click.option(
        "-c", "--config", "config_path", type=click.Path(), help="The log of a mope.toml. Without it: the user's own."
    )
    return config(
        click.option("--path", "log_path", type=click.Path(), metavar="FILE", help="The log in this file.")(command)
    )


def _period(command: Command) -> Command:
    """The options that say which answers are meant."""
    since = click.option("--since", metavar="DATE", help="Begun at this date or time (ISO, local) or later.")
    until = click.option("--until", metavar="DATE", help="Begun no later; a date without a time is meant as a whole.")
    source = click.option("--source", type=click.Choice(["chat", "serve"]), help="Asked for by these alone.")
    return since(until(source(command)))


@logs.command("list")
@_which
@_period
@COUNT_OPTION
@JSON_OPTION
def list_(*, count: int, as_json: bool, **which: str | None) -> None:
    """The newest answers."""
    with _opened(which) as file:
        found = file.newest(count, _meant(which))
        _say_if_empty(file, found)
        print_briefs(found, as_json=as_json, heading="answer")


@logs.command()
@click.argument("words", nargs=-1, required=True)
@_which
@COUNT_OPTION
@JSON_OPTION
def search(*, words: tuple[str, ...], count: int, as_json: bool, **which: str | None) -> None:
    """Answers whose question or text hold all WORDS, or words that begin so; the best first."""
    with _opened(which) as file:
        found = file.search(" ".join(words), count)
        _say_if_empty(file, found)
        print_briefs(found, as_json=as_json, heading="found")


@logs.command()
@click.argument("name", metavar="ID|last")
@_which
@click.option("--trace", is_flag=True, help="Colour the answer by the expert that carried each token.")
@JSON_OPTION
def show(*, name: str, trace: bool, as_json: bool, **which: str | None) -> None:
    """One answer with its conversation and everything that is known of it."""
    with _opened(which) as file:
        number = file.last_id() if name == "last" else _numbers([name])[0]
        if number is None:
            _say_if_empty(file, ())
            return
        entry = _entry(file, number)
    if as_json:
        click.echo(json_text(_exported(number, entry)))
        return
    print_answer(number, entry, is_traced=trace)


@logs.command()
@click.argument("names", metavar="[ID]...", nargs=-1)
@_which
@_period
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Write here instead of standard output.")
def export(*, names: tuple[str, ...], output: str | None, **which: str | None) -> None:
    """Everything as JSON, one object per answer on a line of its own, the oldest first."""
    with _opened(which) as file:
        chosen = _meant(which)
        if names and (chosen.since or chosen.until or chosen.source):
            raise ConfigError("IDs and --since, --until or --source both say what to export", hint="Leave one out.")
        ids = _existing(file, _numbers(names)) if names else file.ids(chosen)
        num_written = 0
        with _output(output) as stream:
            for number in ids:
                if not file.has(number):  # deleted by another process meanwhile
                    continue
                stream.write(f"{json_text(_exported(number, _entry(file, number)))}\n")
                num_written += 1
        if output is not None:
            click.echo(f"Wrote {num_written:,} answers to {plain(output)}.", err=True)


@logs.command()
@_which
@JSON_OPTION
def stats(*, as_json: bool, **which: str | None) -> None:
    """How much is kept, and since when."""
    with _opened(which) as file:
        totals = file.totals()
        _say_if_empty(file, range(totals["num_answers"]))
    if as_json:
        click.echo(json_text(totals))
        return
    sources = ", ".join(f"{source} {count:,}" for source, count in totals["by_source"].items())
    for key, value in (
        ("file", totals["path"]),
        ("answers", f"{totals['num_answers']:,}" + (f" ({sources})" if sources else "")),
        ("conversations", f"{totals['num_conversations']:,}"),
        ("failed", f"{totals['num_errors']:,}"),
        ("tokens", f"{totals['num_tokens']:,}"),
        ("bytes", f"{totals['num_bytes']:,} (traces {totals['num_trace_bytes']:,})"),
        ("first", local_time(totals["first"])),
        ("last", local_time(totals["last"])),
    ):
        click.echo(f"{key:<14}{plain(value)}")


@logs.command()
@click.argument("names", metavar="[ID]...", nargs=-1)
@_which
@click.option("--before", metavar="DATE", help="All that were begun before this date or time (ISO, local).")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(*, names: tuple[str, ...], before: str | None, everything: bool, yes: bool, **which: str | None) -> None:
    """Delete answers for good: what they held is overwritten."""
    from mope_bb.logs_file import Which

    if bool(names) + (before is not None) + everything != 1:
        raise ConfigError("what is to be deleted: IDs, --before DATE or --all; one of them")
    until = None if before is None else _moment(before, is_end=False)
    with _opened(which) as file:
        ids = _existing(file, _numbers(names)) if names else list(file.ids(Which(until=until)))
        if not ids:
            click.echo("There is nothing to delete.", err=True)
            return
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError("`logs delete` needs --yes when nobody can be asked")
            click.confirm(f"Delete {len(ids):,} answers from {file.path} for good?", abort=True)
        click.echo(f"Deleted {file.delete(ids):,} answers.", err=True)


@logs.command("path")
@_which
def path_(**which: str | None) -> None:
    """Where the log is."""
    click.echo(_locate(which))


def _locate(which: dict[str, str | None]) -> Path:
    """The file that the options name. Raises ConfigError."""
    from mope_bb.config import load_config
    from mope_bb.logs import log_path

    config_path, chosen = which["config_path"], which["log_path"]
    if config_path is not None and chosen is not None:
        raise ConfigError("--config and --path both say which log is meant", hint="Leave one of them out.")
    if config_path is not None:
        chosen = load_config(config_path).logs.path
    return log_path(chosen)


@contextlib.contextmanager
def _opened(which: dict[str, str | None]) -> Iterator[LogFile]:
    """The log that the options name; ends the command where there is none yet. Raises ConfigError."""
    from mope_bb.logs_file import LogFile, explain

    path = _locate(which)
    if not path.exists():
        click.echo(f"There is no log at {path} yet. {HOW_TO_FILL}", err=True)
        click.get_current_context().exit(0)
    try:
        with LogFile(path) as file:
            yield file
    except sqlite3.Error as error:
        raise explain(path, error) from None


def _say_if_empty(file: LogFile, found: Sequence[object]) -> None:
    if not found:
        nothing = "Nothing was found." if file.last_id() is not None else f"The log {file.path} is empty. {HOW_TO_FILL}"
        click.echo(nothing, err=True)


def _meant(which: dict[str, str | None]) -> Which:
    from mope_bb.logs_file import Which

    since, until = which["since"], which["until"]
    return Which(
        None if since is None else _moment(since, is_end=False),
        None if until is None else _moment(until, is_end=True),
        which["source"],
    )


def _moment(text: str, *, is_end: bool) -> str:
    """A date or time of a flag as it stands in the log; `is_end`: a date is meant with the whole of its day."""
    from mope_bb.logs import utc_text

    try:
        moment = datetime.fromisoformat(text)
        is_day = len(text) <= len("2026-11-25")
        return utc_text(moment + timedelta(days=1 if is_end and is_day else 0))
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{text!r} is no date or time", hint='Write "2026-11-25" or "2026-11-25T18:30", in local time.'
        ) from None


def _numbers(names: Iterable[str]) -> list[int]:
    for name in names:
        if not (name.isascii() and name.isdigit() and len(name) <= 18):
            raise ConfigError(f"{name!r} is no id of an answer", hint="`mope-bb logs` lists them in its first column.")
    return list(dict.fromkeys(map(int, names)))


def _existing(file: LogFile, ids: list[int]) -> list[int]:
    for number in ids:
        if not file.has(number):
            raise _missing(number)
    return ids


def _missing(number: int) -> ConfigError:
    return ConfigError(f"there is no answer {number} in the log", hint="`mope-bb logs` lists those that there are.")


def _entry(file: LogFile, number: int) -> LogEntry:
    """Raises ConfigError where there is none, or a damaged one."""
    from mope_bb.logs import opened_entry

    found = file.get(number)
    if found is None:
        raise _missing(number)
    try:
        return opened_entry(*found)
    except ValueError as error:
        raise ConfigError(
            f"answer {number} in the log cannot be read: {error}", hint=f"`mope-bb logs delete {number}` removes it."
        ) from None


def _exported(number: int, entry: LogEntry) -> dict[str, Any]:
    """Everything about one answer, as JSON."""
    document: dict[str, Any] = {"id": number}
    document |= {field.name: getattr(entry, field.name) for field in fields(entry)}
    document["tool_calls"] = [asdict(call) for call in entry.tool_calls]
    if entry.trace is not None:
        document["trace"] = [
            {
                "bytes": list(token.data),
                "token_id": token.token_id,
                "logprob": token.logprob,
                "weights": token.weights,
                "carriers": token.carriers,
                "missed_mass": token.missed_mass,
                "is_forced": token.is_forced,
                "drawn_by": token.drawn_by,
            }
            for token in entry.trace
        ]
    return document


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[IO[str]]:
    """Standard output, or a file that is there when it is whole, and for nobody but the user."""
    if path is None:
        yield sys.stdout
        return
    target = Path(path)
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be written: {error.strerror}", hint="Pass another --output.") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            yield stream
        Path(partial).replace(target)
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be written: {error.strerror}", hint="Pass another --output.") from None
    finally:
        Path(partial).unlink(missing_ok=True)
