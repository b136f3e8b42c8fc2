"""One stage of datatrove's on files, timed: `python datatrove_stages.py STAGE IN OUT [LANGUAGE_MODEL TOKENIZER]`.

Its steps are called one after another without an executor, and Trafilatura without the sandbox process, which only make
them slower. Start-up (imports, models, the tokenizer of words) is not timed. Prints a line of JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# pyright: reportMissingImports=false
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import load_word_tokenizer
from fasttext.FastText import _FastText
from loguru import logger

CONFIG = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
PROSE = "This is a sentence of a warm-up, which is long enough to load whatever is loaded at the first call. " * 20


class Counted:
    """Documents that went by, and their text."""

    def __init__(self) -> None:
        self.documents, self.bytes, self.failed = 0, 0, 0

    def through(self, data: Iterator[Any]) -> Iterator[Any]:
        for document in data:
            self.documents += 1
            self.bytes += len(document.text.encode("utf-8", "replace"))
            yield document


def extracted(counted: Counted, data: Iterator[Any]) -> Iterator[Any]:
    extractor = Trafilatura(favour_precision=True)
    for document in data:
        try:
            document.text = extractor.extract(document.text)
        except Exception:  # noqa: BLE001 - as the library's own loop does
            counted.failed += 1
            continue
        if document.text:
            yield document


def filters(model: str) -> list[Any]:
    """FineWeb's, in its order, and its masking; the language model is the one that Ingot uses."""
    language = LanguageFilter("en")
    language.model._model = _FastText(model)
    rules = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False)]
    return [language, *rules, FineWebQualityFilter(), PIIFormatter()]


def written(data: Iterator[Any], out: Path) -> None:
    for _ in JsonlWriter(str(out), compression=None).run(data):
        pass


def signatures(source: Path, out: Path) -> None:
    MinhashDedupSignature(str(out), CONFIG).run(read(source))


def clusters(source: Path, out: Path) -> None:
    for bucket in range(CONFIG.num_buckets):
        MinhashDedupBuckets(str(source), str(out / "buckets"), config=CONFIG).run(None, bucket, CONFIG.num_buckets)
    MinhashDedupCluster(str(out / "buckets"), str(out / "remove"), CONFIG).run(None, 0, 1)


def read(source: Path) -> Iterator[Any]:
    return JsonlReader(str(source)).run()


def work(stage: str, source: Path, out: Path, model: str, tokenizer: str) -> Callable[[Counted], None]:
    """The stage, ready to run."""
    rules = filters(model) if stage in ("filter", "chain") else []
    warm_up(rules)

    def filtered(data: Iterator[Any]) -> Iterator[Any]:
        for rule in rules:
            data = rule.run(data)
        return data

    def chain(counted: Counted) -> None:
        documents = counted.through(WarcReader(str(source)).run())
        written(filtered(extracted(counted, documents)), out / "filter")
        signatures(out / "filter", out / "signatures")
        clusters(out / "signatures", out / "clusters")
        written(MinhashDedupFilter(str(out / "clusters/remove")).run(read(out / "filter")), out / "dedup")
        DocumentTokenizer(str(out / "tokens"), tokenizer, eos_token=None, shuffle_documents=False).run(
            read(out / "dedup")
        )

    stages: dict[str, Callable[[Counted], None]] = {
        "extract": lambda counted: written(extracted(counted, counted.through(WarcReader(str(source)).run())), out),
        "filter": lambda counted: written(filtered(counted.through(read(source))), out),
        "signatures": lambda counted: signatures(source, out),
        "cluster": lambda counted: clusters(source, out),
        "chain": chain,
    }
    return stages[stage]


def warm_up(rules: list[Any]) -> None:
    from datatrove.data import Document

    load_word_tokenizer("en").word_tokenize(PROSE)
    Trafilatura().extract(f"<html><body><main><p>{PROSE}</p></main></body></html>")
    for rule in rules:
        list(rule.run(iter([Document(text=PROSE, id="0")])))


def peak_mb() -> float:
    """Of this process's memory. Not ru_maxrss, in which that of the process it was forked from is counted."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(stage: str, source: str, out: str, model: str = "", tokenizer: str = "") -> None:
    logger.remove()
    run, counted = work(stage, Path(source), Path(out), model, tokenizer), Counted()
    began, cpu = time.perf_counter(), cpu_seconds()
    run(counted)
    found = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - began}
    found |= {"documents": counted.documents, "failed": counted.failed, "peak_mb": peak_mb()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
