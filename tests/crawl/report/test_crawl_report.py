"""The page says what the stages' reports say, needs nothing else, and text from the crawl is only text in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llm.crawl.counts import DAMAGES, SAMPLES
from llm.crawl.report.page import curve, write
from llm.crawl.report.totals import read_totals
from llm.errors import InputError

NASTY = '<script>alert("x")</script>&amp;</pre><img src="https://evil.example/x.png" onerror=1>'


def toy_report(stage: str, task: int, **changed: Any) -> dict[str, Any]:
    return {
        "stage": stage, "task": task, "config": "c", "input": "i", "documents_in": 100, "documents_out": 60,
        "bytes_in": 10**6, "bytes_out": 4 * 10**5, "seconds": 2.0, "removed": {}, "samples": {}, "damage": [],
        "damage_count": 0, "histograms": {},
    } | changed  # fmt: skip


def toy_reports(out: Path) -> None:
    """Two tasks of two stages, with all that a report can hold."""
    damage = [{"source": NASTY, "offset": 123456789, "what": "gzip member ends early"}]
    for task in range(2):
        samples = {"gopher.words": [f"sample {task} {i}" for i in range(SAMPLES - 1)], "url.blocked": [NASTY]}
        for stage, changed in {
            "filter": {
                "removed": {"gopher.words": 30 + task, "url.blocked": 9}, "samples": samples,
                "histograms": {"language": {"en": 7, "de": 5, NASTY: 1}, "length": {"1024": 3, "256": 4, "65536": 2}},
            },
            "extract": {"damage": damage, "damage_count": 1, "documents_out": 100, "removed": {"empty": 2}},
        }.items():  # fmt: skip
            folder = out / stage
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{task:05}.json").write_text(json.dumps(toy_report(stage, task, **changed)))
            (folder / f"{task:05}.other.json").write_text("{}")
        (folder / "settings.json").write_text("{}")


class Page(HTMLParser):
    """The tags and the text of a page; every tag is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = list[str](), set[str](), ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_tasks_are_added_up_in_the_order_of_the_chain(tmp_path: Path) -> None:
    toy_reports(tmp_path)
    extract, filtered = read_totals(tmp_path)
    assert (extract.stage, filtered.stage) == ("extract", "filter")
    assert (extract.tasks, extract.documents_in, extract.documents_out, extract.seconds) == (2, 200, 200, 4.0)
    assert (extract.damage_count, len(extract.damage)) == (2, 2)
    assert filtered.removed == {"gopher.words": 61, "url.blocked": 18}
    assert filtered.samples["gopher.words"] == ["sample 0 0", "sample 0 1", "sample 1 0"]
    assert filtered.histograms["language"] == {"en": 14, "de": 10, NASTY: 2}


def test_only_the_first_damage_is_listed(tmp_path: Path) -> None:
    (tmp_path / "extract").mkdir()
    damage = [{"source": f"{i}", "offset": 0, "what": ""} for i in range(DAMAGES)]
    for task in range(2):
        report = toy_report("extract", task, damage=damage, damage_count=DAMAGES)
        (tmp_path / f"extract/{task:05}.json").write_text(json.dumps(report))
    (totals,) = read_totals(tmp_path)
    assert (len(totals.damage), totals.damage_count) == (DAMAGES, 2 * DAMAGES)
    assert "200 in all, of which 100 are listed" in write(tmp_path).read_text()


def test_the_page_says_what_the_reports_say(tmp_path: Path) -> None:
    toy_reports(tmp_path)
    page = Page(write(tmp_path).read_text())
    for words in ("gopher.words: 61 (30.5%)", "sample 1 0", "gzip member ends early", "123456789", "65536", "60.0%"):
        assert words in page.text
    lengths = page.text.index("filter: length, in")
    places = [page.text.index(f"\n{key}\n", lengths) for key in ("256", "1024", "65536")]
    assert places == sorted(places), "lengths in their order"
    assert page.text.index("\nen\n") < page.text.index("\nde\n"), "languages by their counts"


def test_text_from_the_crawl_is_only_text(tmp_path: Path) -> None:
    toy_reports(tmp_path)
    text = write(tmp_path).read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image", "use", "a", "base"}
    assert page.text.count(NASTY) >= 3, "a sample, a key and a source"
    quoted = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?\w""", text)
    assert quoted == [], "no attribute or rule that fetches"


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path) -> None:
    (tmp_path / "filter").mkdir()
    report = toy_report("filter", 0, removed={"r": 1}, samples={"r": ["\ud83d"]})
    (tmp_path / "filter/00000.json").write_text(json.dumps(report))
    assert Page(write(tmp_path).read_text()).text


@pytest.mark.parametrize("changed", [{"documents_in": 0, "bytes_in": 0}, {"seconds": 0.0}, {"documents_out": 0}])
def test_a_page_is_drawn_of_little(tmp_path: Path, changed: dict[str, Any]) -> None:
    (tmp_path / "extract").mkdir()
    (tmp_path / "extract/00000.json").write_text(json.dumps(toy_report("extract", 0, **changed)))
    text = write(tmp_path).read_text()
    assert "What is left" in Page(text).text
    assert not re.search(r"\b(?:nan|inf)\b", text)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stage": "extract", "removed": 3}'])
def test_what_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "extract").mkdir()
    (tmp_path / "extract/00000.json").write_text(content)
    with pytest.raises(InputError, match=r"extract/00000\.json is no report"):
        write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_reports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no reports"):
        write(tmp_path)


def test_tokens_per_byte_are_told(tmp_path: Path) -> None:
    (tmp_path / "tokenize").mkdir()
    for task in range(2):
        counts = {"tokens": {"train": 150, "validation": 10}, "bytes": {"train": 600, "validation": 20}}
        (tmp_path / f"tokenize/{task:05}.json").write_text(json.dumps(toy_report("tokenize", task, histograms=counts)))
    cells = re.findall(r"<td>([^<]*)</td>", write(tmp_path).read_text())
    assert [*cells[-10:]] == ["train", "300", "1.2 KB", "0.25", "4", "validation", "20", "40 B", "0.5", "2"]


def measured() -> dict[str, Any]:
    bins = [{"from": i / 10, "pairs": i, "expected": i / 20, "found": i / 16} for i in range(10)]
    line = [(i / 10, (i / 10) ** 2) for i in range(11)]
    return {"curve": line, "midpoint": 0.7071, "recall": bins, "dropped": [0] * 9 + [1234]}


def test_the_curve_is_drawn_with_what_was_measured(tmp_path: Path) -> None:
    toy_reports(tmp_path)
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/curve.json").write_text(json.dumps(measured()))
    text = write(tmp_path).read_text()
    assert text.count("<circle") == 9, "one for each bin with pairs"
    assert {"similarity 0.71", "56.2%", "45.0%", "1,234"} <= set(
        re.findall(r"similarity 0\.71|56\.2%|45\.0%|1,234", text)
    )
    (tmp_path / "cluster/curve.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        write(tmp_path)


def test_a_curve_goes_through_its_points() -> None:
    text = curve([(0.0, 0.0), (0.5, 0.25), (1.0, 1.0)], [(0.5, 1.0)], "similarity", "found")
    assert {"svg", "polyline"} <= Page(text).tags and "similarity" in Page(text).text
    assert 'points="40.0,170.0 390.0,131.2 740.0,15.0"' in text
    assert 'cx="390.0" cy="15.0"' in text
