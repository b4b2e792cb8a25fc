"""`mope-bb cache`: how full the cache of distributions is, whether it is sound, and the only way to empty it."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mope_bb.errors import ConfigError

if TYPE_CHECKING:
    from mope_bb.cache_file import CacheFile, Row

Command = TypeVar("Command", bound=Callable[..., Any])


def _which(command: Command) -> Command:
    """The options that say which cache is meant."""
    config = click.option(
        "-c", "--config", "config_path", type=click.Path(), help="The cache of a mope.toml. Without it: the user's own."
    )
    return config(
        click.option("--path", type=click.Path(), metavar="FOLDER", help="The cache in this folder.")(command)
    )


@click.group()
def cache() -> None:
    """Look at, check and empty the cache of distributions."""


@cache.command()
@_which
def stats(config_path: str | None, path: str | None) -> None:
    """Show where the cache is and how full."""
    folder, max_bytes = _locate(config_path, path)
    if not _is_there(folder):
        return
    with _opened(folder) as file:
        click.echo(f"folder   {folder}")
        click.echo(f"entries  {file.num_entries:,}")
        click.echo(f"bytes    {file.num_bytes:,}")
        click.echo(f"limit    {max_bytes:,} bytes")
        click.echo(f"format   {file.version}")


@cache.command()
@_which
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(config_path: str | None, path: str | None, yes: bool) -> None:
    """Delete all entries, also while others use the cache. What they held must be asked, and paid, again."""
    from mope_bb.cache import FORMAT
    from mope_bb.cache_file import CacheFile, delete_damaged, explain, is_damage

    folder, _ = _locate(config_path, path)
    if not _is_there(folder):
        return
    try:
        with contextlib.closing(CacheFile(folder, version=None)) as file:
            _confirm(f"Delete {file.num_entries:,} entries ({file.num_bytes:,} bytes) from {folder}?", yes=yes)
            click.echo(f"Deleted {file.clear(FORMAT):,} entries.", err=True)
    except (OSError, sqlite3.Error) as error:
        if not is_damage(error):
            raise explain(folder, error) from None
        _confirm(f"The cache in {folder} is damaged ({error}). Delete this folder?", yes=yes)
        try:
            delete_damaged(folder)
        except OSError as failure:
            raise ConfigError(f"{str(folder)!r} cannot be deleted: {failure}") from None
        click.echo("Deleted the damaged cache.", err=True)


@cache.command()
@_which
@click.option("--repair", is_flag=True, help="Remove damaged entries, so that they are asked for again.")
def verify(config_path: str | None, path: str | None, repair: bool) -> None:
    """Read every entry. Exit status 1 if damaged ones are found and not removed."""
    folder, _ = _locate(config_path, path)
    if not _is_there(folder):
        return
    with _opened(folder) as file:
        file.examine()
        num_sound, damaged = 0, list[tuple["Row", str]]()
        with click.progressbar(file.rows(), length=file.num_entries, label="checking", file=sys.stderr) as rows:
            for row in rows:
                problem = _problem_of(row)
                if problem is None:
                    num_sound += 1
                else:
                    damaged.append((row, problem))
        for row, problem in damaged:
            click.echo(f"damaged: {_shown(row.key)}: {problem}")
            if repair:
                file.remove(row)
    outcome = f", {len(damaged):,} damaged{' and removed' if repair else ''}" if damaged else ""
    click.echo(f"{num_sound:,} entries are sound{outcome}.", err=True)
    if damaged and not repair:
        click.echo("`--repair` removes what is damaged; it is then asked for again.", err=True)
        sys.exit(1)


def _locate(config_path: str | None, path: str | None) -> tuple[Path, int]:
    """The folder that the options name, and the limit of its configuration. Raises ConfigError."""
    from mope_bb.cache import cache_folder
    from mope_bb.config import CacheConfig, load_config

    if config_path is not None and path is not None:
        raise ConfigError("--config and --path both say which cache is meant", hint="Leave one of them out.")
    config = CacheConfig(path=path) if config_path is None else load_config(config_path).cache
    return cache_folder(config), config.max_bytes


def _is_there(folder: Path) -> bool:
    """Whether there is a cache; says so where there is none. Raises ConfigError for a folder of something else."""
    from mope_bb.cache_file import FILE_NAME

    try:
        names = [one.name for one in folder.iterdir()]
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise ConfigError(f"{str(folder)!r} cannot be read: {error.strerror}") from None
    if FILE_NAME in names:
        return True
    if names:
        raise ConfigError(f"{str(folder)!r} is no cache of mope-bb: it has no {FILE_NAME}")
    click.echo(f"There is no cache in {folder} yet.", err=True)
    return False


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[CacheFile]:
    """The file in `folder`. Raises ConfigError."""
    from mope_bb.cache import FORMAT
    from mope_bb.cache_file import CacheFile, explain

    try:
        with contextlib.closing(CacheFile(folder, version=FORMAT)) as file:
            yield file
    except (OSError, sqlite3.Error) as error:
        raise explain(folder, error) from None


def _confirm(question: str, *, yes: bool) -> None:
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("`cache clear` needs --yes when nobody can be asked")
        click.confirm(question, abort=True)


def _problem_of(row: Row) -> str | None:
    from mope_bb.cache import open_entry

    if row.value is None:
        return "not as much as bytes of a list"
    try:
        open_entry(row.key, row.value)
    except ValueError as error:
        return str(error)
    return None


def _shown(key: str) -> str:
    """The beginning of a key; what a stranger has put in its place must not reach the terminal as it is."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "?" for letter in key[:12]) or "(no key)"
