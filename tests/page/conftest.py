"""Fixtures of the page's tests. Without a browser they are skipped, but not on CI."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mope_bb.zoo.serving import ZooServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.page.served_page import ServedPage, Visit

Open = Callable[..., "Visit"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for one module: while Playwright runs, no other event loop can in this thread."""
    missing = [
        *([] if importlib.util.find_spec("playwright") else ["Playwright for Python (pip install playwright)"]),
        *([] if shutil.which("chromium") else ["a program named chromium"]),
    ]
    if missing:
        reason = f"the page is tested in a browser; there is no {' and no '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    from tests.page.served_page import open_browser

    with sync_playwright() as playwright:
        found = open_browser(playwright)
        yield found
        found.close()


@pytest.fixture(scope="module")
def config_path(browser: Browser, nano_experts: ZooServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The nano zoo some way off. (After `browser`, so that nothing is built for tests that are skipped.)"""
    from tests.page.served_page import slowly_answering

    with slowly_answering(nano_experts, tmp_path_factory.mktemp("page")) as path:
        yield path


@pytest.fixture(scope="module")
def served(config_path: Path) -> Iterator[ServedPage]:
    """`mope-bb serve` of the nano zoo."""
    from tests.page.served_page import LOCKSTEP, serving

    with serving(config_path, *LOCKSTEP) as found:
        yield found


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens pages, and at the end asserts that none asked another host for anything or complained."""
    from tests.page.served_page import visit

    visits: list[Visit] = []

    def open_one(url: str, **how: Any) -> Visit:
        visits.append(visit(browser, url, **how))
        return visits[-1]

    yield open_one
    for found in visits:
        found.page.context.close()
    assert [found.strays for found in visits if found.strays] == []
    assert [found.complaints for found in visits if found.complaints] == []
