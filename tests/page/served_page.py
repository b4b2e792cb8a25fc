"""The page as people meet it: `mope-bb serve` in a process of its own, experts some way off, and a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Playwright, Request, ViewportSize, expect

from mope_bb.zoo.serving import ZooServer
from tests.relay import delayed

BROWSER_ARGUMENTS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SERVER_TABLE: Final = "\n[server]\ndefault_max_tokens = 64\nmax_messages = 4\nshutdown_timeout_s = 1\n"
LOCKSTEP: Final = ("--decoding", "lockstep")
"""Token by token, at an even pace."""
HEAR: Final = """
const ask = window.fetch;
window.heard = [];
window.fetch = async (path, options) => {
  const began = performance.now();
  const reply = await ask(path, options);
  if (String(path).endsWith("/chat/completions")) {
    const body = reply.clone().text().catch(() => "");
    window.heard.push(body.then((text) => ({ text, began, ended: performance.now() })));
  }
  return reply;
};
"""
"""Browsers forget the body of a stream once a page has read it."""
NUM_TRIES: Final = 20


@contextmanager
def serving(config_path: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[ServedPage]:
    """`mope-bb serve` on a free port, until the block is left."""
    command = [sys.executable, "-m", "mope_bb", "serve", "-c", str(config_path), "--no-log", *arguments]
    if "--port" not in arguments:
        command += ["--port", "0"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first.startswith("Page: "), f"the server did not come up: {first!r}"
        yield ServedPage(first.removeprefix("Page: ").strip(), process)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@dataclass(frozen=True)
class ServedPage:
    """Where it is, and what serves it."""

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> str:
        """The port, as the command line takes it."""
        return str(urlsplit(self.url).port)


@contextmanager
def slowly_answering(experts: ZooServer, folder: Path, *, delay_s: float = 0.02) -> Iterator[Path]:
    """A configuration whose experts are `delay_s` away, each way, so that there is a middle of an answer."""
    with delayed(experts.base_urls, delay_s) as urls:
        path = folder / "mope.toml"
        replace(experts, base_urls=urls).write_config(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(SERVER_TABLE)
        yield path


def open_browser(playwright: Playwright) -> Browser:
    """The system's Chromium with a fresh profile."""
    return playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(BROWSER_ARGUMENTS))


@dataclass
class Visit:
    """A page, and everything it did that a good page does not do."""

    page: Page
    host: str
    strays: list[str] = field(default_factory=list)
    """Requests to other hosts."""
    complaints: list[str] = field(default_factory=list)
    """Console errors and warnings, errors of scripts, violations of the content security policy."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of POST /v1/chat/completions."""
    steered: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of POST /v1/chat/completions/{id}/preference."""

    def __post_init__(self) -> None:
        self.page.on("request", self._note_request)
        self.page.on("console", self._note_message)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note_request(self, request: Request) -> None:
        if urlsplit(request.url).netloc != self.host:
            self.strays.append(request.url)
        if request.method == "POST":
            bodies = self.steered if request.url.endswith("/preference") else self.asked
            bodies.append(json.loads(request.post_data or "null"))

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def forgive(self, *parts: str) -> None:
        """Strike out complaints that hold one of `parts`: a test asked for them."""
        self.complaints = [text for text in self.complaints if not any(part in text for part in parts)]

    def ask(self, question: str) -> None:
        """Type a question and send it."""
        self.page.get_by_label("Your question").fill(question)
        self.page.keyboard.press("Enter")

    def begin(self, question: str, num_tokens: int) -> None:
        """Until an answer runs that has so many tokens. How long an answer gets is up to chance: so several tries."""
        self.slider("Temperature").fill("2")  # where the end is less likely
        last = ".exchange:last-child"
        for _ in range(NUM_TRIES):
            self.page.get_by_role("button", name="New conversation").click()
            self.ask(question)
            self.page.locator(f"{last} [data-index='{num_tokens - 1}'], {last} .answer:not(.running)").first.wait_for()
            if self.page.locator(f"{last} .answer.running").count():
                return
        raise AssertionError(f"{NUM_TRIES} answers ended within {num_tokens} tokens")

    def slider(self, name: str) -> Locator:
        """The slider of this name that can be seen."""
        return self.page.get_by_role("slider", name=name, exact=True)

    def wait_for_end(self) -> None:
        """Until an answer has begun and none runs."""
        self.page.locator(".exchange:last-child .answer:not(.running)").first.wait_for()
        expect(self.page.locator(".answer.running")).to_have_count(0, timeout=60_000)

    def answer(self, question: str) -> list[dict[str, Any]]:
        """Ask, wait, and give the trace as the server sent it."""
        self.ask(question)
        self.wait_for_end()
        return self.trace()

    def long_answer(self, question: str) -> list[dict[str, Any]]:
        """The same with more than 5 tokens: how long an answer gets is up to chance, so several conversations."""
        for _ in range(NUM_TRIES):
            if len(trace := self.answer(question)) > 5:
                return trace
            self.page.get_by_role("button", name="New conversation").click()
        raise AssertionError(f"{NUM_TRIES} answers ended within 5 tokens")

    def trace(self) -> list[dict[str, Any]]:
        """That of the last answer, which has ended."""
        return trace_of(self.page.evaluate("window.heard.at(-1)")["text"])


def visit(
    browser: Browser,
    url: str,
    *,
    width: int = 1280,
    height: int = 800,
    scheme: Literal["light", "dark"] = "light",
    prepare: Callable[[Page], object] = lambda page: None,
) -> Visit:
    """Open the page, after `prepare`; the caller closes the context."""
    size: ViewportSize = {"width": width, "height": height}
    page = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce").new_page()
    page.add_init_script(HEAR)
    prepare(page)
    found = Visit(page, urlsplit(url).netloc)
    page.goto(url)
    # It is ready with its sliders, or asks for a key.
    page.locator(".slider, dialog[open]").first.wait_for()
    return found


def trace_of(stream: str) -> list[dict[str, Any]]:
    """The field `trace` of all chunks of a streamed answer."""
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return [entry for chunk in chunks for choice in chunk["choices"] for entry in choice.get("trace", ())]


def shown(entry: Mapping[str, Any]) -> str:
    """A token's piece as the page writes it."""
    text = bytes(entry["bytes"]).decode(errors="replace") if entry["bytes"] else "<end>"
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def percent(share: float) -> str:
    """A share as the page writes it."""
    # As JavaScript rounds: halves go up.
    whole = int(share * 100 + 0.5)
    return "<1 %" if whole == 0 and share > 0 else f"{whole} %"


def strongest(shares: Mapping[str, float], names: Sequence[str]) -> str:
    """Who carried most; of equals the first in `names`."""
    return max((name for name in names if name in shares), key=lambda name: shares[name])
