"""The three steps on parts with planted duplicates."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llm.crawl.dedup.curve import curve, midpoint, probability
from llm.crawl.dedup.settings import DedupConfig
from llm.crawl.dedup.signatures import Shape
from llm.crawl.dedup.stage import CLUSTERS, Cluster, Drop, Signatures
from llm.crawl.documents import Document, read_documents, write_documents
from llm.crawl.tasks import Task, Work, run_task
from llm.errors import InputError

CONFIG = DedupConfig()
SHAPE = Shape(5, 14, 8)


def parts_of(folder: Path, texts: Sequence[str], size: int) -> list[Path]:
    folder.mkdir(parents=True)
    parts = list[Path]()
    for start in range(0, len(texts), size):
        part = folder / f"{len(parts):05d}.parquet"
        rows = [Document(start + i, text, "", "x", i) for i, text in enumerate(texts[start : start + size])]
        write_documents(part, rows)
        parts.append(part)
    return parts


def run(work: Work, out: Path, inputs: Sequence[Sequence[Path]], workers: int) -> list[Path]:
    folder = out / work.name
    folder.mkdir()
    tasks = [Task(i, tuple(some), folder) for i, some in enumerate(inputs)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda task: run_task(work, task), reversed(tasks)))
    return [task.path(".parquet") for task in tasks]


def deduplicate(out: Path, parts: Sequence[Path], workers: int = 1, config: DedupConfig = CONFIG) -> list[Path]:
    signed = [path.with_suffix(".signatures") for path in run(Signatures(config), out, [[p] for p in parts], workers)]
    run(Cluster(config), out, [[*signed, *parts]], 1)
    return run(Drop(config), out, [[part, out / "cluster" / CLUSTERS] for part in parts], workers)


def planted(similarities: Sequence[float]) -> list[str]:
    """Pairs of documents, of each similarity one, that share so much of their 400 shingles of one word, dispersed.

    All first documents, then all second ones.
    """
    draw = random.Random(7)
    firsts, seconds = list[str](), list[str]()
    for i, similarity in enumerate(similarities):
        own = round(400 * (1 - similarity) / (1 + similarity))
        words = [f"{i}x{draw.randrange(10**9)}" for _ in range(400)]
        firsts.append(" ".join(words))
        words[:own] = [f"{i}y{draw.randrange(10**9)}" for _ in range(own)]
        seconds.append(" ".join(words))
    return firsts + seconds


def test_the_output_depends_on_neither_workers_nor_order(tmp_path: Path) -> None:
    texts = planted([i % 10 / 9 for i in range(60)])
    parts = parts_of(tmp_path / "filter", texts, 13)
    contents = list[dict[str, bytes | Any]]()
    for workers, memory in ((1, 512), (3, 1)):
        out = tmp_path / str(workers)
        out.mkdir()
        deduplicate(out, parts, workers, DedupConfig(memory_mb=memory))
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        contents.append(
            {
                str(path.relative_to(out)): json.loads(path.read_text()) | {"seconds": 0}
                if path.suffix == ".json" else path.read_bytes()
                for path in files
            }
        )  # fmt: skip
    assert contents[0] == contents[1]
    assert len(contents[0]) == 10 * 2 + 3 + 10 * 2


def test_duplicates_go_and_the_first_stays(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(300))
    texts = [
        text,
        "another text",
        text.upper() + "!",
        text.replace("word150 ", "changed "),
        "",
        "a third",
        "",
        "Another text.",
    ]
    parts = parts_of(tmp_path / "filter", texts, 3)
    dropped = deduplicate(tmp_path, parts)
    kept = [document for part in dropped for document in read_documents(part)]
    assert [document.id for document in kept] == [0, 1, 4, 5]
    assert kept[0].text == text
    reports = [json.loads(part.with_suffix(".json").read_text()) for part in dropped]
    assert [report["removed"] for report in reports] == [
        {"dedup.exact": 1}, {"dedup.near": 1}, {"dedup.exact": 2},
    ]  # fmt: skip
    assert reports[1]["samples"]["dedup.near"] == [texts[3][:300]]
    assert [report["documents_in"] for report in reports] == [3, 3, 2]
    found = json.loads((tmp_path / "cluster/00000.json").read_text())["histograms"]
    assert found == {"cluster_size": {"1": 1, "2": 2, "4": 1}}


@pytest.mark.parametrize("similarity", [0.62, 0.72, 0.85])
def test_recall_follows_the_curve(tmp_path: Path, similarity: float) -> None:
    pairs = 200
    config = DedupConfig(shingle_words=1)
    kept = deduplicate(tmp_path, parts_of(tmp_path / "filter", planted([similarity] * pairs), 100), config=config)
    found = 2 * pairs - sum(len(list(read_documents(part))) for part in kept)
    expected = probability(similarity, SHAPE)
    assert found / pairs == pytest.approx(expected, abs=4 * (expected * (1 - expected) / pairs) ** 0.5)
    report = json.loads((tmp_path / "cluster/curve.json").read_text())
    measured = report["recall"][int(similarity * 10)]
    assert measured["pairs"] == pytest.approx(similarity * pairs, rel=0.2)  # by the witnesses that they share
    assert measured["expected"] == pytest.approx(expected, abs=0.01)
    assert measured["found"] == pytest.approx(found / pairs, abs=0.12)
    assert report["dropped"] == [found * (i == int(similarity * 10)) for i in range(10)]


def test_the_curve() -> None:
    assert probability(0, SHAPE) == 0 and probability(1, SHAPE) == 1
    assert probability(midpoint(SHAPE), SHAPE) == pytest.approx(0.5)
    assert midpoint(SHAPE) == pytest.approx(0.69, abs=0.01)
    assert curve(SHAPE, 2) == [(0, 0), (0.5, pytest.approx(1 - (1 - 0.5**8) ** 14)), (1, 1)]


def test_a_damaged_file_of_signatures_is_named_before_clustering(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "filter", ["a", "b", "c"], 1)
    paths = [path.with_suffix(".signatures") for path in run(Signatures(CONFIG), tmp_path, [[p] for p in parts], 1)]
    paths[1].write_bytes(paths[1].read_bytes()[:-9])
    with pytest.raises(InputError, match=r"00001\.signatures is damaged or cut"):
        run(Cluster(CONFIG), tmp_path, [[*paths, *parts]], 1)
    assert not list((tmp_path / "cluster").iterdir())


def test_parts_whose_ids_do_not_ascend_are_refused(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "filter", ["a", "b"], 1)
    paths = [path.with_suffix(".signatures") for path in run(Signatures(CONFIG), tmp_path, [[p] for p in parts], 1)]
    with pytest.raises(InputError, match="document 0 follows 1"):
        run(Cluster(CONFIG), tmp_path, [[*paths[::-1], *parts[::-1]]], 1)


def test_no_documents(tmp_path: Path) -> None:
    kept = deduplicate(tmp_path, parts_of(tmp_path / "filter", [""], 1)[:1])
    assert len(list(read_documents(kept[0]))) == 1
    (out := tmp_path / "none").mkdir()
    write_documents(tmp_path / "empty.parquet", [])
    assert list(read_documents(deduplicate(out, [tmp_path / "empty.parquet"])[0])) == []
