"""The whole chain on more and more HTML, with one process and with several: seconds of each stage, and memory."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.crawl.noise import inflated, write_warcs
from benchmarks.crawl.pages import Page
from benchmarks.crawl.stages import ROOT, SEED, VOCABULARY, up_to
from benchmarks.report import Record
from llm.crawl.report.totals import read_totals

SAMPLED = 0.5  # seconds between two looks at the memory


def grow(
    out: Path,
    pages: Sequence[Page],
    sizes: Sequence[float],
    workers: Sequence[int],
    say: Callable[[str], None] = print,
) -> Iterator[Record]:
    """A record for each size (GB of HTML) and number of processes. The pages of each size stay in OUT/SIZE."""
    for size in sizes:
        folder = out / str(size)
        count, html = prepare(folder, pages, size, say)
        warc = sum(path.stat().st_size for path in (folder / "warc").iterdir())
        for processes in workers:
            shutil.rmtree(out / "data", ignore_errors=True)
            settings = {
                "input.source": folder / "warc", "out": out / "data", "tokenizer.vocab_size": VOCABULARY,
                "tokenize.validation_fraction": 0.05, "engine.workers": processes,
            }  # fmt: skip
            (out / "config.yaml").write_text("{}\n")
            facts = {"gigabytes": html / 1e9, "warc_bytes": warc, "pages": count, "workers": processes}
            facts["load"] = os.getloadavg()[0]
            arguments = ["--config", str(out / "config.yaml"), *(f"--{key}={value}" for key, value in settings.items())]
            yield facts | chain(arguments) | {"stages": stages(out / "data")}
    shutil.rmtree(out / "data", ignore_errors=True)


def prepare(folder: Path, pages: Sequence[Page], size: float, say: Callable[[str], None]) -> tuple[int, int]:
    """Write FOLDER/warc, so many GB of HTML, unless that has been done: the pages, and their bytes."""
    facts = folder / "facts.json"
    if not facts.exists():
        say(f"preparing {size} GB of HTML")
        shutil.rmtree(folder, ignore_errors=True)
        sizes = list(write_counted(folder / "warc", pages, int(size * 1e9)))
        facts.write_text(json.dumps([len(sizes), sum(sizes)]))
    count, html = json.loads(facts.read_text())
    return count, html


def write_counted(folder: Path, pages: Sequence[Page], size: int) -> Iterator[int]:
    """Write so many bytes of HTML; the bytes of each page."""
    sizes = list[int]()

    def noted() -> Iterator:
        for sent in up_to(inflated(pages, SEED), size):
            sizes.append(len(sent.body))
            yield sent

    for _ in write_warcs(noted(), folder):
        yield sizes.pop()


def chain(arguments: list[str]) -> Record:
    """Run it; wall and CPU seconds, and MB of the largest of its processes and of all together, at most."""
    began, cpu, peak, total = time.perf_counter(), children_seconds(), 0.0, 0.0
    process = subprocess.Popen([sys.executable, "launch/prepare_data.py", "all", *arguments], cwd=ROOT)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess, OSError):
            first = psutil.Process(process.pid)
            sizes = [one.memory_info().rss / 1e6 for one in (first, *first.children(recursive=True))]
            peak, total = max(peak, *sizes), max(total, sum(sizes))
        with suppress(subprocess.TimeoutExpired):
            process.wait(SAMPLED)
    if process.returncode:
        raise RuntimeError(f"prepare_data.py all {' '.join(arguments)} ended with {process.returncode}")
    return {"wall_s": time.perf_counter() - began, "cpu_s": children_seconds() - cpu, "peak_mb": peak, "all_mb": total}


def children_seconds() -> float:
    """CPU seconds of all processes that were started from here, or from these, and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def stages(data: Path) -> dict[str, Record]:
    """What each stage has read and written, and the seconds of its tasks one after another."""
    names = ("documents_in", "documents_out", "bytes_in", "bytes_out", "seconds")
    found = {totals.stage: {name: getattr(totals, name) for name in names} for totals in read_totals(data)}
    for stage, record in found.items():
        record["disk_bytes"] = sum(path.stat().st_size for path in (data / stage).rglob("*") if path.is_file())
    return found
