"""The page: whole, self-contained, escaped."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from batchwright import report as reports
from batchwright.report import ceiling
from batchwright.report.ceiling import Ceiling
from batchwright.report.make_report import make_report
from batchwright.report.page import render_page
from batchwright.report.read import read_job
from tests.report.made import KILLED_RUN, WHOLE_RUN, make_job

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """What a page consists of; tags must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        for name in ("href", "src", "action", "data", "srcset"):
            if values.get(name):
                self.links.append(str(values[name]))
        if "id" in values:
            self.ids.append(str(values["id"]))
        if tag == "svg":
            self.labels.append(str(values["aria-label"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(directory: Path, known: Ceiling | None = None) -> tuple[Page, str]:
    text = render_page(make_report(read_job(directory), known))
    return Page(text), text


def test_all_pictures_are_there_and_nothing_else_is_needed(tmp_path: Path) -> None:
    directory = make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN], num_succeeded=9, errors=["b"])
    page, text = page_of(directory, Ceiling(1e4, 5e4))
    assert page.labels == [
        "Where the time went",
        "The job over time",
        "Tokens computed and saved",
        "Lengths of prompts and outputs",
        "Time spent and the least possible",
    ]
    for title in (
        "Prompt tokens computed per second",
        "Tokens generated per second",
        "Where each second went, %",
        "Sequences running",
        "Memory for keys and values in use, %",
        "Prompts by length in tokens",
        "computed again",
    ):
        assert title in page.text
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_colours_are_the_page_s(tmp_path: Path) -> None:
    _, text = page_of(make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN]), Ceiling(1e4, 5e4))
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    light, dark = (
        set(re.findall(r"--([\w-]+):", block))
        for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    )
    assert used <= light
    assert light == dark
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawings)) <= {"#ffffff"}


def test_the_page_is_the_same_each_time(tmp_path: Path) -> None:
    directory = make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN])
    assert page_of(directory)[1] == page_of(directory)[1]


@pytest.mark.parametrize("lines", [[], KILLED_RUN[:1], KILLED_RUN[:2], WHOLE_RUN[1:]])
def test_jobs_of_which_little_is_known(tmp_path: Path, lines: list) -> None:
    page, _ = page_of(make_job(tmp_path, lines))
    assert len(page.labels) == 4
    assert "Not known" in page.text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    code = "<script>alert(1)</script>\"'&{{7*7}}"
    start = b'{"event":"start","model":"<img src=x onerror=alert(2)>","settings":{"a<b":"<i>"}}\n'
    directory = make_job(tmp_path, [start, *WHOLE_RUN[1:]], errors=[code, code])
    hostile = directory.with_name("<b>results&.job")
    directory.rename(hostile)
    page, text = page_of(hostile)
    assert "<script" not in text
    assert "<img" not in text
    assert code in page.text
    assert "<img src=x onerror=alert(2)>" in page.text
    assert "<b>results&" in page.text
    assert "a<b" in page.text


def test_the_functions_for_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_job(tmp_path, [*KILLED_RUN, *WHOLE_RUN], num_succeeded=9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = json.loads(json.dumps(reports.report_json(directory)))
    assert values["roofline"] is None
    assert values["rows"]["succeeded"] == 9
    assert values["times"]["total_s"] == 14.0
    assert Page(reports.report_page(directory)).labels
    monkeypatch.setattr(ceiling, "_measure", lambda key: Ceiling(1e4, 5e4))
    assert not reports.measure_ceiling(directory)  # it is another machine's job
    monkeypatch.setattr("batchwright.job.machine.this_machine", lambda: WHOLE_RUN[0].machine)
    assert reports.measure_ceiling(directory)
    monkeypatch.setattr(ceiling, "_measure", lambda key: Ceiling(9e3, 6e4))
    assert reports.measure_ceiling(directory)  # noise lowers nothing
    assert reports.report_json(directory)["roofline"]["num_runs"] == 2
    assert ceiling.known_ceiling(WHOLE_RUN[0]) == Ceiling(1e4, 6e4)
