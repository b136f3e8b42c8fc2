"""Corpus readers: every format gives the same documents; what cannot be used is named."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import pytest
import zstandard

from llm.data.corpus import describe_source, read_corpus, stdlib_files
from llm.data.tokens.folder import source_name
from llm.errors import InputError

DOCUMENTS = [
    "first\nline",
    "héllo wörld 🎉",
    " leading and trailing ",
    "\u2028 separator \x85 kept",
]


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents).encode()


def raw_jsonl(documents: list[str]) -> bytes:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    return "".join(lines).encode()


def zst(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def read(path: Path) -> list[str]:
    return list(read_corpus(str(path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(DOCUMENTS)),
        ("a.jsonl", raw_jsonl(DOCUMENTS)),
        ("a.jsonl", jsonl(DOCUMENTS).replace(b"\n", b"\r\n\n").rstrip()),
        ("a.jsonl.gz", gzip.compress(jsonl(DOCUMENTS))),
        ("a.jsonl.gz", gzip.compress(jsonl(DOCUMENTS[:2])) + gzip.compress(jsonl(DOCUMENTS[2:]))),
        ("a.jsonl.zst", zst(jsonl(DOCUMENTS))),
        ("a.jsonl.zst", zst(jsonl(DOCUMENTS[:2])) + zst(jsonl(DOCUMENTS[2:]))),
    ],
)
def test_every_form_of_jsonl(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == DOCUMENTS


@pytest.mark.parametrize("compress", [gzip.compress, zst])
def test_large_compressed_files(tmp_path: Path, compress):
    documents = [f"{i} " * (i % 700) + "end" for i in range(2000)]
    path = tmp_path / ("a.jsonl.zst" if compress is zst else "a.jsonl.gz")
    path.write_bytes(compress(jsonl(documents)))
    assert read(path) == documents


def test_txt_is_one_document_kept_as_it_is(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo é\n".encode())
    assert read(tmp_path / "a.txt") == ["one\r\ntwo é\n"]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path):
    (tmp_path / "z").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/no.txt").write_text("hidden")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "z/a.jsonl").write_bytes(jsonl(["za1", "za2"]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["a"])))
    (tmp_path / "c.jsonl.txt").write_text("not json")
    assert read(tmp_path) == ["a", "b", "not json", "za1", "za2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"ok \xff", r"a\.txt is not UTF-8.*position 3"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b"\n  \n", r"a\.jsonl is empty"),
        ("a.jsonl", jsonl(["x"]) + b"{oops\n", "line 2 is not JSON"),
        ("a.jsonl", jsonl(["x"]) + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
        ("a.jsonl", jsonl(["x", "y"]) + b'{"txt": "z"}\n', "line 3: expected .*`text`"),
        ("a.jsonl", b'"text"\n', "line 1: expected"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: expected"),
        ("a.jsonl", b'{"text": ""}\n', "line 1: expected .* not empty"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: `text` is not Unicode"),
        ("a.jsonl", jsonl(["x"]) + b'{"text": "\xe9"}\n', "line 2 is not UTF-8"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(jsonl(DOCUMENTS))[:-9], "cannot be read"),
        ("a.jsonl.zst", b"no zstd, not at all", r"a\.jsonl\.zst cannot be read"),
        ("a.jsonl.zst", zst(jsonl(DOCUMENTS))[:-3], "middle of a frame"),
        ("a.jsonl.zst", zst(jsonl(DOCUMENTS)) + zst(b"{}")[:5], "middle of a frame"),
        ("a.parquet", b"x", "expected a name that ends in"),
    ],
)
def test_unfit_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_corrupt_gzip_is_named(tmp_path: Path):
    raw = bytearray(gzip.compress(jsonl(DOCUMENTS * 50)))
    raw[60] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz"):
        read(tmp_path / "a.jsonl.gz")


def test_unfit_folders_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none")
    with pytest.raises(InputError, match="is empty"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.pdf").write_text("b")
    with pytest.raises(InputError, match=r"b\.pdf.*expected only files in"):
        read(tmp_path)
    (tmp_path / "b.pdf").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(InputError, match="loop"):
        read(tmp_path)


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
    monkeypatch.chdir(tmp_path)
    assert source_name(".") == source_name(str(tmp_path))
    assert describe_source("x.txt") == "x.txt"
