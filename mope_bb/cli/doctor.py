"""`mope-bb doctor`: does every endpoint of a configuration do what merging needs?"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mope_bb.config import Config
    from mope_bb.providers.findings import ExpertReport
    from mope_bb.rewards.probe import RewardReport

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "unknown": "dim"}
MARKS = {"ok": "", "warning": "! ", "error": "✗ ", "unknown": "? "}


@click.command()
@click.option("-c", "--config", "config_path", type=click.Path(), help="A mope.toml. Without it: the embedded zoo.")
@click.option("--only", multiple=True, metavar="NAME", help="Look at this expert or dimension only; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="All findings as JSON.")
def doctor(config_path: str | None, only: tuple[str, ...], as_json: bool) -> None:
    """Ask every endpoint, and say what will not work and what to do about it.

    An endpoint is asked about fifteen questions of a few tokens; a remote reward model or a judge one. Exit status 1 if
    the configuration cannot run.
    """
    from mope_bb.cli.chat import open_config

    with open_config(config_path) as config:
        experts, rewards = asyncio.run(examine(config, only))
    can_run = all(report.can_run for report in experts) and all(report.can_run for report in rewards)
    if as_json:
        click.echo(json.dumps(as_document(experts, rewards, can_run=can_run), ensure_ascii=False, indent=2))
    else:
        show(experts, rewards, can_run=can_run)
    if not can_run:
        sys.exit(1)


async def examine(config: Config, only: tuple[str, ...]) -> tuple[list[ExpertReport], list[RewardReport]]:
    """Ask all endpoints, or those that are named. Raises ConfigError for a name that is not there."""
    from mope_bb.errors import ConfigError
    from mope_bb.providers.probe import probe_experts
    from mope_bb.rewards.probe import probe_rewards

    names = [expert.name for expert in config.experts]
    if unknown := [name for name in only if name not in {*names, *config.dimensions}]:
        raise ConfigError(
            f"there is no expert or dimension {unknown[0]!r}", hint=f"Known: {', '.join([*names, *config.dimensions])}."
        )
    chosen = [expert for expert in config.experts if not only or expert.name in only]
    experts = await probe_experts(chosen, lambda name: click.echo(f"asking {name} ...", err=True))
    dimensions = [name for name in config.dimensions if not only or name in only]
    rewards = await asyncio.to_thread(probe_rewards, config, dimensions)
    return experts, rewards


def as_document(experts: list[ExpertReport], rewards: list[RewardReport], *, can_run: bool) -> dict[str, object]:
    """What --json prints."""
    return {
        "can_run": can_run,
        "experts": [
            {
                "name": report.name,
                "provider": report.provider,
                "can_run": report.can_run,
                "findings": [dataclasses.asdict(finding) for finding in report.findings.values()],
            }
            for report in experts
        ],
        "rewards": [dataclasses.asdict(report) for report in rewards],
    }


def show(experts: list[ExpertReport], rewards: list[RewardReport], *, can_run: bool) -> None:
    """A table with a column for each expert, then in words what is not as it should be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mope_bb.providers.findings import CHECKS

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for report in experts:
        table.add_column(f"{report.name}\n({report.provider})")
    for check in CHECKS:
        cells = [report.findings.get(check) for report in experts]
        if any(cells):
            table.add_row(
                check,
                *(
                    Text("-", "dim") if one is None else Text(MARKS[one.verdict] + one.value, STYLES[one.verdict])
                    for one in cells
                ),
            )
    console.print(table)
    for report in experts:
        for finding in report.findings.values():
            if finding.advice:
                mark = Text(f"{finding.verdict if finding.verdict != 'ok' else 'note'}: ", STYLES[finding.verdict])
                console.print(mark + Text(f"{report.name}, {finding.check}: {finding.advice}"), soft_wrap=True)
    for reward in rewards:
        line = Text(f"reward of {reward.dimension} ({reward.kind}): ") + Text(reward.value, STYLES[reward.verdict])
        console.print(line + Text(f" {reward.advice}" if reward.advice else ""), soft_wrap=True)
    console.print("This configuration can run." if can_run else Text("This configuration cannot run.", "bold red"))
