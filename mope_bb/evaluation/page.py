"""Small pieces of the report's HTML page. Every piece of text is escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1f23; --soft: #5b6470; --line: #d8dde3; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e8ea; --soft: #9aa4af; --line: #343a41; --card: #1d2125; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1.25rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { max-width: 48rem; } .soft, small { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .2rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tr.group td { font-weight: 600; color: var(--soft); padding-top: .7rem; }
.upright th:not(:first-child) { writing-mode: sideways-lr; text-align: left; }
svg { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
.verdict { border-left: .3rem solid var(--soft); padding: .35rem .8rem; margin: .4rem 0; background: var(--card); }
.better { border-color: #4f9d3a; } .worse { border-color: #d0563f; } .even { border-color: #c98a1b; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; } .answer span { border-radius: .2rem; }
.key span { padding: .1rem .4rem; margin-right: .4rem; border-radius: .2rem; }
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: its text, a colour behind it and what the pointer shows."""

    text: str
    colour: str = ""
    title: str = ""


Row = Sequence[str | Cell] | str
"""The cells of a row; a single text is the heading of the rows that follow."""


def words(text: object) -> str:
    """Anything as text that is safe in HTML, in attributes as well."""
    return escape(str(text), quote=True)


def paragraph(text: str, css: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(css)}>{words(text)}</p>\n"


def heading(text: str, level: int = 2) -> str:
    """A heading of plain text."""
    return f"<h{level}>{words(text)}</h{level}>\n"


def tint(colour: str, strength: float) -> str:
    """`colour` ("#rrggbb") as a translucent one, from none (0) to strong (1): readable behind light and dark text."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{0.65 * min(1.0, max(0.0, strength)):.2f})"


def span(text: str, colour: str, title: str = "") -> str:
    """A piece of text on a coloured ground."""
    return f'<span style="background:{colour}" title="{words(title)}">{words(text)}</span>'


def table(headings: Sequence[str], rows: Sequence[Row], css: str = "") -> str:
    """A table that scrolls sideways where the window is narrow."""
    head = "".join(f'<th scope="col">{words(text)}</th>' for text in headings)
    body = "".join(_row(row, len(headings)) for row in rows)
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>"
    return f'<div class="wide"><table{_class(css)}>\n{inner}</table></div>\n'


def document(title: str, body: str) -> str:
    """The whole page; it names no other file and no other host."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{words(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _row(row: Row, width: int) -> str:
    if isinstance(row, str):
        return f'<tr class="group"><td colspan="{width}">{words(row)}</td></tr>\n'
    return "<tr>" + "".join(_cell(cell) for cell in row) + "</tr>\n"


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{words(cell)}</td>"
    style = f' style="background:{cell.colour}"' if cell.colour else ""
    title = f' title="{words(cell.title)}"' if cell.title else ""
    return f"<td{style}{title}>{words(cell.text)}</td>"


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""
