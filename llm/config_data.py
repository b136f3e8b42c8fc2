"""The `data` section of a run's config, and the phases in which some of it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm.errors import require


@dataclass(frozen=True)
class PhaseChange:
    """What changes once `samples` have been consumed; null: stays as it is."""

    samples: int
    """Consumed samples from which this holds."""
    seq_len: int | None = None
    """Tokens per sample."""
    global_batch_size: int | None = None
    """Samples per step over all ranks."""
    blend: dict[str, float] | None = None
    """Corpora and their weights."""

    def __post_init__(self) -> None:
        for name in ("samples", "seq_len", "global_batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.phases: {name} is {value}; expected at least 1")
        check_blend("data.phases", self.blend)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut into samples."""

    source: str = "stdlib"
    """`stdlib` (the Python standard library's own source) or a .txt, .jsonl, .jsonl.gz, .jsonl.zst file or a folder."""
    tokenizer: str = "train"
    """`train` (a byte-level BPE of model.vocab_size is trained on the corpus) or the path of a tokenizer.json."""
    path: str | None = None
    """Folder of the token shards, or its URL; null: data/<name of the source>-<vocab_size>."""
    cache: str = "data/cache"
    """Folder where prepare_data.py keeps copies of remote corpora."""
    blend: dict[str, float] | None = None
    """Training corpora (a prepared folder, a token file, a glob or a URL) and their weights; null: data.path alone."""
    seq_len: int = 128
    """Tokens per sample (T)."""
    phases: tuple[PhaseChange, ...] = ()
    """Changes of the sequence length, the batch size and the blend, keyed by consumed samples."""
    packing: Literal["chunk", "best_fit"] = "chunk"
    """Samples are cut from the stream of all tokens, or packed from whole documents by a plan made beforehand."""
    document_masks: bool = False
    """Documents of a sample do not attend to one another, and each counts its positions from 0."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by their hash, that is kept for validation."""
    validation_samples: int | None = None
    """Validate on this many samples; null: on all of the validation split."""
    loader: Literal["native", "numpy"] = "native"
    """The C++ loader or its NumPy twin; both give the same batches."""
    damaged: Literal["stop", "skip"] = "stop"
    """What follows when a sample cannot be read: an error, or another sample of its corpus is taken and counted."""
    verify: Literal["none", "background"] = "none"
    """Compare the SHA-256 of the token files with the manifest while training."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 1, f"data.seq_len is {self.seq_len}; expected at least 1")
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}; expected between 0 and 1",
        )
        require(
            self.validation_samples is None or self.validation_samples >= 1,
            f"data.validation_samples is {self.validation_samples}; expected at least 1, or null for all",
        )
        require(
            self.packing == "chunk" or self.document_masks,
            "data.packing best_fit puts unrelated documents into one sample; set data.document_masks=true",
        )
        check_blend("data.blend", self.blend)


def check_blend(key: str, blend: dict[str, float] | None) -> None:
    """Refuse a blend of nothing, and weights that are no shares. The weights need not sum to 1."""
    if blend is None:
        return
    require(len(blend) >= 1, f"{key}: the blend is empty; expected at least one corpus with its weight")
    for name, weight in blend.items():
        require(isinstance(name, str), f"{key}: found {name!r}; expected the path of a corpus (in quotes, if a number)")
        known = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        require(
            known and 0 < weight < float("inf"),
            f"{key}: the weight of {name!r} is {weight!r}; expected a number above 0 (leave the corpus out for none)",
        )
