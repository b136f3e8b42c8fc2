"""The loaders by name, and what each can do."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.loader.cases import Case
from benchmarks.loader.system import System


@dataclass(frozen=True)
class Entry:
    """A loader, described without importing it.

    module: of this package; loaders of one module share the process that has imported it. kind: the subclass of System
    in it. rows: they begin at multiples of T; lie end to end; begin anywhere; are pieces of documents. documents:
    whether it tells them apart. shards: whether it reads more than one file. starts: whether its start is measured.
    """

    module: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    role: Literal["ours", "peer", "reference"] = "peer"
    rows: Literal["overlap", "tile", "random", "documents"] = "overlap"
    documents: bool = False
    shards: bool = True
    starts: bool = True
    resumes: bool = True


GATHER = Entry("gather", "Gather", {}, "reference", "random", documents=True, shards=False, starts=False)
SYSTEMS: dict[str, Entry] = {
    "Ingot": Entry("ours", "Ingot", {"form": "native"}, "ours", documents=True),
    "Ingot int64": Entry("ours", "Ingot", {"form": "int64"}, "ours", documents=True, starts=False),
    "C gather": replace(GATHER, options={"form": "native"}),
    "C gather int64": replace(GATHER, options={"form": "int64"}),
    "Megatron": Entry("rivals.megatron_gpt", "Megatron", rows="documents", documents=True),
    "nanoGPT": Entry("rivals.nanogpt", "NanoGPT", rows="random", shards=False, resumes=False),
    "torchdata": Entry("rivals.torchdata_rows", "TorchData"),
    "MosaicML": Entry("rivals.mosaic", "Mosaic"),
    "litdata": Entry("rivals.litdata_rows", "LitData", rows="tile"),
}
# What to install for a loader that is absent, with `-c constraints.txt`, so that torch stays the build that is there.
NEEDS = {
    "Megatron": "pip install --no-deps megatron-core packaging",
    "torchdata": "pip install torchdata",
    "MosaicML": "pip install mosaicml-streaming 'transformers<5' torchvision, the latter of torch's own build",
    "litdata": "pip install litdata torchvision, the latter of torch's own build",
}
QUICK = ("Ingot", "Ingot int64", "C gather", "C gather int64", "nanoGPT")  # they need no package of others


def build(name: str) -> System:
    """The loader; ImportError where its package is not installed."""
    entry = SYSTEMS[name]
    module = importlib.import_module(f"benchmarks.loader.{entry.module}")
    return getattr(module, entry.kind)(**entry.options)


def runs(name: str, case: Case) -> bool:
    """Whether the case is one for this loader."""
    entry = SYSTEMS[name]
    if case.huge:
        return name == "Ingot"
    return (
        (entry.documents or not case.documents)
        and (entry.shards or case.shards == 1)
        and (entry.starts or case.task != "start")
        and (entry.resumes or not case.resume)
    )
