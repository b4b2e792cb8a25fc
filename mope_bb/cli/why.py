"""An answer coloured by the expert that carried each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mope_bb.cli.plain import plain
from mope_bb.text import TextAssembler
from mope_bb.types import END, Answer, Piece

if TYPE_CHECKING:
    from mope_bb.pcm.merging import Plan

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


def print_why(answer: Answer, plan: Plan, console: Console | None = None) -> None:
    """Print the answer in colours, and a table of what each expert carried on average."""
    from mope_bb.pcm.readout import carried_by

    print_carried(
        [(step.piece, carried_by(step, plan.rule)) for step in answer.steps],
        dict(zip(plan.experts, plan.lambdas, strict=True)),
        is_drawn=any(step.drawn_by is not None for step in answer.steps),
        console=console,
    )


def print_carried(
    tokens: Sequence[tuple[Piece, Mapping[str, float]]],
    asked_for: Mapping[str, float],
    *,
    is_drawn: bool,
    console: Console | None = None,
) -> None:
    """The same from each piece and how much each expert carried it; nothing carries a piece that the form forced.

    `asked_for`: the weight of each expert; `is_drawn`: experts without logprobs took part.
    """
    console = console or Console(highlight=False)
    # Who steered the answer meanwhile has asked for others before.
    names = list(dict.fromkeys([*asked_for, *(name for _, shares in tokens for name in shares)]))
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    totals, carried = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    text, assembler = Text(), TextAssembler()
    for piece, shares in tokens:
        strongest = max(shares, key=lambda name: shares[name], default=None)
        if strongest is not None:
            carried[strongest] += 1
        for name, share in shares.items():
            totals[name] += share
        shown = plain(assembler.feed(piece)) if piece != END else "⏹"
        text.append(shown, style="dim" if strongest is None else colour[strongest])
    console.print(text)
    table = Table(box=None, pad_edge=False)
    for heading in ("expert", "tokens carried", "mean share", "asked for"):
        table.add_column(heading, justify="left" if heading == "expert" else "right")
    num_asked = sum(bool(shares) for _, shares in tokens)
    for name in names:
        table.add_row(
            Text(plain(name), style=colour[name]),
            str(carried[name]),
            f"{totals[name] / max(num_asked, 1):.0%}",
            f"{asked_for.get(name, 0.0):.0%}",
        )
    console.print(table)
    if is_drawn:
        note = "Without logprobs: an expert was drawn for each token, and drew it alone."
        console.print(Text(note, style="dim"))
