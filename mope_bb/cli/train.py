"""`mope-bb train`: train the Preference Control Model, with live progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from mope_bb.cli.spending import usage_shown
from mope_bb.errors import ConfigError, MopeError

ABLATIONS: Final = ("shuffled-rewards", "context-free", "no-features")


@click.command()
@click.argument("run", type=click.Path(), required=False)
@click.option("-c", "--config", "config_path", type=click.Path(), help="The same as RUN.")
@click.option("--prompts", type=click.Path(), help="Text (a prompt a line), JSONL, or a Hugging Face dataset's folder.")
@click.option("-o", "--out", type=click.Path(), help="Folder of the run; default runs/DATE-TIME.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if one was begun there; else begin it.")
@click.option(
    "--merge",
    type=click.Choice(["linear", "geometric", "product"]),
    help="The merge rule to train for; default: the configuration's, else product.",
)
@click.option("--max-steps", type=int, help="Batches of the run.")
@click.option("--max-minutes", type=float, help="Longest duration; the schedule fits itself to it.")
@click.option("--max-staleness", type=int, help="Versions that the sampling policy may be behind; 0 = synchronous.")
@click.option("--seed", type=int, help="Equal seeds train equally.")
@click.option("--dry-run", is_flag=True, help="Print what the run would ask for, and stop before anything is asked.")
@click.option("--leave-out", multiple=True, metavar="NAMES", help="A combination never to train on; may be repeated.")
@click.option("--ablation", type=click.Choice(ABLATIONS), help="Leave one thing out, to see what it is good for.")
@click.option("--zoo-size", default="tiny", show_default=True, help="Without --config.")
@click.option("--zoo-seed", default=0, show_default=True, help="Without --config.")
def train(  # noqa: PLR0917  # one parameter per flag
    run: str | None,
    config_path: str | None,
    prompts: str | None,
    out: str | None,
    resume: bool,
    merge: str | None,
    max_steps: int | None,
    max_minutes: float | None,
    max_staleness: int | None,
    seed: int | None,
    dry_run: bool,
    leave_out: tuple[str, ...],
    ablation: str | None,
    zoo_size: str,
    zoo_seed: int,
) -> None:
    """Train the Preference Control Model by REBEL from reward-model scores.

    RUN is a mope.toml with a [train] table; without it the embedded zoo is used. The experts stay as they are; learning
    itself asks none of them. The run's folder holds metrics.jsonl, the ledger of all answers and checkpoints/last, a
    Hugging Face folder for `[pcm] path` or `mope-bb chat --pcm`. Ctrl-C saves and ends; --resume goes on, also after a
    kill, and asks no finished answer again.
    """
    from mope_bb.cli.train_setup import learn_along, open_setup, show_estimate
    from mope_bb.cli.train_view import live
    from mope_bb.cli.zoo_choice import choose_experts, new_folder, reading_names, use_cores
    from mope_bb.training.team import join_team

    if run is not None and config_path is not None:
        raise click.UsageError("give the configuration once: as RUN or as --config")
    flags = {
        "prompts": prompts,
        "max_steps": max_steps,
        "max_minutes": max_minutes,
        "max_staleness": max_staleness,
        "seed": seed,
    }
    settings: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    check_flags(settings)
    if leave_out:
        settings["preferences"] = {"leave_out": [names.split(",") for names in leave_out]}
    team = join_team()
    if team.rank == 0:
        check_folder(out, resume=resume)
    use_cores()
    experts = choose_experts(run or config_path, size=zoo_size, seed=zoo_seed, train=settings)
    is_zoo, chosen = experts.zoo is not None, experts.config
    if ablation == "context-free":
        # Scores that depend on the preference alone: it must be read in any form.
        chosen = reading_names(chosen)
    if dry_run:
        show_estimate(chosen, merge, is_zoo=is_zoo)
        return
    if team.rank > 0:
        learn_along(team, chosen, merge, is_zoo=is_zoo)
        return
    out = out or chosen.train.output_dir
    check_folder(out, resume=resume)
    if resume and out is None:
        raise ConfigError("--resume needs the folder of the run", hint="Pass --out, or set `output_dir` in [train].")
    folder = new_folder(out, "runs")
    with open_setup(chosen, merge, folder, ablation=ablation, is_zoo=experts.zoo is not None, team=team) as setup:
        from mope_bb.training.trainer import Trainer

        trainer = Trainer(setup)
        with usage_shown(setup.account, lambda: setup.bench.cache_hits), live(setup) as view:
            try:
                trainer.run(view.show_step, on_answers=view.show_answers, resume=resume)
            except (KeyboardInterrupt, MopeError):
                if trainer.num_steps:
                    where = trainer.checkpoints / "last"
                    click.echo(f"\nStopped; what was learned is saved in {where}. Go on with --resume.", err=True)
                raise
    click.echo(f"Trained {trainer.num_steps} batches; the PCM is in {folder / 'checkpoints' / 'last'}", err=True)
    click.echo(str(folder / "checkpoints" / "last"))


def check_flags(settings: dict[str, Any]) -> None:
    """Refuse wrong numbers before a zoo is built. Raises ConfigError."""
    from mope_bb.config import parse_config

    parse_config({"experts": [{"name": "any", "provider": "local"}], "train": settings}, source="the command line")


def check_folder(out: str | None, *, resume: bool) -> None:
    """A run never writes into another's folder. Raises ConfigError."""
    from mope_bb.training.runs import holds_run

    if out is not None and not resume and holds_run(Path(out)):
        raise ConfigError(
            f"the folder {out!r} holds a run already",
            hint="Pass --resume to go on with it, or another --out; nothing was changed.",
        )
