"""`make corpus-demo`: real pages with planted noise through the whole chain, what each stage found of it, and a model.

Fetches a book and two handbooks through apt without installing them, wraps them into WARC files with boilerplate,
near-duplicates, odd charsets, truncated records and spam, runs launch/prepare_data.py all, and prints recall and
precision against what was planted. The shards then train the tiny model for a few steps. All of it lies in --out.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.crawl.noise import BLOCKED, Planted, plant, read_truth, write_truth, write_warcs
from benchmarks.crawl.pages import load_pages
from benchmarks.crawl.score import Score, damage, duplicates, extraction, filters, languages
from benchmarks.report import table
from llm.crawl.counts import Counts
from llm.crawl.documents import Document, read_documents
from llm.crawl.report.totals import read_totals

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "launch/configs/corpus/demo.yaml"
MODEL = "launch/configs/tiny-cpu.yaml"
SEED = 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crawl.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/corpus-demo"), help="folder of everything (300 MB)")
    parser.add_argument("--every", type=int, default=1, help="take every N-th page only, to try it")
    parser.add_argument("--steps", type=int, default=40, help="of training")
    options = parser.parse_args(arguments)
    truth = prepare(options.out, options.every)
    data = options.out / "data"
    places = {"input.source": options.out / "warc", "out": data, "filter.url.domains": options.out / "blocked.txt"}
    settings = [f"--{key}={path}" for key, path in places.items()]
    if code := run(["launch/prepare_data.py", "all", "--config", CONFIG, *settings]):
        return code
    print(f"\n## What was found of {len(truth)} pages with planted noise\n")
    print("\n".join(table(("", "pages", "recall", "precision"), [score.row() for score in scores(truth, data)])))
    print("\n## The tiny model on these tokens\n", flush=True)
    return train(options.out, data, options.steps)


def prepare(out: Path, every: int) -> list[Planted]:
    """The WARC files, unless they are there, and what is known of each page."""
    path = out / "truth.jsonl"
    if not path.exists():
        pages = load_pages(out / "packages")[::every]
        print(f"{len(pages)} pages with {sum(len(page.main) for page in pages) / 1e6:.0f} MB of HTML; planting noise")
        shutil.rmtree(out / "warc", ignore_errors=True)
        (out / "blocked.txt").write_text(f"# hosts that the filters refuse\n{BLOCKED}\n")
        write_truth(list(write_warcs(plant(pages, SEED), out / "warc")), path)  # written last
    return read_truth(path)


def scores(truth: list[Planted], data: Path) -> Iterator[Score]:
    """Of each stage in turn."""
    import pyarrow.parquet as pq

    from llm.crawl.dedup.curve import probability
    from llm.crawl.dedup.settings import DedupConfig
    from llm.crawl.dedup.stage import CLUSTERS, shape_of
    from llm.crawl.filter.settings import FilterConfig, LanguageRule
    from llm.crawl.filter.stage import Filter

    extracted = {document.url: document.text for document in documents(data / "extract")}
    filtered = list(documents(data / "filter"))
    reported = {totals.stage: totals for totals in read_totals(data)}
    cut = sum("no record can be read" in str(found["what"]) for found in reported["extract"].damage)
    yield from damage(truth, extracted, cut)
    yield from extraction(truth, extracted)
    rule = Filter(FilterConfig(rules=("language",), language=LanguageRule(languages=(), min_score=0.0)))

    def language(text: str) -> str:
        document = Document(0, text, "", "", 0)
        rule.refusal(document, Counts())
        return document.language

    yield from languages(truth, extracted, language)
    yield from filters(truth, extracted, {document.url: document.text for document in filtered})
    clusters = pq.read_table(data / "cluster" / CLUSTERS).to_pydict()
    shape = shape_of(DedupConfig())
    roots = dict(zip(clusters["id"], clusters["root"], strict=True))
    yield from duplicates(truth, filtered, roots, lambda likeness: probability(likeness, shape))


def documents(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.glob("[0-9]*.parquet")):
        yield from read_documents(path)


def train(out: Path, data: Path, steps: int) -> int:
    """Train on the tokens; returns the exit code."""
    name = f"{out.name}-model"
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    vocabulary = json.loads((data / "tokens/manifest.json").read_text())["vocab_size"]
    settings = {
        "name": name, "data.path": data / "tokens", "model.vocab_size": vocabulary,
        "train.max_steps": steps, "train.eval_interval": max(1, steps // 2), "optim.warmup_steps": max(1, steps // 4),
    }  # fmt: skip
    return run(["launch/pretrain.py", "--config", MODEL, *(f"--{key}={value}" for key, value in settings.items())])


def run(command: list[str]) -> int:
    return subprocess.run([sys.executable, *command], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
