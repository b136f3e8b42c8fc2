"""One stage of Daft's on files, timed: `python daft_stages.py STAGE IN OUT`. Prints a line of JSON.

Daft reads WARC, normalises text, computes MinHashes, and groups by the hashes of a band. It has no extractor, no
filters and no connected components: the last are found here by a small union-find.
"""

import json
import sys
import time
from pathlib import Path

# pyright: reportMissingImports=false
import daft
from daft import col
from daft.functions import minhash, normalize, slice

BANDS, ROWS, WORDS = 14, 8, 5


def read(source: Path, out: Path) -> int:
    """Every record of WARC files."""
    frame = daft.read_warc(f"{source}/*.warc.gz").select("WARC-Target-URI", "warc_content")
    frame.write_parquet(str(out), write_mode="overwrite")
    return daft.read_parquet(f"{out}/*.parquet").count_rows()


def signatures(source: Path, out: Path) -> int:
    """MinHashes of documents in Parquet."""
    text = normalize(col("text"), remove_punct=True, lowercase=True, nfd_unicode=True, white_space=True)
    hashes = minhash(text, num_hashes=BANDS * ROWS, ngram_size=WORDS)
    daft.read_parquet(f"{source}/*.parquet").select(col("id"), hashes.alias("hashes")).write_parquet(
        str(out), write_mode="overwrite"
    )
    return 0


def cluster(source: Path, out: Path) -> int:
    """Clusters of documents with an equal band; returns how many documents are not the first of theirs."""
    frame = daft.read_parquet(f"{source}/*.parquet")
    hashes = col("hashes").cast(daft.DataType.list(daft.DataType.uint32()))
    roots: dict[int, int] = {}

    def root(x: int) -> int:
        while roots.setdefault(x, x) != x:
            x = roots[x]
        return x

    for band in range(BANDS):
        part = slice(hashes, band * ROWS, (band + 1) * ROWS).hash().alias("band")
        groups = frame.select(col("id"), part).groupby("band").agg(col("id").list_agg().alias("ids"))
        for ids in groups.where(col("ids").list_count() > 1).to_pydict()["ids"]:
            first, *others = sorted({root(x) for x in ids})
            roots.update(dict.fromkeys(others, first))
    dropped = sum(root(x) != x for x in roots)
    out.mkdir(parents=True, exist_ok=True)
    (out / "dropped.txt").write_text(f"{dropped}\n")
    return dropped


def peak_mb() -> float:
    """Of this process's memory. Not ru_maxrss, in which that of the process it was forked from is counted."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def main(stage: str, source: str, out: str) -> None:
    stages = {"read": read, "signatures": signatures, "cluster": cluster}
    daft.set_runner_native()
    began, cpu = time.perf_counter(), time.process_time()
    documents = stages[stage](Path(source), Path(out))
    found = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - began, "documents": documents}
    print(json.dumps(found | {"peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
