"""What is planted is what the truth says, and a score is what a count by hand gives."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.crawl import deduplication, made_up, score
from benchmarks.crawl import pages as module_of_pages
from benchmarks.crawl.noise import (
    BLOCKED,
    EDITS,
    PER_FILE,
    WORDS,
    Planted,
    edited,
    inflated,
    plant,
    read_truth,
    visible,
    write_truth,
    write_warcs,
)
from benchmarks.crawl.pages import Page, load_pages, page
from benchmarks.crawl.stages import CASES, DATATROVE, OURS, short_texts, up_to, write_texts
from benchmarks.crawl.tables import growth_table, scale_table, stage_table
from llm.crawl.documents import Document
from llm.data.corpus import stdlib_files

TEXT = " ".join(f"word{i} of the sentence number {i} & more." for i in range(60))


def pages(count: int = 30) -> list[Page]:
    languages = ("en", "de", "ru")
    html = [f"<h1>Page {i}</h1><p>{TEXT.replace('word', f'w{i}x')} Größe Москва</p>" for i in range(count)]
    return [Page(f"book/{i}", languages[i % 3], main.replace("&", "&amp;")) for i, main in enumerate(html)]


def planted_pages(folder: Path) -> list[Planted]:
    return list(write_warcs(plant(pages(), 0), folder))


def test_the_same_seed_plants_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_truth(planted_pages(tmp_path / name), tmp_path / f"{name}.jsonl")
    files = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("a", "b")]
    assert files[0] == files[1]
    assert read_truth(tmp_path / "a.jsonl") == read_truth(tmp_path / "b.jsonl") == planted_pages(tmp_path / "c")


def test_every_kind_is_planted_once_per_url() -> None:
    sent = [each.planted for each in plant(pages(), 0)]
    assert Counter(each.kind for each in sent).keys() == {"page", "copy", "charset", "truncated", "spam"}
    assert {each.detail for each in sent if each.kind == "copy"} == {f"{share:.0%}" for share in EDITS}
    assert len({each.url for each in sent}) == len(sent)
    names = {each.name for each in sent if each.kind == "page"}
    assert all(each.original in names for each in sent if each.kind == "copy")
    assert all((BLOCKED in each.url) == (each.detail == "blocked site") for each in sent)


def members(data: bytes) -> list[tuple[bytes, bool]]:
    """What each gzip member holds as far as it can be read, and whether it is whole; found by their magic."""
    found = []
    starts = [i for i in range(len(data)) if data.startswith(b"\x1f\x8b\x08\x00\x00\x00\x00\x00", i)]
    for start, stop in zip(starts, [*starts[1:], len(data)], strict=True):
        machine = zlib.decompressobj(31)
        found.append((machine.decompress(data[start:stop]), machine.eof))
    return found


def test_warc_files_hold_what_was_planted(tmp_path: Path) -> None:
    truth = planted_pages(tmp_path)
    found = [member for path in sorted(tmp_path.iterdir()) for member in members(path.read_bytes())]
    assert len(found) == len(truth)
    for (record, whole), planted in zip(found, truth, strict=True):
        assert whole == (planted.kind != "truncated")
        assert f"WARC-Target-URI: {planted.url}\r\n".encode() in record
        if whole:
            head, _, rest = record.partition(b"\r\n\r\n")
            http, _, body = rest.partition(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:])
            assert int(fields["Content-Length"]) == len(rest) - 4
            assert f"Content-Length: {len(body) - 4}" in http.decode()


def test_fastwarc_reads_the_files(tmp_path: Path) -> None:
    warc = pytest.importorskip("fastwarc.warc")
    sent = [each for each in plant(pages(), 0) if each.planted.kind != "truncated"]
    truth = list(write_warcs(sent, tmp_path))
    urls = []
    for path in sorted(tmp_path.iterdir()):
        with path.open("rb") as file:
            for record in warc.ArchiveIterator(file, parse_http=True):
                urls.append(record.headers["WARC-Target-URI"])
                assert record.reader.read().rstrip().endswith(b"</html>")
    assert urls == [planted.url for planted in truth]


def test_more_than_one_file_is_begun(tmp_path: Path) -> None:
    some = up_to(inflated(pages(), 0), 10**9)
    list(write_warcs((next(some) for _ in range(PER_FILE + 1)), tmp_path))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["00000.warc.gz", "00001.warc.gz"]
    assert len(members((tmp_path / "00001.warc.gz").read_bytes())) == 1
    assert gzip.decompress((tmp_path / "00001.warc.gz").read_bytes())


@pytest.mark.parametrize("share", EDITS)
def test_edits_replace_their_share_of_the_words(share: float) -> None:
    html = f'<p class="word1">{TEXT}</p>'
    changed = edited(html, share, random.Random(1))
    before, after = (WORDS.findall(visible(text)) for text in (html, changed))
    differing = sum(a != b for a, b in zip(before, after, strict=True)) / len(before)
    assert share * 0.8 <= differing <= share, "some words are replaced by themselves"
    assert changed.startswith('<p class="word1">'), "tags stay"


def test_visible_text_leaves_out_what_nobody_sees() -> None:
    html = "<style>a{}</style><p>One<a class='headerlink' href=''>¶</a> &amp; two</p><script>var x;</script>"
    assert visible(html) == "One & two"


def test_a_page_is_cut_out_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("<nav>menu</nav><main>" + "x" * 2000 + "</main><footer>")
    (found,) = page("book/x", "en", tmp_path / "x.html", "<main>", "</main>")
    assert found == Page("book/x", "en", "x" * 2000)
    assert list(page("book/x", "en", tmp_path / "x.html", "<article>", "</main>")) == []


def test_docstrings_are_pages_where_no_package_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*command: str, cwd: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory", command[0])

    some = [path for path in stdlib_files() if path.parent.name in ("json", "logging", "email")]
    monkeypatch.setattr(module_of_pages, "run", refuse)
    monkeypatch.setattr(module_of_pages, "stdlib_files", lambda: some)
    said: list[str] = []
    found = load_pages(tmp_path, said.append)
    assert len({each.name for each in found}) == len(found) > 5
    assert any("json" in each.name and "JSON" in each.main for each in found)
    assert "anarchism cannot be had" in said[0] and "using the docstrings" in said[-1]


def by_name(scores: list[score.Score]) -> dict[str, score.Score]:
    return {each.what: each for each in scores}


def truth_of(**texts: str) -> list[Planted]:
    return [Planted(name, name, "page", "", "en", text) for name, text in texts.items()]


def test_extraction_counts_words() -> None:
    truth = [replace(each, name=f"book/{each.url}") for each in truth_of(a="one two three four", b="five six")]
    found = by_name(list(score.extraction(truth, {"a": "one two nine ten"})))
    assert found["words of the book"] == score.Score("words of the book", 2, 0.25, 0.25)
    assert score.overlap("a a b", "a b b b") == (0.5, 2 / 3)
    assert score.overlap("日本語", "日本人") == (2 / 3, 2 / 3)


def test_languages_are_scored_by_page() -> None:
    truth = [replace(each, language="de" if each.url == "b" else "en") for each in truth_of(a="a", b="b", c="c")]
    found = by_name(list(score.languages(truth, {"a": "en", "b": "de", "c": "de"}, lambda text: text)))
    assert found["language en"] == score.Score("language en", 2, 0.5, 1.0)
    assert found["language de"] == score.Score("language de", 1, 1.0, 0.5)


def test_filters_are_scored_by_what_they_remove() -> None:
    prose = [Planted(f"p{i}", f"book/{i}", "page", "", "en", "") for i in range(4)]
    spam = [Planted(f"s{i}", f"spam/{i}", "spam", "lorem", "en", "") for i in range(2)]
    before = {each.url: "" for each in [*prose, *spam]}
    found = by_name(list(score.filters([*prose, *spam], before, {"p0": "", "p1": "", "p2": "", "s1": ""})))
    assert found["spam"] == score.Score("spam", 2, 0.5, 0.5)
    assert found["kept: book, English"].recall == 0.75


def test_duplicates_are_scored_by_cluster() -> None:
    texts = {"o": TEXT, "c": TEXT.replace("word7 ", "other "), "x": "unlike " * 20}
    documents = [Document(i, text, url, "", 0) for i, (url, text) in enumerate(texts.items())]
    original = Planted("o", "o", "page", "", "en", "")
    copy = Planted("c", "o", "copy", "1%", "en", "", original="o")
    found = list(score.duplicates([original, copy], documents, {0: 0, 1: 0, 2: 0}, lambda likeness: likeness))
    assert found[0].recall == 1.0 and "Jaccard 0.9" in found[0].what
    assert found[1].count == 2 and found[1].precision == 0.5, "x is like nothing"
    missed = list(score.duplicates([original, copy], documents, {}, lambda likeness: likeness))
    assert missed[0].recall == 0.0


def test_truncation_is_scored_by_reports() -> None:
    truth = [*truth_of(a="", b=""), Planted("t", "t", "truncated", "", "en", "")]
    reported, read = score.damage(truth, {"a": ""}, 2)
    assert (reported.recall, reported.precision, read.recall) == (1.0, 0.5, 0.5)


def test_short_texts_have_near_duplicates(tmp_path: Path) -> None:
    write_texts(short_texts(pages(), 50), tmp_path / "texts.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(texts) >= 50 and sum(text.endswith("changed") for text in texts) >= 5


def test_tables_have_the_ratio_and_the_scale() -> None:
    case = CASES[0]
    facts = {"corpus": case.corpus, "stage": case.stage, "peak_mb": 100.0}
    records = [facts | {"system": OURS, "cpu_s": 1.0}, facts | {"system": DATATROVE, "cpu_s": 30.0}]
    line = stage_table(records, {f"{case.corpus} {case.stage}": 5 * 10**6})[-1]
    assert line == "| extract | 5 | 5 | datatrove | 0.167 | 30.0 x | 20 x | 100 / 100 |"
    names = ("extract", "signatures")
    stage = {
        "documents_in": 500,
        "documents_out": 0,
        "bytes_in": 1,
        "bytes_out": 1,
        "seconds": 36.0,
        "disk_bytes": 10**6,
    }
    grown = {"gigabytes": 0.1, "pages": 1000, "workers": 1, "wall_s": 10.0, "cpu_s": 9.0, "peak_mb": 200.0}
    grown |= {"all_mb": 300.0, "warc_bytes": 8 * 10**7, "stages": dict.fromkeys(names, stage)}
    assert growth_table([grown])[-1] == "| 0.1 | 1,000 | 1 | 10 | 9 | 10 | 200 | 300 |"
    text = "\n".join(scale_table([grown]))
    assert "| extract | 10,000 | 200 | 1.0 |" in text, "80 TB are a million times 80 MB"
    assert "1.5e+09 reach the signatures, with 2000 bytes" in text


def test_made_up_copies_are_of_earlier_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up, "PART", 250)
    monkeypatch.setattr(deduplication, "PART", 250)
    for copy in range(made_up.COPIES, 600, made_up.COPIES):
        original, words = made_up.original_of(copy), made_up.text_of(copy).split()
        assert 0 < original < copy and original % made_up.COPIES and made_up.original_of(original) == original
        replaced = sum(a != b for a, b in zip(words, made_up.text_of(original).split(), strict=True))
        assert replaced <= round(made_up.edit_of(copy) * made_up.WORDS) < replaced + 2
    assert len({made_up.original_of(copy) for copy in range(made_up.COPIES, 600, made_up.COPIES)}) > 30
    stages = list(deduplication.measure(600, 1, tmp_path))
    assert [record["documents"] for record in stages] == [600] * 4
    assert sum(len(made_up.text_of(i)) for i in range(600)) == stages[0]["text_bytes"]
    *edits, wrong = deduplication.recall(tmp_path, 600)
    assert wrong == {"wrong": 0} and sum(record["copies"] for record in edits) == 59
    assert all(record["found"] == record["copies"] for record in edits[:2]) and edits[-1]["found"] < 4
    text = "\n".join(deduplication.tables([*stages, *edits, wrong]))
    assert "600 documents, 1 processes" in text and "| 0.0% | 9 | 100.0% | 100.0% |" in text
