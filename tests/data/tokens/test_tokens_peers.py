"""Files that Megatron's own builder and datatrove's own writer make are read as they are; theirs read ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from token_files import CORPORA

from llm.data.tokens.megatron import TokenWriter
from llm.data.tokens.shards import ShardList, check_file, document_lengths, inspect_files

VOCAB = 60_000


def made_up_documents(seed: int, count: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(1, VOCAB, rng.integers(1, 400)), 0) for _ in range(count)]


def check_reads(corpus: ShardList, documents: list[NDArray[np.int64]]) -> None:
    """Both corpora must give the documents one after another, and the index their lengths."""
    flat = np.concatenate(documents)
    assert corpus.n_tokens == flat.size
    for make in CORPORA.values():
        reader = make(corpus)
        assert np.array_equal(reader.read(0, flat.size), flat)
        starts = np.arange(0, flat.size - 129, 128)
        assert np.array_equal(reader.read_rows(starts, 129), flat[starts[:, None] + np.arange(129)])
    found = np.concatenate(list(document_lengths(corpus)))
    assert found.tolist() == [document.size for document in documents]
    for path, tokens in zip(corpus.paths, corpus.tokens, strict=True):
        check_file(path, corpus.format, corpus.dtype, tokens)


@pytest.mark.parametrize(("dtype", "vocab_size"), [("uint16", VOCAB), ("int32", 200_000)])
def test_megatrons_builder(tmp_path: Path, dtype: str, vocab_size: int):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    documents = made_up_documents(1, 500)
    for name, part in (("a", documents[:300]), ("b", documents[300:])):
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.dtype(dtype).type)
        for i, document in enumerate(part):
            if i % 3:  # one sequence, or several in one document, by either way of writing them
                builder.add_document(torch.from_numpy(document), [document.size])
            elif document.size >= 3:
                cut = document.size // 3
                builder.add_item(torch.from_numpy(document[:cut]))
                builder.add_item(torch.from_numpy(document[cut:]))
                builder.end_document()
            else:
                builder.add_item(torch.from_numpy(document))
                builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    corpus = inspect_files("x", str(tmp_path), vocab_size=vocab_size, eod_id=0)
    assert (corpus.format, corpus.dtype) == ("megatron", dtype)
    check_reads(corpus, documents)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_ours_and_would_have_written_the_same(tmp_path: Path, dtype: str):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    documents = made_up_documents(2, 300)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    with TokenWriter.open(tmp_path / "ours", dtype) as writer:
        for document in documents:
            writer.add(document)
            builder.add_document(torch.from_numpy(document), [document.size])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    dataset = indexed.IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == len(documents)
    assert all(np.array_equal(found, document) for found, document in zip(dataset, documents, strict=True))


@pytest.mark.parametrize(("width", "vocab_size"), [(2, VOCAB), (4, 200_000)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_datatroves_writer(tmp_path: Path, width: int, vocab_size: int, shuffled: bool):
    tokenizer = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    documents = made_up_documents(3, 500)
    for rank, part in enumerate((documents[:300], documents[300:])):
        folder = tmp_path / "unshuffled" if shuffled else tmp_path / "out"
        name = tokenizer.get_output_filename("web", rank, "unshuffled")
        file = tokenizer.TokenizedFile(
            str(folder), name, tokenizer_name_or_path="gpt2", save_final_metadata=True, token_size=width
        )
        for document in part:
            file.write(document.tolist(), None)
        file.close()
        if shuffled:
            order = np.random.default_rng(rank).permutation(len(part))
            part[:] = [part[i] for i in order]
            new = tokenizer.get_datafolder(str(tmp_path / "out"))
            file.copy("web", order, new, rank, max_tokens_per_file=20_000)
            documents[300 * rank : 300 * rank + len(part)] = part
    corpus = inspect_files("x", f"{tmp_path}/out/*", vocab_size=vocab_size, eod_id=0)
    assert (corpus.format, corpus.dtype) == ("datatrove", {2: "uint16", 4: "uint32"}[width])
    assert len(corpus.paths) > 4 if shuffled else len(corpus.paths) == 2
    check_reads(corpus, documents)
