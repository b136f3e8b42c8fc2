"""A crawl of a few pages that has something for every stage to do, and the command that makes shards of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import sys
from html import escape
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
from extract.warc_files import page

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("extract", "filter", "signatures", "cluster", "dedup", "tokenizer", "tokenize", "tokens")
SETTINGS = ("--tokenizer.vocab_size=600", "--tokenize.validation_fraction=0.2")

WORDS = re.findall(r"\b[a-z]{2,11}\b", " ".join(text for _, text in sorted(topics.items())))


def write_crawl(folder: Path) -> Path:
    """Seven files in five formats: pages, copies of them with and without changes, spam, and damage."""
    folder.mkdir()
    draw = random.Random(18)
    texts = [_prose(draw) for _ in range(40)]
    pages = [gzip.compress(page(f"https://a.example/{i}", _html(text)), mtime=0) for i, text in enumerate(texts[:16])]
    pages[3] = pages[3][: len(pages[3]) * 6 // 10]
    pages.insert(9, gzip.compress(page("https://a.example/none", _html(texts[0]), status="404 Not Found"), mtime=0))
    (folder / "a.warc.gz").write_bytes(b"".join(pages))
    changed = [_changed(text, draw) for text in texts[4:12]]
    plain = [page(f"https://b.example/{i}", _html(text)) for i, text in enumerate([*changed, *texts[16:24]])]
    plain.append(
        page("https://b.example/latin", _html("Où est-il\u00a0? " * 60).decode().encode("latin-1"), "text/html")
    )
    (folder / "b.warc").write_bytes(b"".join(plain))
    lines = [json.dumps({"text": text, "url": f"https://c.example/{i}"}) for i, text in enumerate(texts[10:28])]
    (folder / "c.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"text": "buy cheap pills " * 300})]))
    (folder / "d.html").write_bytes(_html(texts[28]) + b"\xff\xfe")
    pq.write_table(pa.table({"text": texts[24:38], "url": [""] * len(texts[24:38])}), folder / "e.parquet")
    (folder / "f.txt").write_bytes(b"")
    (folder / "g.txt.gz").write_bytes(gzip.compress(texts[38].encode(), mtime=0))
    return folder


def _prose(draw: random.Random) -> str:
    """Paragraphs of sentences that are English enough for the filters."""
    begins = [draw.randrange(len(WORDS) - 20) for _ in range(40)]
    sentences = [" ".join(WORDS[begin : begin + draw.randint(9, 19)]).capitalize() + "." for begin in begins]
    return "\n\n".join(" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4))


def _html(text: str) -> bytes:
    paragraphs = "".join(f"<p>{escape(part)}</p>\n" for part in text.split("\n\n"))
    return f"<html><head><title>x</title></head><body><article>{paragraphs}</article></body></html>".encode()


def _changed(text: str, draw: random.Random) -> str:
    words = text.split(" ")
    words[draw.randrange(len(words))] = "another"
    return " ".join(words)


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    """What follows the command's name; `out` has a config file beside it."""
    config = out.with_name(f"{out.name}.yaml")
    config.write_text("{}\n")
    return ["--config", str(config), f"--input.source={source}", f"--out={out}", *SETTINGS, *more]


def command(source: Path, out: Path, *more: str, stage: str = "all") -> list[str]:
    """The command line for a stage."""
    return [sys.executable, str(ROOT / "launch/prepare_data.py"), stage, *arguments(source, out, *more)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def left_by(out: Path) -> dict[str, str]:
    """The hash of every file of the stages; of a task's report, of all but the seconds."""
    found = {}
    for path in sorted(path for stage in STAGES for path in (out / stage).rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.suffix == ".json" and path.stem.isdecimal():
            report = json.loads(data)
            assert report.pop("seconds") >= 0
            data = json.dumps(report, sort_keys=True).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found
