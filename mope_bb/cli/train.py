"""`mope-bb train`: train the Preference Control Model, with live progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mope_bb.errors import ConfigError, MopeError

if TYPE_CHECKING:
    from rich.progress import Progress

    from mope_bb.training.metrics import StepMetrics
    from mope_bb.training.trainer import TrainingSetup

SILENCE_S: Final = 30.0
ABLATIONS: Final = ("shuffled-rewards", "context-free", "no-features")


@click.command()
@click.argument("run", type=click.Path(), required=False)
@click.option("-c", "--config", "config_path", type=click.Path(), help="The same as RUN.")
@click.option("--prompts", type=click.Path(), help="A text file with a prompt a line, or JSONL.")
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
    from mope_bb.cli.zoo_choice import choose_experts, new_folder, use_cores

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
    check_folder(out, resume=resume)
    use_cores()
    experts = choose_experts(run or config_path, size=zoo_size, seed=zoo_seed, train=settings)
    out = out or experts.config.train.output_dir
    check_folder(out, resume=resume)
    if resume and out is None:
        raise ConfigError("--resume needs the folder of the run", hint="Pass --out, or set `output_dir` in [train].")
    folder = new_folder(out, "runs")
    with open_setup(experts.config, merge, folder, ablation=ablation, is_zoo=experts.zoo is not None) as setup:
        from mope_bb.training.trainer import Trainer

        trainer = Trainer(setup)
        with live(setup) as view:
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


@contextmanager
def open_setup(
    config: Any, merge: str | None, folder: Any, *, ablation: str | None, is_zoo: bool
) -> Iterator[TrainingSetup]:
    """Open everything that a run needs; what is wrong is told before anything is sampled. Raises ConfigError."""
    from mope_bb.inference import choose_device
    from mope_bb.pcm.bench import ExpertBench
    from mope_bb.pcm.model import build_pcm, load_pcm
    from mope_bb.pcm.plans import configured_rule
    from mope_bb.rewards.registry import open_reward_panel
    from mope_bb.training.tasks import load_prompts
    from mope_bb.training.trainer import Ablation, TrainingSetup, reference_expert, served_dimensions

    rule = configured_rule(config, merge, trained="product")
    base = config.roster().base
    if rule.needs_base and base is None:
        raise ConfigError(
            f"the merge rule {rule.name!r} needs a base expert and none is configured",
            hint="Add `base = true` to the expert that the others were fine-tuned from, or pass --merge linear.",
        )
    reference, dimensions = reference_expert(config), served_dimensions(config)
    if config.train.prompts is not None:
        loaded = load_prompts(Path(config.train.prompts))
    elif is_zoo:
        from mope_bb.zoo.judging import zoo_prompts

        loaded = zoo_prompts(held_out=False)
    else:
        raise ConfigError("there are no prompts to train on", hint="Set `prompts` in [train], or pass --prompts.")
    panel = open_reward_panel(config, dimensions)
    try:
        device = choose_device(config.pcm.device)
        styled = [expert.name for expert in config.experts if not expert.base]
        if config.pcm.path is not None:
            pcm = load_pcm(config.pcm.path, device=device)
        elif config.pcm.backbone is not None:
            pcm = build_pcm(config.pcm.backbone, styled, device=device)
        else:
            raise ConfigError("there is no PCM to train", hint="Set `backbone` (or `path`) in [pcm].")
        names = {*styled, reference, *((base,) if base is not None else ())}
        with ExpertBench(config, names) as bench:
            yield TrainingSetup(
                config,
                rule,
                pcm,
                bench,
                panel,
                loaded,
                Path(folder),
                Ablation(
                    shuffles_rewards=ablation == "shuffled-rewards",
                    is_context_free=ablation == "context-free",
                    uses_features=ablation not in ("no-features", "context-free"),
                ),
            )
    finally:
        panel.close()


class View:
    """Progress as lines on standard error: one for each tenth of the run, and for each half minute of a long batch."""

    def __init__(self) -> None:
        self._tenth = -1
        self._last_line = time.monotonic()

    def show_step(self, metrics: StepMetrics, share: float) -> None:
        """A batch was learned from."""
        if int(share * 10) > self._tenth:
            self._tenth = int(share * 10)
            self._print(describe(metrics))

    def show_answers(self, num_done: int, num_answers: int) -> None:
        """A batch is being sampled."""
        if time.monotonic() - self._last_line > SILENCE_S:
            self._print(f"sampling: {num_done} of {num_answers} answers")

    def _print(self, line: str) -> None:
        self._last_line = time.monotonic()
        print(line, file=sys.stderr, flush=True)


class BarView(View):
    """Progress as a bar on a terminal."""

    def __init__(self, bar: Progress, rule: str) -> None:
        super().__init__()
        self._bar = bar
        self._task = bar.add_task(f"training ({rule}) ...", total=1.0)

    def show_step(self, metrics: StepMetrics, share: float) -> None:
        self._bar.update(self._task, description=describe(metrics), completed=min(share, 1.0))

    def show_answers(self, num_done: int, num_answers: int) -> None:
        if num_done < num_answers:
            self._bar.update(self._task, description=f"sampling: {num_done} of {num_answers} answers")


@contextmanager
def live(setup: TrainingSetup) -> Iterator[View]:
    """Progress on standard error, by what it is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield View()
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield BarView(bar, setup.rule.name)


def describe(metrics: StepMetrics) -> str:
    """One step in one line."""
    align = "" if math.isnan(metrics.sign_align) else f" · sign align {metrics.sign_align:.2f}"
    dropped = f" · {metrics.num_dropped} dropped" if metrics.num_dropped else ""
    reward = f"{metrics.reward:.3f} ± {1.96 * metrics.reward_sem:.3f}"
    return (
        f"batch {metrics.step} · reward {reward} · loss {metrics.loss:.4f}{align}"
        f" · weights' entropy {metrics.weights_entropy:.2f}{dropped} · {metrics.seconds:.0f} s"
    )
