"""Token shards made in a moment, for tests that need no text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from llm.data.tokens.hashes import file_entry
from llm.data.tokens.manifest import FORMAT, SPLITS, Manifest, Shards, Split
from llm.data.tokens.megatron import TokenWriter, token_dtype

MakeData = Callable[..., RunConfig]


def write_shards(folder: Path, tokens: dict[str, NDArray], vocab_size: int) -> Manifest:
    """A folder as prepare() leaves it, each split one document of the given tokens."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    dtype = token_dtype(vocab_size)
    for split in SPLITS:
        with TokenWriter.open(folder / split, dtype) as writer:
            writer.add(tokens[split])
    splits = {}
    for split in SPLITS:
        size, entry = tokens[split].size, file_entry(folder / f"{split}.bin")
        shards = Shards("megatron", dtype, (f"{split}.bin",), (size,), (entry.bytes,), (entry.sha256,))
        splits[split] = Split(size, 1, size, shards)
    manifest = Manifest(
        format=FORMAT,
        source="test",
        source_sha256="0",
        validation_fraction=0.05,
        tokenizer="train",
        tokenizer_sha256=file_entry(folder / "tokenizer.json").sha256,
        vocab_size=vocab_size,
        eod_id=0,
        splits=splits,
        files={name: file_entry(folder / name) for name in ("tokenizer.json", "train.idx", "validation.idx")},
        bigram_nats_per_token=None,
        bigram_seq_len=None,
    )
    manifest.save(folder)
    return manifest


@pytest.fixture
def two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs beside the prepared folders `one` and `two` of 3,000 training and 500 validation tokens."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        tokens = np.random.default_rng(seed).integers(0, 50, 3500)
        write_shards(Path(name), {"train": tokens[:3000], "validation": tokens[3000:]}, 50)


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """make_data(train tokens, validation tokens, ..., further keys of data): the config of random ids."""

    def make(
        n_train: int = 1001,
        n_validation: int = 200,
        *,
        vocab_size: int = 500,
        seq_len: int = 10,
        seed: int = 3,
        global_batch: int = 12,
        micro_batch: int = 3,
        loader: str = "numpy",
        validation_samples: int | None = None,
        **data: Any,
    ) -> RunConfig:
        rng = np.random.default_rng(n_train)
        tokens = {
            "train": rng.integers(0, vocab_size, n_train),
            "validation": rng.integers(0, vocab_size, n_validation),
        }
        folder = tmp_path / f"{n_train}-{n_validation}-{vocab_size}"
        write_shards(folder, tokens, vocab_size)
        return RunConfig(
            seed=seed,
            model=ModelConfig(vocab_size=vocab_size, max_seq_len=2048),
            data=DataConfig(
                path=str(folder),
                seq_len=seq_len,
                loader=loader,  # pyright: ignore[reportArgumentType]
                validation_samples=validation_samples,
                **data,
            ),
            train=TrainConfig(global_batch_size=global_batch, micro_batch_size=micro_batch),
        )

    return make
