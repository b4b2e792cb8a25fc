"""Streams that the zoo cannot be made to send: a grammar's tokens, halves of characters, many experts, broken ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

pytest.importorskip("playwright", reason="the page is tested in a browser; pip install playwright")
from playwright.sync_api import Page, expect

from tests.page.conftest import Open
from tests.page.served_page import ServedPage

QUESTION = "How do I fix a bike?"


def token(text: str, data: bytes, carriers: Mapping[str, float], **other: Any) -> dict[str, Any]:
    """An entry of the field `trace`."""
    weights = dict.fromkeys(carriers, 1 / len(carriers)) if carriers else {}
    entry = {"text": text, "bytes": list(data), "logprob": -0.5, "is_forced": False, "missed_mass": None}
    return {**entry, "weights": weights, "carriers": carriers, "experts": {}, **other}


def stream(trace: Sequence[Mapping[str, Any]], end: str) -> str:
    """Chunks of one token each, then `end`."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": None, "trace": [entry]}]} for entry in trace
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def sending(body: str) -> Callable[[Page], None]:
    """Answers every question with `body`."""

    def prepare(page: Page) -> None:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))

    return prepare


def test_tokens_of_every_kind(served: ServedPage, open_page: Open) -> None:
    trace = [
        token("{", b"{", {}, is_forced=True),
        token("", b"\xf0\x9f", {"concise": 1.0}),
        token("🥳", b"\xa5\xb3", {"concise": 0.5, "friendly": 0.5}),
        token("\n\n", b"\n\n", {"friendly": 1.0}),
        token(" <b>x</b>", b" <b>x</b>", {"friendly": 1.0}, logprob=None, missed_mass=0.25),
        token("", b"", {"friendly": 1.0}),
    ]
    found = open_page(served.url, prepare=sending(stream(trace, "data: [DONE]\n\n")))
    page = found.page
    assert len(found.answer(QUESTION)) == len(trace)
    assert page.locator(".tokens").text_content() == "{🥳\n\n <b>x</b>"
    told = []
    page.locator(".tokens [tabindex='0']").focus()
    for _ in trace:
        told.append(page.get_by_role("tooltip").inner_text())
        page.keyboard.press("ArrowRight")
    assert "Given by the form" in told[0]
    assert "�" in told[1]
    assert "⏎⏎" in told[3]
    assert "␣<b>x</b>" in told[4]
    assert "Missed mass 25 %" in told[4]
    assert "probability" not in told[4]
    assert "<end>" in told[5]
    assert all(box.bounding_box() for box in page.locator(".tokens .t").all())  # none is out of reach


def test_more_experts_than_colours(served: ServedPage, open_page: Open) -> None:
    names = [f"expert{number}" for number in range(18)]
    experts = [{"name": name, "dimension": name, "is_base": False} for name in names]
    other = {"experts": experts, "dimensions": [{"name": name, "text": None} for name in names], "presets": {}}
    trace = [token(f" {name}", f" {name}".encode(), {name: 1.0}) for name in names]

    def prepare(page: Page) -> None:
        sending(stream(trace, "data: [DONE]\n\n"))(page)

        def answer(route: Any) -> None:
            reply = route.fetch()
            route.fulfill(response=reply, json=reply.json() | other)

        page.route("**/mope/info", answer)

    found = open_page(served.url, prepare=prepare)
    found.answer(QUESTION)
    look = "e => { const s = getComputedStyle(e); return [s.backgroundColor, s.textDecorationStyle]; }"
    looks = [tuple(span.evaluate(look)) for span in found.page.locator(".tokens .t").all()]
    assert len(set(looks)) == 18  # a colour comes again with another line
    assert len({ground for ground, _ in looks}) == 8


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ('data: {"error": {"message": "the expert is gone; start it"}}\n\n', "the expert is gone; start it"),
        ("", "connection was lost"),
    ],
)
def test_an_answer_that_breaks_off(served: ServedPage, open_page: Open, end: str, words: str) -> None:
    trace = [token(" Half", b" Half", {"concise": 1.0})]
    found = open_page(served.url, prepare=sending(stream(trace, end)))
    page = found.page
    found.ask(QUESTION)
    expect(page.get_by_role("alert").filter(has_text="The answer broke off.")).to_contain_text(words)
    expect(page.locator(".tokens")).to_have_text("Half")
    expect(page.locator(".facts")).to_contain_text("broken off")
    expect(page.get_by_role("button", name="Ask again")).to_be_visible()
