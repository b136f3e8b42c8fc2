"""Ingot's loader. No other module of the benchmark knows it."""

from typing import Any

from benchmarks.loader.cases import Case
from benchmarks.loader.system import Batch, Batches, System
from benchmarks.loader.tokens import TokenSet
from llm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from llm.data import _native  # noqa: F401  imported before the clock starts, as every library is
from llm.data.corpora import Corpora, Corpus
from llm.data.loader import open_loader
from llm.data.tokens.manifest import FORMAT, FileEntry, Manifest, Shards, Split, read_manifest

UNHASHED = "0" * 64  # nothing here reads hashes, and a sparse corpus would take an hour to hash


class Ingot(System):
    """form: `native` (the file's own width, for a GPU) or `int64` (for a CPU, and as others deliver)."""

    def __init__(self, form: str) -> None:
        self.form = form

    def prepare(self, tokens: TokenSet, seq_len: int) -> None:
        """Write a manifest for token files as they lie, their hashes left out."""
        if (tokens.folder / "manifest.json").exists():
            return
        sizes = tokens.sizes
        shards = Shards(
            format="raw" if tokens.kind == "sparse" else "megatron",
            dtype={"uint16": "uint16", "uint32": "int32"}[tokens.item],
            paths=tuple(path.name for path in tokens.paths),
            tokens=tuple(sizes),
            bytes=tuple(size * tokens.item_size for size in sizes),
            sha256=(UNHASHED,) * len(sizes),
        )
        (tokens.folder / "tokenizer.json").write_text("{}")
        Manifest(
            format=FORMAT,
            source="made by the benchmark",
            source_sha256=None,
            validation_fraction=None,
            tokenizer=UNHASHED,
            tokenizer_sha256=UNHASHED,
            vocab_size=tokens.vocab_size,
            eod_id=tokens.eod_id,
            splits={"train": Split(tokens.tokens, tokens.shards, None, shards)},
            files={"tokenizer.json": FileEntry(2, UNHASHED)},
            bigram_nats_per_token=None,
            bigram_seq_len=None,
        ).save(tokens.folder)

    def open(self, tokens: TokenSet, case: Case, state: Any = None) -> Batches:
        config = RunConfig(
            model=ModelConfig(vocab_size=tokens.vocab_size, max_seq_len=case.seq_len),
            data=DataConfig(path=str(tokens.folder), seq_len=case.seq_len, document_masks=case.documents),
            train=TrainConfig(engine="plain", global_batch_size=case.rows, micro_batch_size=case.rows),
        )
        manifest, widen = read_manifest(tokens.folder), self.form == "int64"
        corpus = Corpus(manifest.shard_list(tokens.folder, "train"), tokens.folder, manifest)
        name = str(tokens.folder)
        corpora = Corpora(config, tokens.folder, manifest, {name: corpus}, {name: name})  # without a validation split
        loader = open_loader(corpora, dp_rank=0, dp_size=1, consumed=state or 0, widen=widen)
        try:
            while True:
                [batch] = loader.next_step().batches
                rows = batch.tokens
                inputs, labels = (rows[:, :-1], rows[:, 1:]) if widen else (rows, None)
                yield Batch(inputs, labels, batch.position_ids, batch.cu_seqlens)
        finally:
            loader.close()
