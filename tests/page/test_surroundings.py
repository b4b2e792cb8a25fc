"""What is around the answers: keys, a server that is gone, the training run, light and dark, narrow, the keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the page is tested in a browser; pip install playwright")
from playwright.sync_api import Page, Route, expect

from mope_bb.evaluation.page import document, heading
from mope_bb.training.metrics import StepMetrics, row_of
from tests.page.conftest import Open
from tests.page.served_page import LOCKSTEP, ServedPage, serving

QUESTION = "How do I fix a bike?"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: ten steps, and a report."""
    folder = tmp_path_factory.mktemp("run")
    rows = []
    for step in range(1, 11):
        values = {field.name: step / 10 for field in fields(StepMetrics)} | {"step": step, "length_bias": float("nan")}
        rows.append(json.dumps(row_of(StepMetrics(**values))))  # type: ignore[arg-type]  # all are numbers
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(document("Report", heading("What it brought")), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served(config_path: Path, run_dir: Path) -> Iterator[ServedPage]:
    """`mope-bb serve` of the nano zoo and of a training run."""
    with serving(config_path, *LOCKSTEP, "--run", str(run_dir)) as found:
        yield found


def widest(page: Page) -> int:
    """How far the page's content reaches, in CSS pixels."""
    found = page.evaluate("document.documentElement.scrollWidth")
    assert isinstance(found, int)
    return found


def ground(page: Page) -> str:
    """The colour behind everything."""
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_a_key_is_asked_for_and_kept_in_the_tab(config_path: Path, open_page: Open) -> None:
    with serving(
        config_path, *LOCKSTEP, "--api-key-env", "PAGE_KEY", environment={"PAGE_KEY": "open-sesame"}
    ) as guarded:
        found = open_page(guarded.url)
        dialog = found.page.get_by_role("dialog", name="This server asks for a key")
        dialog.get_by_label("Key").fill("a wrong one")
        dialog.get_by_role("button", name="Continue").click()
        expect(dialog.get_by_text("refused that key")).to_be_visible()
        dialog.get_by_label("Key").fill("open-sesame")
        dialog.get_by_role("button", name="Continue").click()
        expect(found.slider("concise")).to_be_visible()
        assert len(found.answer(QUESTION)) > 0
        found.page.reload()
        expect(found.slider("concise")).to_be_visible()
        expect(dialog).to_be_hidden()
        assert found.page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
        found.forgive("401 (Unauthorized)")


def test_a_server_that_is_gone(config_path: Path, open_page: Open) -> None:
    with serving(config_path, *LOCKSTEP) as first:
        found = open_page(first.url)
        found.answer(QUESTION)
    page = found.page
    found.ask("And a window?")
    expect(page.get_by_role("alert").filter(has_text="No answer.")).to_contain_text("cannot be reached")
    expect(page.get_by_label("Your question")).to_have_value("And a window?")
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert").filter(has=page.get_by_role("button", name="Retry"))).to_be_visible()
    with serving(config_path, *LOCKSTEP, "--port", first.port):
        page.get_by_role("button", name="Retry").click()
        expect(page.get_by_role("button", name="Retry")).to_be_hidden()
        page.get_by_label("Your question").press("Enter")
        found.wait_for_end()
        expect(page.locator(".exchange")).to_have_count(2)  # the one that failed stands no more
        assert len(found.trace()) > 0
    found.forgive("ERR_CONNECTION_REFUSED")


def test_a_training_run_and_its_report(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    page.get_by_role("button", name="Training").click()
    reward = page.get_by_role("figure").filter(has_text="Reward")
    expect(reward.get_by_role("img")).to_have_accessible_name("reward from 0.1 to 1, between 0.1 and 1")
    expect(reward.locator("figcaption .number")).to_have_text("1")
    page.get_by_role("figure").filter(has_text="Loss").locator("svg").hover(position={"x": 3, "y": 20})
    expect(reward.locator("figcaption .number")).to_have_text("0.1")
    expect(page.get_by_text("Correlation of reward and length")).to_have_count(0)  # no number in any row
    expect(page.get_by_text("learning rate")).to_be_hidden()
    page.get_by_text("more columns").click()
    expect(page.get_by_text("learning rate")).to_be_visible()
    report = page.frame_locator('iframe[title="The evaluation\'s report"]')
    expect(report.get_by_role("heading", name="What it brought")).to_be_visible()
    page.get_by_role("button", name="Chat").click()
    expect(page.get_by_label("Your question")).to_be_visible()


def test_a_preference_in_ones_own_words(served: ServedPage, open_page: Open) -> None:
    def read_sentences(route: Route) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, json=reply.json() | {"reads_sentences": True})

    found = open_page(served.url, prepare=lambda page: page.route("**/mope/info", read_sentences))
    page = found.page
    page.get_by_role("textbox", name="In your own words").fill("be concise and friendly")
    trace = found.answer(QUESTION)
    assert found.asked[0]["preference"] == "be concise and friendly"
    assert set(trace[0]["weights"]) == {"concise", "friendly"}
    expect(page.locator(".asked")).to_contain_text("“be concise and friendly”")
    found.slider("grumpy").fill("100")  # a slider that is moved counts again
    found.answer("And a window?")
    assert set(found.asked[1]["preference"]) == {"technical", "concise", "grumpy"}


def test_light_and_dark(served: ServedPage, open_page: Open) -> None:
    light, dark = (open_page(served.url, scheme=scheme).page for scheme in ("light", "dark"))
    grounds = [ground(light), ground(dark)]
    assert grounds[0] != grounds[1]
    light.get_by_role("button", name="Dark theme").click()
    assert ground(light) == grounds[1]
    light.reload()
    assert ground(light) == grounds[1]
    light.get_by_role("button", name="Light theme").click()
    assert ground(light) == grounds[0]


def test_narrow_screens_scroll_down_only(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url, width=360, height=740)
    page = found.page
    expect(found.slider("concise")).to_be_visible()
    widths = [widest(page)]
    found.answer(QUESTION)
    widths.append(widest(page))
    page.locator(".tokens .t").first.click()
    popover = page.get_by_role("tooltip").bounding_box()
    assert popover is not None
    assert popover["x"] >= 0
    assert popover["x"] + popover["width"] <= 360
    page.get_by_role("button", name="Compare").click()
    widths.append(widest(page))
    page.get_by_role("button", name="Training").click()
    expect(page.get_by_role("figure").first).to_be_visible()
    widths.append(widest(page))
    assert max(widths) == 360
    assert page.locator("#run").evaluate("view => view.scrollWidth - view.clientWidth") == 0


def test_roles_and_names(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    page = found.page
    found.answer(QUESTION)
    expect(page.get_by_role("complementary", name="Preference")).to_match_aria_snapshot("""
      - region "Preference":
        - heading "Preference" [level=2]
        - img "technical 50 %, concise 50 %"
        - group "Presets":
          - button "executive" [pressed]
          - button "teacher"
        - text: technical
        - slider "technical": "50"
        - group:
          - combobox "Merge rule"
      - slider "Temperature": "1"
    """)
    expect(page.locator(".exchange")).to_match_aria_snapshot("""
      - paragraph: How do I fix a bike?
      - article "Answer":
        - button "Ask again"
        - group /Answer of \\d+ tokens/
        - img /Weights over \\d+ tokens/
    """)


@pytest.mark.parametrize("width", [1280, 360])
def test_focus_order(served: ServedPage, open_page: Open, width: int) -> None:
    found = open_page(served.url, width=width)
    page = found.page
    found.answer(QUESTION)
    page.get_by_role("link", name="Skip to the question").focus()
    order: list[str] = []
    while not page.evaluate("document.activeElement === document.body"):  # once around
        order.append(page.locator(":focus").aria_snapshot().splitlines()[0])
        page.keyboard.press("Tab")
    wanted = [
        'link "Skip to the question"',
        'button "Colours" [pressed]',
        'button "Compare"',
        'button "New conversation"',
        'button "executive" [pressed]',
        'slider "simple"',
        'slider "grumpy"',
        'slider "Temperature"',
        'button "Ask again"',
        'textbox "Your question"',
        'button "Ask"',
    ]
    positions = [next(i for i, line in enumerate(order) if line.startswith(f"- {start}")) for start in wanted]
    assert positions == sorted(positions)
    nameless = [line for line in order if '"' not in line and "text:" not in line]
    assert nameless == []


def test_streams_may_be_cut_anywhere(served: ServedPage, open_page: Open) -> None:
    found = open_page(served.url)
    first = 'data: {"a": "é 🥳"}\n\n: comment\r\n\r\n'
    text = first + "data: two\r\ndata: lines\r\n\r\nevent: x\rdata:bare\r\rdata: [DONE]\n\n"
    read = """async ([bytes, cuttings]) => {
        const { eventData } = await import("./page/sse.js");
        return Promise.all(cuttings.map(async (cuts) => {
            const found = [];
            const ends = [...cuts, bytes.length];
            const chunks = ends.map((end, index) => new Uint8Array(bytes.slice(ends[index - 1] ?? 0, end)));
            const stream = new ReadableStream({ start(controller) {
                for (const chunk of chunks) controller.enqueue(chunk);
                controller.close();
            } });
            for await (const data of eventData(stream)) found.push(data);
            return found;
        }));
    }"""
    data = list(text.encode())
    cuttings = [[], list(range(1, len(data))), *([cut] for cut in range(1, len(data)))]
    heard = found.page.evaluate(read, [data, cuttings])
    assert heard == [['{"a": "é 🥳"}', "two\nlines", "bare", "[DONE]"]] * len(cuttings)
