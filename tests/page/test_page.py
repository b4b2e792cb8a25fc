"""The page does what it shows: real experts, the real server, a real browser."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest

pytest.importorskip("playwright", reason="the page is tested in a browser; pip install playwright")
from playwright.sync_api import Error, expect

from tests.page.conftest import Open
from tests.page.served_page import NUM_TRIES, ServedPage, Visit, percent, shown, strongest

QUESTION = "How do I fix a bike?"
STYLED = ("simple", "technical", "concise", "informative", "friendly", "grumpy")
"""In the order of the configuration, in which they get their colours."""


DRAG = """async (moves) => {
    const slider = (name) => document.getElementById(`slider-A-${name}`);
    for (let move = 1; move <= moves; move += 1) {
        slider("technical").value = slider("concise").value = 50 - (50 * move) / moves;
        slider("grumpy").value = (100 * move) / moves;
        slider("grumpy").dispatchEvent(new Event("input", { bubbles: true }));
        await new Promise((resolve) => setTimeout(resolve, 10));
    }
}"""
"""Many positions in a short time, of which the last must be the one that counts: all of it grumpy."""


def weights_shown(found: Visit, index: int) -> dict[str, str]:
    """What the popover says of a token that the pointer rests on: expert -> weight."""
    found.page.locator(f".tokens [data-index='{index}']").hover()
    opinions = found.page.locator("#token-popover .opinion")
    names = opinions.locator("h3").all_text_contents()
    return dict(zip(names, opinions.locator(".bar:nth-of-type(1) .number").all_text_contents(), strict=True))


def test_an_answer_shows_who_wrote_it(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    trace = found.long_answer(QUESTION)
    assert page.locator(".tokens").text_content() == "".join(entry["text"] for entry in trace)
    classes = [span.get_attribute("class") or "" for span in page.locator(".tokens .t").all()]
    carried_most = [STYLED.index(strongest(entry["carriers"], STYLED)) for entry in trace]
    assert [int(re.findall(r"\be(\d)\b", names)[0]) for names in classes] == carried_most
    # Without colour the same is said in words and numbers under the answer.
    total = sum(sum(entry["carriers"].values()) for entry in trace)
    for name in ("technical", "concise"):
        share = sum(entry["carriers"][name] for entry in trace) / total
        expect(page.locator(".carrier", has_text=name)).to_have_text(f"{name} {percent(share)}")
    expect(page.locator(".facts")).to_contain_text(f"{len(trace)} tokens")
    expect(page.get_by_role("status").filter(has_text="Answer: ")).to_have_count(1)
    assert found.asked[0]["preference"] == {"technical": 0.5, "concise": 0.5}


def test_colours_can_be_turned_off(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    found.begin(QUESTION, 3)
    token = found.page.locator(".tokens .t").first
    ground = "element => getComputedStyle(element).backgroundColor"
    assert token.evaluate(ground) != "rgba(0, 0, 0, 0)"
    found.page.get_by_role("button", name="Colours").click()
    assert token.evaluate(ground) == "rgba(0, 0, 0, 0)"
    found.wait_for_end()
    assert token.evaluate(ground) == "rgba(0, 0, 0, 0)"


def test_a_slider_acts_in_mid_answer(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    num_moves = 50
    for _ in range(NUM_TRIES):  # an answer may end before it has heard
        page.get_by_role("button", name="executive").click()
        found.begin(QUESTION, 5)
        before = weights_shown(found, 2)
        found.steered.clear()
        page.evaluate(DRAG, num_moves)
        found.wait_for_end()
        told = [entry["weights"] for entry in found.trace()]
        if told[-1] == {"grumpy": 1.0}:
            break
    assert told[0] == {"technical": 0.5, "concise": 0.5}
    assert told[-1] == {"grumpy": 1.0}
    assert 1 <= len(found.steered) < num_moves
    assert found.steered[-1] == {"preference": {"grumpy": 1.0}}
    # The page tells it: in numbers, in colours, in the text, in the chart, and in the chart's description.
    last = len(told) - 1
    assert before == {"technical": "0.50", "concise": "0.50"}
    assert weights_shown(found, last) == {"grumpy": "1.00"}
    expect(page.locator(".tokens [data-index='2']")).to_have_class(re.compile(r"\be[12]\b"))
    expect(page.locator(f".tokens [data-index='{last}']")).to_have_class(re.compile(r"\be5\b"))
    expect(page.locator(".turn").first).to_have_attribute("aria-label", re.compile("^The preference changed: "))
    assert page.locator(".marks line").count() == 2 * page.locator(".turn").count()
    described = re.compile("grumpy from 0 % to 100 %.*changed at token")
    expect(page.locator(".plot")).to_have_attribute("aria-label", described)


def test_tokens_stay_where_they_are(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    places = """() => {
        const { y: top } = document.querySelector(".tokens").getBoundingClientRect();
        return [...document.querySelectorAll(".tokens .t")].slice(0, 10).map((token) => {
            const { x, y, width, height } = token.getBoundingClientRect();
            return [x, y - top, width, height];
        });
    }"""
    found.begin(QUESTION, 10)
    early = found.page.evaluate(places)
    # The last word may still grow, and then wrap.
    texts = found.page.locator(".tokens .t").all_text_contents()[:10]
    whole = max(index for index, text in enumerate(texts) if index == 0 or text[:1].isspace())
    found.page.get_by_role("button", name="curmudgeon").click()
    found.wait_for_end()
    assert found.page.locator(".tokens .t").count() > 10
    assert found.page.evaluate(places)[:whole] == early[:whole]


def test_resting_on_a_token_tells_what_is_known_of_it(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    trace = found.long_answer(QUESTION)
    popover = page.get_by_role("tooltip")
    for index in (0, 4, len(trace) - 1):
        entry = trace[index]
        page.locator(f".tokens [data-index='{index}']").hover()
        expect(popover.locator(".token-name")).to_have_text(shown(entry))
        assert popover.locator("h3").all_text_contents() == list(entry["weights"])
        for name, weight in entry["weights"].items():
            opinion = popover.locator(".opinion", has=page.locator("h3", has_text=name))
            numbers = opinion.locator(".bar .number").all_text_contents()
            assert numbers == [f"{weight:.2f}", percent(entry["carriers"][name])]
            own = [wish["text"] for wish in entry["experts"][name]["top"]]
            listed = opinion.locator("li code").all_text_contents()
            assert listed[: len(own)] == [shown({"bytes": list(text.encode())}) for text in own]
            drawn = opinion.locator("li.drawn code").all_text_contents()
            assert drawn == ([shown(entry)] if entry["experts"][name]["logprob"] is not None else [])
    # The chart shows the same column, and pointing at the chart lights the token.
    expect(page.locator(".plot .cursor").first).to_have_attribute("x", str(len(trace) - 1))
    box = page.locator(".plot").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 3.5 / len(trace), box["y"] + 10)
    expect(page.locator(".tokens .lit")).to_have_attribute("data-index", "3")
    expect(popover).to_be_hidden()


def test_tokens_can_be_walked_with_the_keyboard(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    trace = found.long_answer(QUESTION)
    popover = page.get_by_role("tooltip")
    assert page.locator(".tokens [tabindex]").count() == 1  # one stop for Tab, however long the answer is
    page.locator(".tokens [tabindex='0']").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(popover.locator(".token-name")).to_have_text(shown(trace[3]))
    expect(page.locator(":focus")).to_have_accessible_description(re.compile(r"^.*, token 4, .*Carried by .*Weights: "))
    page.keyboard.press("Enter")
    page.locator(".tokens [data-index='0']").hover()  # pinned: it stays with its token
    page.mouse.move(5, 5)
    expect(popover.locator(".token-name")).to_have_text(shown(trace[3]))
    page.keyboard.press("ArrowLeft")
    expect(popover.locator(".token-name")).to_have_text(shown(trace[2]))
    page.keyboard.press("Escape")
    expect(popover).to_be_hidden()
    page.keyboard.press("End")
    expect(popover.locator(".token-name")).to_have_text(shown(trace[-1]))
    page.keyboard.press("Home")
    expect(popover.locator(".token-name")).to_have_text(shown(trace[0]))
    page.keyboard.press("Tab")
    expect(popover).to_be_hidden()


def test_two_preferences_side_by_side(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    page.get_by_role("button", name="Compare").click()
    second = page.get_by_role("region", name="Preference B")
    second.get_by_role("button", name="curmudgeon").click()
    found.ask(QUESTION)
    found.wait_for_end()
    times = page.evaluate("Promise.all(window.heard)")
    assert max(one["began"] for one in times) < min(one["ended"] for one in times)
    assert [body["preference"] for body in found.asked] == [
        {"technical": 0.5, "concise": 0.5},
        {"concise": 0.4, "grumpy": 0.6},
    ]
    left, right = page.get_by_role("article", name="Answer A"), page.get_by_role("article", name="Answer B")
    expect(left.locator(".result")).to_contain_text("technical")
    expect(right.locator(".result")).to_contain_text("grumpy")
    # Each side goes on with its own answer.
    heard = [left.locator(".tokens").text_content(), right.locator(".tokens").text_content()]
    found.answer("And a window?")
    assert [body["messages"][1]["content"] for body in found.asked[2:]] == heard


def test_an_answer_can_be_stopped(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    for _ in range(NUM_TRIES):  # an answer may end before it is stopped
        found.begin(QUESTION, 4)
        with suppress(Error):
            page.get_by_role("button", name="Stop").click(timeout=2_000)
        found.wait_for_end()
        if "stopped by you" in (page.locator(".facts").text_content() or ""):
            break
    expect(page.locator(".facts")).to_contain_text("stopped by you")
    kept = page.locator(".tokens").text_content()
    found.answer("And a window?")
    assert [message["content"] for message in found.asked[-1]["messages"]] == [QUESTION, kept, "And a window?"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("heading", name="Ask something.")).to_be_visible()
    expect(page.locator(".exchange")).to_have_count(0)


def test_the_last_question_can_be_asked_again(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    found.answer(QUESTION)
    found.page.get_by_role("button", name="curmudgeon").click()
    found.page.get_by_role("button", name="Ask again").click()
    expect(found.page.locator(".result")).to_contain_text("grumpy")
    found.wait_for_end()
    expect(found.page.locator(".answer")).to_have_count(1)
    assert [message["content"] for message in found.asked[1]["messages"]] == [QUESTION]


def test_an_error_is_told_and_the_question_kept(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    for question in (QUESTION, "And a window?"):
        found.answer(question)
    found.ask("One more?")  # the fifth message, and this server takes four
    expect(page.get_by_role("alert").filter(has_text="No answer.")).to_contain_text("at most 4")
    expect(page.get_by_label("Your question")).to_have_value("One more?")
    assert any("400" in text for text in found.complaints)
    found.forgive("400 (Bad Request)")


def test_nothing_is_asked_while_all_sliders_stand_at_0(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    for name in ("technical", "concise"):
        found.slider(name).fill("0")
    found.ask(QUESTION)
    expect(found.page.get_by_text("All sliders stand at 0")).to_be_visible()
    expect(found.page.get_by_label("Your question")).to_have_value(QUESTION)
    assert found.asked == []


def test_what_was_written_is_never_html(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    question = "<img src=x onerror=alert(1)><b>bold</b>"
    found.answer(question)
    expect(found.page.locator(".question")).to_have_text(question)
    assert found.page.locator(".turns img, .turns b:not(.carrier b)").count() == 0


def test_without_a_run_there_is_no_training_view(served: ServedPage, open_page: Open) -> None:
    page = open_page(served.url).page
    expect(page.get_by_role("slider", name="concise")).to_be_visible()
    expect(page.get_by_role("button", name="Training")).to_be_hidden()
