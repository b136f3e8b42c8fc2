"""HTML, text, JSON lines and tables: what they hold comes out, and what is damaged is counted."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warc_files import KINDS, extract, html, page, record

from llm.crawl.extract.files import kind_of
from llm.crawl.extract.settings import ExtractConfig
from llm.crawl.extract.stage import Extract
from llm.errors import InputError


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("CC-MAIN-1.warc.gz", "warc"), ("CC-MAIN-1.warc.wet.gz", "warc"), ("a.WARC.zst", "warc"), ("a.wet", "warc"),
        ("a.html", "html"), ("a.htm.gz", "html"), ("a.txt.zst", "text"), ("a.jsonl.gz", "lines"), ("a.ndjson", "lines"),
        ("a.parquet", "table"), ("a.arrow", "table"), ("a.png", None), ("warc", None), ("a.json", "json"),
        ("a.gz", None),
    ],
)  # fmt: skip
def test_kinds_of_files(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_html_and_text(tmp_path: Path) -> None:
    for name, content in {"a.html.gz": gzip.compress(html(3)), "a.html": html(3)}.items():
        (tmp_path / name).write_bytes(content)
        ((document,), counts) = extract(tmp_path / name)
        assert document.text.startswith("Page 3 says") and not counts.damage
    (tmp_path / "a.txt").write_text("<b> is kept")
    ((document,), _) = extract(tmp_path / "a.txt")
    assert (document.text, document.id, document.source) == ("<b> is kept", 7 << 32, "a.txt")


def test_json_lines_go_on_behind_damage(tmp_path: Path) -> None:
    lines = [
        b'{"text": "one", "url": "http://a"}', b"", b"\xff", b"[1]", b'{"text": 1}', b'{"other": "x"}',
        b'{"text": "\\ud800"}',
        b'{"text": "' + b"a" * 2000 + b'"}', b"[" * 100_000, b'{"text": "two", "n": ' + b"1" * 5000 + b"}",
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    documents, counts = extract(path, max_bytes=1000)
    assert [(d.text, d.offset, d.url) for d in documents] == [("one", 1, "http://a")]
    assert [one["offset"] for one in counts.damage] == [3, 4, 5, 6, 7, 8, 9, 10]
    documents, counts = extract(path, max_bytes=10**6)
    assert [(d.text[:3], d.offset) for d in documents] == [("one", 1), ("aaa", 8), ("two", 10)]
    path.write_bytes(b'{"meta": {"body": "deep"}}\n{"meta.body": "dotted", "at": "u"}')
    assert [(d.text, d.url) for d in extract(path, text_key="meta.body", url_key="at")[0]] == [
        ("deep", ""),
        ("dotted", "u"),
    ]


def test_a_json_file_of_one_value_an_array_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (
        '{\n "text": "one"\n}',
        '[{"text": "one"},\n {"text": 1}, 5, {"text": "two"}]',
        '{"text": "one"}\n{"text": "two"}',
    ):
        path.write_text(content)
        documents, counts = extract(path)
        assert [d.text for d in documents] == ["one", "two"][: 1 + ("two" in content)]
        assert [one["offset"] for one in counts.damage] == [2, 3] * content.startswith("[")
    assert [d.offset for d in documents] == [1, 2]
    path.write_text(json.dumps([{"text": "x" * 99}] * 99))
    documents, counts = extract(path, max_bytes=1000)
    assert not documents and [one["offset"] for one in counts.damage] == [1]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"text": "one"}')[:-9])
    documents, counts = extract(tmp_path / "a.json.gz")
    assert counts.damage_count == 1  # told once


def test_a_torn_file_gives_what_stands_before(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{i} " + "x" * 5000}) for i in range(200)]
    whole = gzip.compress("\n".join(rows).encode(), 1)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    documents, counts = extract(tmp_path / "a.jsonl.gz")
    assert 10 < len(documents) < 200 and [d.text.split()[0] for d in documents] == [
        str(i) for i in range(len(documents))
    ]
    assert counts.damage_count == 1 and counts.damage[0]["offset"] == len(documents) + 1


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "x" * 3000, "two"], "url": ["u", "v", None, None]}), path)
    documents, counts = extract(path, max_bytes=1000)
    assert [(d.text, d.url, d.offset) for d in documents] == [("one", "u", 1), ("two", "", 4)]
    assert counts.removed == {"extract.empty": 1} and [one["offset"] for one in counts.damage] == [3]
    pq.write_table(pa.table({"body": ["one"]}), path)
    assert [d.text for d in extract(path, text_key="body")[0]] == ["one"]
    assert "no field `text`" in str(extract(path)[1].damage[0]["what"])
    path.write_bytes(path.read_bytes()[:-20])
    assert extract(path)[1].damage_count == 1


@pytest.mark.parametrize(
    "name", ["a.html", "a.txt", "a.jsonl", "a.parquet", "a.arrow", "a.txt.gz", *("a" + k for k in KINDS)]
)
def test_an_empty_file_is_counted(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    documents, counts = extract(tmp_path / name)
    assert not documents and counts.damage == [{"source": name, "offset": 0, "what": "the file is empty"}]


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "cat.PNG").write_bytes(b"\x89PNG")
    documents, counts = extract(tmp_path / "cat.PNG")
    assert not documents and not counts.damage and counts.histograms["files passed over"] == {".png": 1}


@settings(max_examples=40, deadline=None)
@given(
    content=st.binary(min_size=1, max_size=80),
    name=st.sampled_from(["a.html", "a.txt.gz", "a.jsonl", "a.parquet", "a.arrow", "a.jsonl.zst"]),
)
def test_any_bytes_are_read_or_counted(content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    documents, counts = extract(path)
    assert documents or counts.damage or counts.removed or not content.strip()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.crawl.extract.stage.find_spec", lambda name: None if name == "fastwarc" else 1)
    with pytest.raises(InputError, match=r"fastwarc.*pip install 'ingot\[crawl\]'"):
        Extract(ExtractConfig())


# Not ru_maxrss, in which the memory of the process that it was started from is counted.
READ = """
import sys
from pathlib import Path
sys.path[:0] = [".", "tests/crawl/extract"]
from warc_files import extract
for path in sorted(Path(sys.argv[1]).iterdir()):
    documents, counts = extract(path)
    print(path.name, len(documents), counts.damage_count)
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10)
"""


def write_long(path: Path, *parts: bytes) -> None:
    """The parts, and a GiB of the last one, a MiB, added to a file."""
    with gzip.open(path, "ab", 1) if path.suffix == ".gz" else path.open("ab") as file:  # pyright: ignore
        file.write(b"".join(parts[:-1]))
        for _ in range(1024):
            file.write(parts[-1])


@pytest.mark.slow
def test_hostile_files_cost_little_memory(tmp_path: Path) -> None:
    mebibyte, bomb = b"a" * (1 << 20), tmp_path / "bomb.warc.gz"
    write_long(tmp_path / "line.jsonl", b'{"text": "', mebibyte)
    write_long(tmp_path / "line.txt", mebibyte)
    write_long(tmp_path / "line.html.gz", mebibyte)
    coded = page("http://bomb", (tmp_path / "line.html.gz").read_bytes(), more="Content-Encoding: gzip\r\n")
    bomb.write_bytes(gzip.compress(page("http://a", html(0))) + gzip.compress(coded))
    write_long(bomb, record("response", b"").replace(b"h: 0\r\n\r\n\r\n", b"h: 1073741824\r\n\r\n"), mebibyte)
    with bomb.open("ab") as file:
        file.write(gzip.compress(page("http://b", html(1))))
    (tmp_path / "deep.html").write_bytes(b"<div>" * 10**6 + b"x" + b"</div>" * 10**6)
    (tmp_path / "word.html").write_bytes(b"<p>" + b"a" * 5_000_000)
    (tmp_path / "flat.html").write_bytes(b"<p>x" * 900_000)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *files, memory = done.stdout.splitlines()
    assert files == [
        "bomb.warc.gz 2 2", "deep.html 0 1", "flat.html 1 0", "line.html.gz 0 1", "line.jsonl 0 1", "line.txt 0 1",
        "word.html 1 0",
    ]  # fmt: skip
    assert int(memory) < 2048
