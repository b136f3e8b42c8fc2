"""`python -m benchmarks.crawl.deduplication --gigabytes 10`: de-duplication alone, of made-up text with planted copies.

Prints a line for each stage, and how many copies were found. Writes the same to results.jsonl and results.md.
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.crawl.made_up import COPIES, PART, edit_of, original_of, text_of, works
from llm.crawl.chain import tasks_of
from llm.crawl.dedup.curve import probability
from llm.crawl.dedup.settings import DedupConfig
from llm.crawl.dedup.stage import shape_of
from llm.crawl.engines.local import Local
from llm.crawl.restart import reports_of, run_stage
from llm.crawl.settings import CorpusConfig
from llm.crawl.stages import CHAIN
from llm.crawl.tasks import Task, hash_of

Record = dict[str, Any]
SAMPLED = 0.5  # seconds between two looks at the memory


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Bytes of the largest of this process and those that it has started, since the last call."""
    ended, peak = Event(), 0

    def watch() -> None:
        nonlocal peak
        while not ended.wait(SAMPLED):
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    peak = max(peak, process.memory_info().rss)
                except psutil.Error:  # it has ended
                    continue

    def taken() -> int:
        nonlocal peak
        found, peak = peak, psutil.Process().memory_info().rss
        return max(found, peak)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield taken
    finally:
        ended.set()
        thread.join()


def measure(documents: int, workers: int, out: Path) -> Iterator[Record]:
    """A record for each stage: seconds, bytes of text and on disk, and memory."""
    config, links = CorpusConfig(str(out)), {link.stage: link for link in CHAIN}
    texts = [
        Task(number, (), out / "filter", f"part {number}", identity=hash_of([number, documents]), size=PART)
        for number in range(-(-documents // PART))
    ]
    size = 0
    with Local(partial(works, documents, config), workers) as engine, peak_memory() as peak:
        for stage in ("filter", "signatures", "cluster", "dedup"):
            tasks, _ = texts if stage == "filter" else tasks_of(config, links[stage]), peak()
            began = time.perf_counter()
            run_stage(stage, tasks, engine, lambda done: None)
            seconds, reports = time.perf_counter() - began, reports_of(out / stage)
            size = size or sum(report["bytes_out"] for report in reports)
            yield {
                "stage": "writing the text" if stage == "filter" else stage, "documents": documents,
                "workers": workers, "text_bytes": size, "wall_s": seconds, "peak_mb": peak() / 1e6,
                "task_s": sum(report["seconds"] for report in reports),
                "disk_bytes": sum(path.stat().st_size for path in (out / stage).iterdir()),
            }  # fmt: skip


def recall(out: Path, documents: int) -> Iterator[Record]:
    """For each share of edits, how many copies are in their original's cluster; then what is dropped but no copy."""
    clusters = pq.read_table(out / "cluster/clusters.parquet", columns=["id", "root"])
    ids, roots = (clusters[name].to_numpy() for name in ("id", "root"))
    numbers, root_numbers = (((x >> 32) * PART + (x & 0xFFFFFFFF)).tolist() for x in (ids, roots))
    root = dict(zip(numbers, root_numbers, strict=True))
    planted, found = Counter[float](), Counter[float]()
    for copy in range(COPIES, documents, COPIES):
        original = original_of(copy)
        planted[edit_of(copy)] += 1
        found[edit_of(copy)] += root.get(copy, copy) == root.get(original, original)
    for edit, count in sorted(planted.items()):
        yield {"edit": edit, "copies": count, "found": found[edit], "expected": count * chance(edit)}
    yield {"wrong": sum(first != number and number % COPIES > 0 for number, first in root.items())}


def chance(edit: float) -> float:
    """That a copy is found: a shingle stays if none of its words is replaced."""
    shape = shape_of(DedupConfig())
    kept = (1 - edit) ** shape.shingle_words
    return probability(kept / (2 - kept), shape)


def tables(records: Sequence[Record]) -> list[str]:
    from benchmarks.report import number, table

    stages, copies = ([record for record in records if key in record] for key in ("stage", "edit"))
    rows = [
        (
            r["stage"], number(r["wall_s"]), number(r["text_bytes"] / 1e6 / r["wall_s"]),
            number(r["text_bytes"] / 1e6 / r["task_s"]), number(r["peak_mb"]), number(r["disk_bytes"] / 1e9),
        )
        for r in stages
    ]  # fmt: skip
    first = stages[0]
    return [
        f"{first['text_bytes'] / 1e9:.2f} GB of text, {first['documents']:,} documents, {first['workers']} processes:",
        "",
        *table(("stage", "seconds", "MB/s", "MB/s of a process", "MB, largest process", "GB written"), rows),
        "",
        *table(
            ("words replaced", "copies", "found", "expected"),
            [
                (f"{r['edit']:.1%}", f"{r['copies']:,}", *(f"{r[k] / r['copies']:.1%}" for k in ("found", "expected")))
                for r in copies
            ],
        ),
        "",
        f"Dropped without being a copy: {records[-1]['wrong']:,} documents.",
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crawl.deduplication", description=__doc__)
    parser.add_argument(
        "--gigabytes", type=float, default=10, help="of text; the disk has to hold it twice, compressed"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-dedup"))
    options = parser.parse_args(arguments)
    # Imported here: the processes that are started read this file too, and torch would count as their memory.
    import torch

    from benchmarks.report import append, begin, header, heading

    given = sys.argv[1:] if arguments is None else arguments
    head = header("benchmarks.crawl.deduplication", given, torch.device("cpu"), ("numpy", "pyarrow"))
    data, file, records = options.out / "data", options.out / "results.jsonl", list[Record]()
    documents = int(options.gigabytes * 1e9 / sum(len(text_of(i)) for i in range(100)) * 100)
    begin(file, head)
    shutil.rmtree(data, ignore_errors=True)
    for record in measure(documents, options.workers, data):
        records.append(record)
        append(file, record)
        print(record, flush=True)
    for record in recall(data, documents):
        records.append(record)
        append(file, record)
    shutil.rmtree(data)
    lines = [heading(head), "", *tables(records)]
    (options.out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
