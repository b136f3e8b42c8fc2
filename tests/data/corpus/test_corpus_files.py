"""Corpora of files: what is read, in which order, what is passed over and counted, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from formats import COMPRESSIONS, FORMS, SKIPPABLE, array, arrow, jsonl, parquet

from llm.data.corpus import TextCorpus, read_corpus, stdlib_files
from llm.data.corpus.files import kind_of
from llm.data.tokens.folder import source_name
from llm.errors import InputError

DOCUMENTS = ["first\nline", "héllo wörld 🎉", " leading and trailing ", "\u2028 separator \x85 kept", " \t\n"]


def read(path: Path, **options) -> list[str]:
    return ["".join(document) for document in TextCorpus(str(path), **options).documents()]


def refused(path: Path, message: str, **options) -> None:
    with pytest.raises(InputError, match=message):
        read(path, **options)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path):
    (tmp_path / "z").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/no.txt").write_text("hidden")
    (tmp_path / ".no.txt").write_text("hidden")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "z/a.jsonl").write_bytes(jsonl(["za1", "za2"]))
    (tmp_path / "z-.txt").write_text("z-")
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(jsonl(["a"])))
    (tmp_path / "c.jsonl.txt").write_text("not json")
    (tmp_path / "c\n\x1b[31m.txt").write_text("any name")
    assert read(tmp_path) == ["a", "b", "any name", "not json", "z-", "za1", "za2"]
    assert list(read_corpus(f"{tmp_path}/[bz]*")) == ["b", "z-", "za1", "za2"]


def test_other_files_are_passed_over_and_counted(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    for name in ("README.md", "x.CSV", "y.csv", "LICENSE", "a.txt.lz4", "x.1234", "x.caf\u00e9", "z.\x1b[31m"):
        (tmp_path / name).write_text("other")
    corpus = TextCorpus(str(tmp_path))
    assert ["".join(document) for document in corpus.documents()] == ["a"]
    assert corpus.others == {".md": 1, ".csv": 2, ".lz4": 1, "without a known suffix": 4}


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path):
    """As in a cache of the Hugging Face hub: names are links to blobs without a suffix, of several revisions."""
    for name in ("blobs", "snapshots/1/data", "snapshots/2/data", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "blobs/3f9c").write_bytes(jsonl(["one"]))
    (tmp_path / "blobs/77aa").write_bytes(parquet(["two"]))
    (tmp_path / "elsewhere/z.txt").write_text("three")
    for revision in "12":
        (tmp_path / f"snapshots/{revision}/data/a.jsonl").symlink_to("../../../blobs/3f9c")
    (tmp_path / "snapshots/2/data/b.parquet").symlink_to("../../../blobs/77aa")
    (tmp_path / "snapshots/2/folder").symlink_to(tmp_path / "elsewhere")
    for i in range(4):  # entered again and again, they would never end
        (tmp_path / f"snapshots/loop{i}").symlink_to(tmp_path)
    (tmp_path / "snapshots/self").symlink_to("self")
    corpus = TextCorpus(str(tmp_path))
    assert ["".join(document) for document in corpus.documents()] == ["three", "one", "two"]
    assert corpus.others == {"without a known suffix": 3, "further links to a file": 1}
    assert read(tmp_path / "snapshots/2/data/a.jsonl") == ["one"]
    assert read(tmp_path / "snapshots/2") == ["one", "two", "three"]
    (tmp_path / "gone.txt").symlink_to("nowhere")
    refused(tmp_path, r"gone\.txt is no file, or a link to nothing")
    refused(tmp_path / "gone.txt", r"gone\.txt is no file, or a link to nothing")
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path, r"pipe\.txt is no file")


def test_what_datasets_saves_is_read(tmp_path: Path):
    first, second = ({"text": [f"{name} {i}" for i in range(30)]} for name in ("a", "b"))
    splits = DatasetDict(train=Dataset.from_dict(first), validation=Dataset.from_dict(second))
    splits.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "validation": 1})
    (tmp_path / "saved/train/cache-0123.arrow").write_bytes(arrow(["a map's cache"]))
    corpus = TextCorpus(str(tmp_path / "saved"))
    assert ["".join(document) for document in corpus.documents()] == first["text"] + second["text"]
    assert corpus.others == {".json": 5, ".arrow": 1}
    assert read(tmp_path / "saved/train") == first["text"]


def test_any_field_holds_the_text(tmp_path: Path):
    record = {"id": 1, "content": "c", "meta": {"text": "inner", "null": None}, "a.b": "dotted", "a": {"b": "no"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    for key, text in {"content": "c", "meta.text": "inner", "a.b": "dotted"}.items():
        assert read(tmp_path / "a.jsonl", text_key=key) == [text]
    for key in ("text", "meta.no", "id.no", "content.c"):
        refused(
            tmp_path / "a.jsonl", f"line 1: found no field `{key}`, but id, content, meta, a.b, a; set", text_key=key
        )
    refused(tmp_path / "a.jsonl", "line 1: `id` is float; expected text", text_key="id")
    refused(tmp_path / "a.jsonl", "holds no text", text_key="meta.null")
    for name, content in {"a.parquet": parquet(["x"], "nested"), "a.arrow": arrow(["x"], "nested")}.items():
        (tmp_path / name).write_bytes(content)
        for key in ("text", "meta.no", "n.no"):
            refused(tmp_path / name, f"{name}: found no field `{key}`, but n, meta; set data.text_key", text_key=key)
        refused(tmp_path / name, f"{name}: `n` is int64; expected text", text_key="n")
        refused(tmp_path / name, f"{name}: `meta` is struct", text_key="meta")


@pytest.mark.parametrize("columns", [["a", "a.b"], ["a.b", "a"]])
def test_a_column_of_that_whole_name_comes_first(tmp_path: Path, columns: list[str]):
    table = pa.table({"a": [{"b": "no"}], "a.b": ["dotted"]}).select(columns)
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_key="a.b") == ["dotted"]


def test_what_no_one_reads_may_be_odd(tmp_path: Path):
    """Numbers and depths that Python's parser refuses."""
    deep = "[" * 200_000 + "]" * 200_000
    lines = [f'{{"n": {"9" * 5000}, "text": "a"}}', f'{{"deep": {deep}, "text": "b", "m": {{"t": "c"}}}}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "a.jsonl") == ["a", "b"]
    (tmp_path / "a.jsonl").write_text(lines[1])
    assert read(tmp_path / "a.jsonl", text_key="m.t") == ["c"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_empty_documents_are_passed_over_and_counted(tmp_path: Path, name: str):
    texts = ["a", "", None, "b", "", None]
    writers = {"a.jsonl": jsonl, "a.json": array, "a.parquet": parquet, "a.arrow": arrow}
    (tmp_path / name).write_bytes(writers[name](texts))  # pyright: ignore[reportArgumentType]
    corpus = TextCorpus(str(tmp_path))
    for _ in range(2):  # each reading counts anew
        assert ["".join(document) for document in corpus.documents()] == ["a", "b"]
        assert corpus.empty == 4
    place = "row" if name in ("a.parquet", "a.arrow") else "line" if name == "a.jsonl" else "record"
    refused(tmp_path, rf"{name}, {place} 2: found no text; set data.empty=skip", skip_empty=False)


def test_empty_files_are_passed_over_and_counted(tmp_path: Path):
    empty = {"a.txt": b"", "b.txt": b"\xef\xbb\xbf", "c.jsonl": b"\n \r\n", "d.json": b"", "e.json": b" [ ]\n"}
    empty |= {"f.jsonl.gz": gzip.compress(b""), "g.jsonl.zst": SKIPPABLE, "h.txt.xz": COMPRESSIONS[".xz"](b"")}
    for name, content in empty.items():
        (tmp_path / name).write_bytes(content)
    refused(tmp_path, f"holds no text: found {len(empty)} empty documents or files")
    (tmp_path / "z.txt").write_text("z")
    corpus = TextCorpus(str(tmp_path))
    assert [list(document) for document in corpus.documents()] == [["z"]]
    assert corpus.empty == len(empty)
    refused(tmp_path, r"a\.txt: found no text", skip_empty=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", r"a\.txt is not UTF-8: byte 0xff at position 3"),
        ("a.txt", b"x" * 600_000 + b"\xe9!", r"a\.txt is not UTF-8: byte 0xe9 at position 600000"),
        ("a.txt", b"x" * 600_000 + b"\xe9", r"a\.txt is not UTF-8: byte 0xe9 at position 600000"),
        ("a.txt", "text".encode("utf-16"), "if it is UTF-16: iconv"),
        ("a.jsonl", jsonl(["x"]).decode().encode("utf-16"), "line 1 is not UTF-8.*if it is UTF-16"),
        ("a.json", jsonl(["x"]).decode().encode("utf-16"), "is not UTF-8.*if it is UTF-16"),
        ("a.jsonl", jsonl(["x"]) + b"{oops\n", "line 2 is not JSON"),
        ("a.jsonl", jsonl(["x"]) + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
        ("a.jsonl", jsonl(["x", "y"]) + b'{"txt": "z"}\n', "line 3: found no field `text`, but txt; set data.text_key"),
        ("a.jsonl", b'"text"\n', "line 1: found str; expected a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: `text` is float; expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: `text` is not Unicode"),
        ("a.jsonl", jsonl(["x"]) + b'{"text": "\xe9"}\n', "line 2 is not UTF-8"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', "record 2 is not JSON.*where the file ends"),
        ("a.json", b'[{"text": "a"},', "record 2 is not JSON.*where the file ends"),
        ("a.json", b'[{"text": "a"}] {"text": "b"}', "found more behind the array"),
        ("a.json", b'[{"text": "a"}, "b"]', "record 2: found str; expected a JSON object"),
        ("a.json", b'{"text": "a"}\n{"text" "b"}\n' + b" " * 99, "record 2 is not JSON: Expecting ':'"),
        ("a.json", b"[" * 100_000, "record 1 is nested too deeply"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", b"no zstd, not at all", r"a\.jsonl\.zst cannot be read"),
        ("a.jsonl.zst", b"", r"a\.jsonl\.zst cannot be read"),
        ("a.parquet", b"x", r"a\.parquet cannot be read, after 0 rows"),
        ("a.arrow", b"", r"a\.arrow cannot be read, after 0 rows"),
        ("a.feather", b"FEA1" + bytes(99), r"a\.feather cannot be read"),
        ("a.pdf", b"x", r"expected a name that ends in \.txt, .*\.parquet"),
    ],
)
def test_unfit_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)


def test_text_that_is_not_utf8_in_a_column(tmp_path: Path):
    for name, content in {"a.parquet": parquet(["xyzzy"], compression="none"), "a.arrow": arrow(["xyzzy"])}.items():
        (tmp_path / name).write_bytes(content.replace(b"xyzzy", b"xy\xffzy"))
        refused(tmp_path / name, rf"{name} cannot be read, after 0 rows: .*UTF8")


def test_unfit_folders_are_refused(tmp_path: Path):
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "is empty of text: found nothing; expected files in .txt")
    (tmp_path / "b.pdf").write_text("b")
    refused(tmp_path, r"is empty of text: found 1 \.pdf; expected files in .txt")


def test_the_standard_library():
    files = stdlib_files()
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in files]
    assert {"os.py", "json/decoder.py", "heapq.py"} <= set(names)
    assert names == sorted(names)
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in names)
    documents = list(read_corpus("stdlib"))
    assert documents == [path.read_bytes().decode() for path in files if path.stat().st_size]
    assert sum(map(len, documents)) > 5_000_000


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert source_name("stdlib") == "stdlib"
    assert source_name("x/my text.jsonl.zst") == "my_text"
    assert source_name("x/wiki.txt") == "wiki"
    for name in FORMS:
        assert kind_of(Path(name))
        assert source_name(name) == name.split(".")[0]
    monkeypatch.chdir(tmp_path)
    assert source_name(".") == source_name(str(tmp_path))
