"""`mope-bb zoo`: the embedded tiny experts."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path

import click

from mope_bb.errors import ConfigError


@click.group()
def zoo() -> None:
    """Build and serve the embedded tiny experts."""


@zoo.command()
@click.option(
    "--size",
    default="tiny",
    show_default=True,
    help="tiny, clean (without side effects), nano (quick and rough) or gpu.",
)
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal models on one machine.")
def build(size: str, seed: int) -> None:
    """Train the base, the six experts and their reward models (minutes, once)."""
    from mope_bb.zoo.demo import build_with_bar

    built = build_with_bar(size=size, seed=seed)
    for pole, accuracy in built.rewards.items():
        click.echo(f"reward model {pole}: {accuracy:.1%} of held-out pairs ranked as the grammar does", err=True)
    click.echo(str(built.root))


@zoo.command()
@click.option("--size", default="tiny", show_default=True, help="tiny, clean, nano or gpu.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="Write a mope.toml for these servers here."
)
def serve(size: str, seed: int, config_path: Path | None) -> None:
    """Serve base and experts with llama.cpp until Ctrl-C."""
    from mope_bb import zoo as zoo_package

    with zoo_package.serve(size=size, seed=seed) as server:
        for name, url in server.base_urls.items():
            click.echo(f"{name:<12} {url}")
        if config_path is not None:
            try:
                server.write_config(config_path)
            except OSError as error:
                raise ConfigError(f"{str(config_path)!r} cannot be written: {error.strerror}") from None
            click.echo(f"Wrote {config_path}; try: mope-bb chat --config {config_path} --pref concise", err=True)
        with contextlib.suppress(KeyboardInterrupt):
            click.echo("Serving; Ctrl-C stops.", err=True)
            threading.Event().wait()


@zoo.command(name="list")
def list_() -> None:
    """Show the zoos built so far."""
    from mope_bb.zoo import list_zoos

    found = list_zoos()
    for built in found:
        size = sum(file.stat().st_size for file in built.root.rglob("*") if file.is_file())
        click.echo(f"{built.size:<6} seed {built.seed:<4} {size / 2**20:8.1f} MiB  {built.root}")
    if not found:
        click.echo("No zoo is built yet; `mope-bb zoo build` makes one.", err=True)


@zoo.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(yes: bool) -> None:
    """Delete all zoos built so far."""
    from mope_bb.zoo import clear_zoos, list_zoos

    found = list_zoos()
    if not found:
        click.echo("No zoo is built.", err=True)
        return
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("`zoo clear` needs --yes when nobody can be asked")
        click.confirm(f"Delete {len(found)} zoo(s)?", abort=True)
    clear_zoos()
    click.echo(f"Deleted {len(found)} zoo(s).", err=True)
