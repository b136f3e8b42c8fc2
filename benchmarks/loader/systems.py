"""The loaders by name, and what each can do."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.loader.cases import Case
from benchmarks.loader.system import System


@dataclass(frozen=True)
class Entry:
    """A loader, described without importing it."""

    module: str
    """Of this package; loaders of one module share the process that has imported it."""
    kind: str
    """The subclass of System in it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    role: Literal["ours", "peer", "reference"] = "peer"
    rows: Literal["overlap", "tile", "random", "documents"] = "overlap"
    """What its rows are: they begin at multiples of T; lie end to end; begin anywhere; are pieces of documents."""
    documents: bool | None = False
    """Whether it tells documents apart; None: it does nothing else."""
    shards: bool = True
    """Whether it reads more than one file."""
    resumes: bool = True
    workers: bool = False
    """Whether it can prepare batches in processes of its own."""
    keeps: bool = False
    """Whether its first start leaves files that make later ones faster."""
    slow: bool = False
    """So slow that a few cases have to tell."""


SYSTEMS: dict[str, Entry] = {
    "Ingot": Entry("ours", "Ingot", {"form": "native"}, "ours", documents=True),
    "Ingot int64": Entry("ours", "Ingot", {"form": "int64"}, "ours", documents=True),
    "C gather": Entry("gather", "Gather", {"form": "native"}, "reference", documents=True),
    "C gather int64": Entry("gather", "Gather", {"form": "int64"}, "reference", documents=True),
    "NumPy rows": Entry("rivals.numpy_rows", "NumpyRows", {}, "reference", documents=True, shards=False),
    "Megatron": Entry(
        "rivals.megatron_gpt", "Megatron", {}, rows="documents", documents=True, workers=True, keeps=True
    ),
    # Its own default. (A mask of 8192 x 8192 per sample would take 256 MB before it is made binary.)
    "Megatron dense mask": Entry(
        "rivals.megatron_gpt", "Megatron", {"dense_mask": True}, rows="documents", documents=None, slow=True
    ),
    "nanoGPT": Entry("rivals.nanogpt", "NanoGPT", {}, rows="random", shards=False, resumes=False),
    "torchdata": Entry("rivals.torchdata_rows", "TorchData", {}, workers=True),
    "MosaicML": Entry("rivals.mosaic", "Mosaic", {}, workers=True),
    "litdata": Entry("rivals.litdata_rows", "LitData", {}, rows="tile", workers=True),
}
# What to install for a loader that is absent, with `-c constraints.txt`, so that torch stays the build that is there.
NEEDS = {
    "Megatron": "pip install --no-deps megatron-core packaging",
    "Megatron dense mask": "pip install --no-deps megatron-core packaging",
    "torchdata": "pip install torchdata",
    "MosaicML": "pip install mosaicml-streaming 'transformers<5' torchvision, the latter of torch's own build",
    "litdata": "pip install litdata torchvision, the latter of torch's own build",
}
QUICK = ("Ingot", "Ingot int64", "C gather", "C gather int64", "NumPy rows")  # they need no package of others


def build(name: str) -> System:
    """The loader; ImportError where its package is not installed."""
    entry = SYSTEMS[name]
    module = importlib.import_module(f"benchmarks.loader.{entry.module}")
    return getattr(module, entry.kind)(**entry.options)


def runs(name: str, case: Case) -> bool:
    """Whether the case is one for this loader."""
    entry = SYSTEMS[name]
    if entry.kind == "Gather":
        return case.task in ("check", "rate") and case.shards == 1 and not case.workers
    if case.huge:
        return name == "Ingot"
    if case.task in ("start", "wait") and (name == "Ingot int64" or entry.kind == "NumpyRows"):
        return False
    return (
        (entry.documents is not False if case.documents else entry.documents is not None)
        and (entry.shards or case.shards == 1)
        and (entry.resumes or not case.resume)
        and (entry.workers or not case.workers)
        and (entry.keeps or not case.fresh)
        and not (entry.slow and (case.cold or case.seq_len > 2048 or case.item != "uint16" or case.task == "wait"))
    )
