"""`mope-bb`: the command group, and the one place where errors become a line, a hint and an exit status."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import click

from mope_bb.errors import ConfigError, MopeError

COMMANDS = {
    "chat": ("mope_bb.cli.chat", "chat", "Ask merged experts, once or in a conversation."),
    "serve": ("mope_bb.cli.serve", "serve", "Serve merged experts as one OpenAI-compatible model, with a page."),
    "train": ("mope_bb.cli.train", "train", "Train the Preference Control Model from reward models."),
    "eval": ("mope_bb.cli.eval", "evaluate", "Compare trained PCMs with everything one can do without training."),
    "doctor": ("mope_bb.cli.doctor", "doctor", "Ask every endpoint, and say what will not work."),
    "init": ("mope_bb.cli.init", "init", "Write a mope.toml from the endpoints at some addresses."),
    "logs": ("mope_bb.cli.logs", "logs", "Look at, search, export and delete the chats that were kept."),
    "cache": ("mope_bb.cli.cache", "cache", "Look at, check and empty the cache of distributions."),
    "zoo": ("mope_bb.cli.zoo", "zoo", "Build and serve the embedded tiny experts."),
}
EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """Imports a command when it runs: `mope-bb --help` must not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), function)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader went away (`mope-bb chat ... | head -1`): not an error, and nothing more can be written.
            # Caught here because click would end with status 1.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mope-bb", prog_name="mope-bb")
@click.option("--debug", is_flag=True, help="Show tracebacks and log messages.")
def cli(debug: bool) -> None:
    """Personalise language models that nobody can retrain.

    Several frozen experts, merged token by token with the preference you ask for.
    """
    import logging

    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s: %(message)s")
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> None:
    """Run the command line; never shows a traceback without --debug."""
    debug = "--debug" in sys.argv
    # Before torch is loaded: its threads must not spin while experts on the same machine need the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = context.command_path if context else "mope-bb"
        status = show_error(ConfigError(error.format_message(), hint=f"See `{command} --help`."), debug=debug)
    except (KeyboardInterrupt, click.Abort):
        status = EXIT_INTERRUPTED
    except MopeError as error:
        status = show_error(error, debug=debug)
    except Exception as error:  # noqa: BLE001  # the last resort of a command line
        if debug:
            traceback.print_exc()
        click.echo(f"error: {type(error).__name__}: {error}", err=True)
        click.echo("hint: this is a bug in mope-bb; `mope-bb --debug ...` shows the traceback.", err=True)
        status = 1
    sys.exit(status)


def show_error(error: MopeError, *, debug: bool) -> int:
    """Write one line and the hint to standard error; the exit status."""
    if debug:
        traceback.print_exception(error)
    click.echo(f"error: {' '.join(str(error).split())}", err=True)
    click.echo(f"hint: {error.hint or 'See `mope-bb --help`.'}", err=True)
    return error.exit_code
