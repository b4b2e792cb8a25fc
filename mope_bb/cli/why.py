"""An answer coloured by the expert that carried each token."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mope_bb.pcm.merging import Plan
from mope_bb.pcm.readout import carried_by
from mope_bb.text import TextAssembler
from mope_bb.types import END, Answer

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


def print_why(answer: Answer, plan: Plan, console: Console | None = None) -> None:
    """Print the answer in colours, and a table of what each expert carried on average."""
    console = console or Console(highlight=False)
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(plan.experts)}
    totals = dict.fromkeys(plan.experts, 0.0)
    tokens = dict.fromkeys(plan.experts, 0)
    text, assembler = Text(), TextAssembler()
    for step in answer.steps:
        shares = carried_by(step, plan.rule)
        strongest = max(shares, key=lambda name: shares[name])
        tokens[strongest] += 1
        for name, share in shares.items():
            totals[name] += share
        shown = assembler.feed(step.piece) if step.piece != END else "⏹"
        text.append(shown, style=colour[strongest])
    console.print(text)
    table = Table(box=None, pad_edge=False)
    for heading in ("expert", "tokens carried", "mean share", "asked for"):
        table.add_column(heading, justify="left" if heading == "expert" else "right")
    for name, weight in zip(plan.experts, plan.lambdas, strict=True):
        table.add_row(
            Text(name, style=colour[name]),
            str(tokens[name]),
            f"{totals[name] / len(answer.steps):.0%}",
            f"{weight:.0%}",
        )
    console.print(table)
    if any(step.drawn_by is not None for step in answer.steps):
        note = "Without logprobs: an expert was drawn for each token, and drew it alone."
        console.print(Text(note, style="dim"))
