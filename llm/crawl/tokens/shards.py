"""Token files of each part of the corpus, and the folder that they are joined into, which a run trains on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm.crawl.counts import Counts
from llm.crawl.dedup.clusters import split_of_cluster
from llm.crawl.documents import tables
from llm.crawl.tasks import Task, hash_of, read_report, write_report
from llm.crawl.tokens.encode import Encoder, bounds
from llm.data.tokenizer import Tokenizer
from llm.data.tokens.hashes import file_entry, sampled_hash
from llm.data.tokens.manifest import FORMAT, SPLITS, Manifest, Shards, Split
from llm.data.tokens.megatron import TokenWriter, token_dtype
from llm.data.tokens.sums import sums_name, sums_of, write_sums
from llm.errors import require
from llm.files import complete_file

CHECKED = 1000  # the first of every so many documents is encoded by the reference too ...
LARGEST = 1 << 20  # ... unless it has more bytes: the reference takes a hundred times as much memory
ORIGIN = ".origin.parquet"  # ends the name of the file that says where each document of a split lies
ORIGINS = pa.schema((("source", pa.string()), ("offset", pa.int64())))


class _Files:
    """The files of one split: <prefix>.bin, .idx and .origin.parquet."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, stack: ExitStack) -> None:
        self.bytes = 0  # of text
        self.tokens = stack.enter_context(TokenWriter.open(prefix, token_dtype(tokenizer.vocab_size)))
        origin = stack.enter_context(complete_file(prefix.with_name(prefix.name + ORIGIN)))
        self.origin = stack.enter_context(pq.ParquetWriter(origin, ORIGINS, compression="zstd"))


def write_part(task: Task, documents: Path, encoder: Encoder, validation_fraction: float, counts: Counts) -> None:
    """Write the token files NNNNN.<split>.* of a file of documents, which are the roots of their clusters.

    Raises InputError where the file is damaged, and, naming the document, where gigatoken and the reference differ.
    """
    with ExitStack() as stack:
        files = {split: _Files(task.path(f".{split}"), encoder.tokenizer, stack) for split in SPLITS}
        for table in tables(documents, "id", "text", *ORIGINS.names):
            column, ids = table["text"], table["id"].to_pylist()
            texts = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies one, too
            found, sizes = encoder.encode(texts), np.diff(bounds(texts))
            for row in range(-counts.documents_in % CHECKED, len(ids), CHECKED):
                if sizes[row] <= LARGEST:
                    name = f"document {ids[row]} ({table['source'][row]}, offset {table['offset'][row]})"
                    encoder.check(texts[row].as_py(), found[row], name)
            chosen = {split: list[int]() for split in SPLITS}
            for row, id in enumerate(ids):
                chosen[split_of_cluster(id, validation_fraction)].append(row)
            for split, rows in chosen.items():
                files[split].tokens.add_documents([found[row] for row in rows], encoder.tokenizer.eod_id)
                files[split].origin.write_table(table.select(ORIGINS.names).take(pa.array(rows, pa.int64())))
                files[split].bytes += int(sizes[rows].sum())
            counts.documents_in += len(ids)
            counts.bytes_in += int(sizes.sum())
    counts.documents_out, counts.bytes_out = counts.documents_in, counts.bytes_in
    counts.histograms["tokens"] = Counter({split: files[split].tokens.tokens for split in SPLITS})
    counts.histograms["bytes"] = Counter({split: files[split].bytes for split in SPLITS})


def join(task: Task, reports: Sequence[Path], tokenizer: Tokenizer, origin: str, counts: Counts) -> None:
    """Write into the task's folder the token files of the parts that have these reports, in order; then manifest.json.

    origin: as Manifest.tokenizer. Raises InputError where a split is empty, and where a part is damaged.
    """
    folder, splits, sources = task.folder, dict[str, Split](), dict[str, None]()
    for split in SPLITS:
        with ExitStack() as stack:
            files = _Files(folder / split, tokenizer, stack)
            for path in reports:
                report = read_report(path)["histograms"]
                if report["tokens"].get(split):
                    prefix = path.with_suffix(f".{split}")
                    files.tokens.append(prefix)
                    files.bytes += report["bytes"][split]
                    for table in tables(prefix.with_name(prefix.name + ORIGIN), *ORIGINS.names):
                        files.origin.write_table(table)
                        sources |= dict.fromkeys(table["source"].unique().to_pylist())
            advice = "use more text, or another tokenize.validation_fraction"
            require(files.tokens.documents > 0, f"the {split} split is empty; {advice}")
        ids, tokens = folder / f"{split}.bin", files.tokens
        size, sha256 = file_entry(ids)
        write_sums(folder / sums_name(split), sums_of(ids))
        columns = (ids.name,), (tokens.tokens,), (size,), (sha256,), sampled_hash([str(ids)])
        splits[split] = Split(
            tokens.tokens, tokens.documents, files.bytes, Shards("megatron", tokens.dtype.name, *columns)
        )
        counts.documents_in += tokens.documents
        counts.bytes_in += files.bytes
    counts.documents_out, counts.bytes_out = counts.documents_in, counts.bytes_in
    with complete_file(folder / "tokenizer.json") as file:
        file.write(tokenizer.raw)
    write_report(folder / "provenance.json", _provenance(folder.parent))
    ends = (".idx", ".sums", ORIGIN)
    names = ["tokenizer.json", "provenance.json", *(split + end for split in SPLITS for end in ends)]
    entries = {name: file_entry(folder / name) for name in names}
    Manifest(
        format=FORMAT,
        source=f"{len(sources)} raw files, the first of them {next(iter(sources))}",
        source_sha256=None,
        validation_fraction=None,
        tokenizer=origin,
        tokenizer_sha256=entries["tokenizer.json"].sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        splits=splits,
        files=entries,
        bigram_nats_per_token=None,
        bigram_seq_len=None,
    ).save(folder)


def _provenance(out: Path) -> dict[str, Any]:
    """Of each stage whose folder lies in `out`: version, settings, and the hash of them that its reports bear."""
    found = {path.parent.name: read_report(path) for path in sorted(out.glob("*/settings.json"))}
    return {name: settings | {"config": hash_of(settings)} for name, settings in found.items()}
