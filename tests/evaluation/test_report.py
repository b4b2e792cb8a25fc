"""The report: one well-formed file that asks no other host, escapes what models wrote, and follows the data."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mope_bb.errors import ConfigError
from mope_bb.evaluation.report import build_report, write_report
from mope_bb.evaluation.results import Evaluation, MethodKind
from tests.evaluation.synthetic import QUALITY, evaluation_of, whole_evaluation

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Reads a page strictly: every element closed in order; collects attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """An evaluation with everything."""
    return whole_evaluation()


@pytest.fixture(scope="module")
def page(evaluation: Evaluation) -> str:
    """Its report."""
    return build_report(evaluation)


def test_sections(page: str) -> None:
    """The page is well-formed and has every section, four kinds of plots and the facts."""
    reader = Reader(page)
    for part in (
        "MoPE product beats the best training-free black-box method (product (untrained))",
        "All methods",
        "Win rates, method against method",
        "Each dimension by itself",
        "Learning curves",
        "Who is asked when",
        "Answers, coloured by expert",
        "Seeing only the top k",
        "Ablations",
        "The same question, every method",
        "How do I fix thing 0?",
        "torch 2.13.0",
    ):
        assert part in reader.text
    assert reader.tags["svg"] == 6
    assert reader.tags["h1"] == 1


def test_ids_are_unique(page: str) -> None:
    """No two elements share an id, though the plots are drawn one by one; every reference leads to one."""
    ids = Counter(value for name, value in Reader(page).attributes if name == "id")
    assert set(ids.values()) == {1}
    used = {a or b for a, b in re.findall(r'url\(#(.*?)\)|href="#(.*?)"', page)}
    assert used
    assert used <= set(ids)


def test_no_other_host(page: str) -> None:
    """Nothing is fetched: no script, no import, no link or source beyond the page itself."""
    reader = Reader(page)
    assert reader.tags["script"] == reader.tags["link"] == reader.tags["img"] == 0
    assert "@import" not in page
    assert "url(http" not in page
    fetching = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}
    assert all(value.startswith("#") for name, value in reader.attributes if name in fetching)
    # Of all addresses only the names of XML's own vocabularies may be there.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }


def test_what_models_wrote_is_escaped(evaluation: Evaluation) -> None:
    """Markup in answers, questions, names, tokens and facts is shown as text, in plots as well."""
    evil = "<script>alert('1')</script>\"&$x_1$"
    coloured = evaluation.coloured[0]
    hurt = replace(
        evaluation,
        methods=[replace(evaluation.methods[0], name=evil, description=evil), *evaluation.methods[1:]],
        answers=[
            replace(answer, method=evil if answer.method == "base" else answer.method, text=evil)
            for answer in evaluation.answers
        ],
        studies=[replace(evaluation.studies[0], title=evil, explanation=evil)],
        coloured=[replace(coloured, question=evil, tokens=[{"text": evil, "shares": {evil: 1.0}, "weights": {}}])],
        weights=[replace(evaluation.weights[0], preference=evil, experts={evil: [0.5] * 10})],
        curves=[replace(evaluation.curves[0], name=evil)],
        questions=[evil] * 20,
        facts={evil: {evil: evil}},
    )
    page = build_report(hurt)
    assert "<script" not in page
    assert evil in Reader(page).text


def test_names_of_any_script() -> None:
    """A name that matplotlib's font cannot draw is no warning (warnings are errors here)."""
    assert "專家 🚲" in build_report(evaluation_of({"專家 🚲": ("base", 0.0)}, num_prompts=2))


def test_equal_input_gives_equal_pages(page: str) -> None:
    """Two reports of equal evaluations are the same bytes."""
    assert build_report(whole_evaluation()) == page


@pytest.mark.parametrize(
    ("quality", "sentence"), [(1.6, "beats"), (0.0, "is worse than"), (0.95, "cannot be told apart")]
)
def test_the_verdict_follows_the_data(quality: float, sentence: str) -> None:
    """The sentence at the top changes with the answers."""
    changed: dict[str, tuple[MethodKind, float]] = {
        "product (untrained)": QUALITY["product (untrained)"],
        "MoPE product": ("mope", quality),
    }
    verdict = Reader(build_report(evaluation_of(changed))).text
    assert sentence in verdict.split("All methods")[0]


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [("x", "base", "no trained method was evaluated"), ("y", "mope", "no training-free black-box method")],
)
def test_without_a_comparison_there_is_no_verdict(name: str, kind: MethodKind, reason: str) -> None:
    """An evaluation of one method, of one prompt, has a page that claims nothing."""
    assert f"No verdict: {reason}" in Reader(build_report(evaluation_of({name: (kind, 0.0)}, num_prompts=1))).text


def test_written_as_one_file(evaluation: Evaluation, page: str, tmp_path: Path) -> None:
    """The report is one file, in a folder that is made for it; a path that cannot be written is a ConfigError."""
    path = tmp_path / "new" / "report.html"
    write_report(evaluation, path)
    assert path.read_text(encoding="utf-8") == page
    assert [*path.parent.iterdir()] == [path]
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report(evaluation, tmp_path)


def test_without_matplotlib(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing matplotlib says how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError) as caught:
        build_report(evaluation)
    assert caught.value.hint == "pip install 'mope-bb[report]'"
