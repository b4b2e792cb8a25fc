"""Write docs/page.png: the default zoo answers, a slider is moved in mid-answer, one token tells of itself.

python -m tests.page.picture [--pcm DIR] [--out docs/page.png] [--dark]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from mope_bb import zoo
from tests.page.served_page import LOCKSTEP, Visit, open_browser, serving, slowly_answering, visit

WANTED_TOKENS = range(40, 64)
"""An answer that fills the picture, and leaves room for the popover below it."""


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pcm", help="a trained PCM, for weights that move by themselves")
    parser.add_argument("--out", default="docs/page.png", type=Path)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    arguments = [*LOCKSTEP, *(["--pcm", given.pcm] if given.pcm else [])]
    with (
        tempfile.TemporaryDirectory() as folder,
        zoo.serve() as experts,
        slowly_answering(experts, Path(folder)) as config_path,
        serving(config_path, *arguments) as served,
        sync_playwright() as playwright,
    ):
        browser = open_browser(playwright)
        found = visit(browser, served.url, scheme="dark" if given.dark else "light")
        found.page.get_by_label("Merge rule").first.select_option("product")
        while not has_steered_answer(found):
            pass
        index = most_telling(found.trace())
        found.page.locator(f".tokens [data-index='{index}']").click()
        found.page.screenshot(path=given.out)
        browser.close()


def has_steered_answer(found: Visit) -> bool:
    """Ask, go from teacher to curmudgeon on the way, and say whether the answer is one to show."""
    page = found.page
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("button", name="teacher").click()
    found.ask("How do I fix a bike?")
    page.locator("[data-index='16'], .answer:not(.running)").first.wait_for()
    page.get_by_role("button", name="curmudgeon").click()
    found.wait_for_end()
    return page.locator(".turn").count() == 1 and len(found.trace()) in WANTED_TOKENS


def most_telling(trace: list[dict[str, Any]]) -> int:
    """The token, not among the first, before which the experts wanted the most different things."""

    def disagreement(entry: dict[str, Any]) -> float:
        favourites = {own["top"][0]["text"] for own in entry["experts"].values()}
        surest: float = max(own["top"][0]["logprob"] for own in entry["experts"].values())
        return len(favourites) - surest / 10

    return max(range(3, len(trace) - 1), key=lambda index: disagreement(trace[index]))


if __name__ == "__main__":
    main()
