"""gigatoken alone on Parquet files, timed: `python gigatoken_stages.py tokenize IN OUT TOKENIZER`.

Its own reader, one thread, and the ids as 16 bits in one file: no end of documents, no split, no checks. As for Ingot,
the first run is not timed, so both know the words. Prints a line of JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

# pyright: reportMissingImports=false
import numpy as np
from gigatoken import Tokenizer
from gigatoken.gigatoken_rs import ParquetFileSource


def tokenize(tokenizer: Tokenizer, source: Path, out: Path) -> int:
    """Encode the column `text`, and write ids and ends; returns how many documents there are."""
    paths: list[Any] = sorted(source.glob("*.parquet"))
    found: Any = tokenizer.encode_files(ParquetFileSource(paths, "text"), parallel=False).layout
    out.mkdir(parents=True, exist_ok=True)
    np.asarray(found.content.data).astype(np.uint16).tofile(out / "ids")
    np.asarray(found.offsets.data).tofile(out / "ends")
    return len(found)


def peak_mb() -> float:
    """Of this process's memory. Not ru_maxrss, in which that of the process it was forked from is counted."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(stage: str, source: str, out: str, raw: str) -> None:
    assert stage == "tokenize", stage
    tokenizer = Tokenizer.from_json(Path(raw).read_bytes())
    tokenize(tokenizer, Path(source), Path(out))
    began, cpu = time.perf_counter(), cpu_seconds()
    documents = tokenize(tokenizer, Path(source), Path(out))
    found = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - began, "documents": documents}
    print(json.dumps(found | {"peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
