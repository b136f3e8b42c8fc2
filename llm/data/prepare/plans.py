"""Writes packing plans of a run's corpora ahead of training, beside the tokens, and lists them in the manifest.

llm/data/samples/packing.py says what a plan is, and reads its file.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm.config import RunConfig
from llm.data.corpora import Corpora
from llm.data.native import import_native
from llm.data.prepare.tokenise import Progress, gather
from llm.data.samples.packing import HEADER, MAGIC, VERSION, PlanHeader
from llm.data.tokens.folder import lock
from llm.data.tokens.hashes import file_entry
from llm.data.tokens.manifest import plan_name, read_manifest
from llm.data.tokens.shards import ShardList, document_ends
from llm.errors import InputError
from llm.files import complete_file

WINDOW = 1 << 20  # pieces that are packed together
BLOCK = 1 << 20  # tokens searched for the ends of documents at a time


def write_plans(config: RunConfig, progress: Progress = lambda stage, done, total: None) -> list[Path]:
    """Write the packing plans that the run needs and does not have; returns their paths.

    None unless data.packing is best_fit: then nothing of the other corpora is looked at.
    """
    return write_missing(Corpora.open(config), progress) if config.data.packing == "best_fit" else []


def write_missing(corpora: Corpora, progress: Progress) -> list[Path]:
    """Write the missing plans of every corpus, for each sequence length that it is drawn in; returns their paths.

    Validation has no plans: its samples are chunks. Raises InputError for a corpus without a manifest to list them.
    """
    needed = {}
    for phase, blend in zip(corpora.config.phases, corpora.blends, strict=True):
        for name in blend:
            corpus = corpora.training[name]
            if corpus.folder is None or corpus.manifest is None:
                raise InputError(
                    f"{name} has no manifest that could list its packing plans; register the files with prepare_data.py"
                )
            needed[corpus.folder, phase.seq_len] = plan_name("train", phase.seq_len) in corpus.manifest.files
    return [_add_plan(folder, seq_len, progress) for (folder, seq_len), listed in needed.items() if not listed]


def _add_plan(folder: Path, seq_len: int, progress: Progress) -> Path:
    path = folder / plan_name("train", seq_len)
    with lock(folder):
        manifest = read_manifest(folder)  # again: another process may have added plans meanwhile
        if path.name not in manifest.files:
            shards = manifest.shard_list(folder, "train")
            write_plan(shards, seq_len, path, progress)
            dataclasses.replace(manifest, files=manifest.files | {path.name: file_entry(path)}).save(folder)
    return path


def write_plan(
    shards: ShardList, seq_len: int, path: Path, progress: Progress = lambda stage, done, total: None
) -> PlanHeader:
    """Plan samples of `seq_len` tokens for a corpus and write the plan, which appears only when it is complete.

    The same corpus gives the same bytes, in bounded memory. progress(stage, tokens done, tokens in all).
    Raises InputError when a file of the corpus is damaged.
    """
    native, total = import_native(), shards.n_tokens

    def ranges() -> Iterator[NDArray[np.int64]]:
        for i, found in enumerate(document_ranges(shards, seq_len, BLOCK), 1):
            yield found
            progress(f"packing samples of {seq_len} tokens", min(i * BLOCK, total), total)

    rows = pieces = piece_tokens = 0
    with complete_file(path) as file, tempfile.TemporaryFile(dir=path.parent) as ends:
        file.write(bytes(HEADER.size))
        for window in windows(ranges(), seq_len, WINDOW):
            packed, row_ends = native.plan_window(window, seq_len)
            file.write(packed.astype("<i8", copy=False).data)
            ends.write((row_ends + pieces).astype("<i8", copy=False).data)
            rows += len(row_ends)
            pieces += len(packed)
            piece_tokens += int(packed[:, 1].sum())
        ends.seek(0)
        shutil.copyfileobj(ends, file, BLOCK)
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, seq_len, total, rows, pieces, piece_tokens))
    return PlanHeader(seq_len, total, rows, pieces, piece_tokens)


def document_ranges(shards: ShardList, seq_len: int, block: int) -> Iterator[NDArray[np.int64]]:
    """Documents of a corpus in order, as ranges [n, 2] (first token, tokens), for each `block` tokens read.

    Documents are told apart by the end-of-document token, as in samples cut from the stream. One that goes on beyond a
    block is handed over as far as its full pieces go; what follows of it begins with the last token of those. So memory
    does not grow with the longest document.
    """
    begin = 0
    for stop, ends in document_ends(shards, block):
        bounds = np.concatenate(([begin], ends))
        ranges = np.stack([bounds[:-1], np.diff(bounds)], axis=1)
        begin = int(bounds[-1])
        # The last token read may be the document's last, which only what follows it can tell.
        pieces = (stop - 2 - begin) // seq_len
        if pieces > 0:
            ranges = np.concatenate((ranges, [[begin, pieces * seq_len + 1]]))
            begin += pieces * seq_len
        yield ranges


def windows(ranges: Iterable[NDArray[np.int64]], seq_len: int, window: int) -> Iterator[NDArray[np.int64]]:
    """The ranges, gathered until they make about `window` pieces."""
    return map(np.concatenate, gather(ranges, lambda part: len(part) + int(part[:, 1].sum()) // seq_len, window))
