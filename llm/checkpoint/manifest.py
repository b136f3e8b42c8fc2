"""What a checkpoint folder holds, as JSON: every file, and every tensor as flat ranges of slices.

A checkpoint belongs to the model: it knows tensors by name and global shape, and no ranks. A rank's report of what it
wrote (rank-00000.json) has the same form, for that rank's part.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm.errors import CheckpointError, InputError
from llm.files import parse_json, regular_size
from llm.slices import Slice
from llm.typed import read, shown

FORMAT, VERSION = "ingot-checkpoint", 2
KINDS = ("master", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
# Bytes. In the manifest a piece takes 230; the state of a run with 100 corpora takes less than 1 MB.
LARGEST_MANIFEST, LARGEST_STATE = 1 << 25, 1 << 24
LONGEST_NAME = 2048  # bytes; and of what stands between two names
MAX_DIMS = 16
HEADER_BYTES = 512  # of a shard: of its own, and for each tensor beside its key
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
HEX = {"xxh128": re.compile(r"[0-9a-f]{32}"), "sha256": re.compile(r"[0-9a-f]{64}")}


@dataclass(frozen=True)
class Piece:
    """A flat range of this rank's slice of a named tensor."""

    name: str
    """Parameter name, such as "blocks.0.qkv.weight"."""
    kind: str
    """One of KINDS."""
    slice: Slice
    """The slice of the global tensor, without padding, that the range indexes into."""
    start: int
    """Offset of the range in the flattened slice."""
    data: Tensor
    """float32 [length], where it is kept: on the CPU or a GPU, and perhaps a view of what training will change."""


@dataclass(frozen=True)
class Stored:
    """Where a flat range of a slice lies: tensor `key` of safetensors file `file`."""

    file: str
    key: str
    dim: int
    start: int
    stop: int
    offset: int
    length: int


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of one kind: its global shape and the ranges that make it up."""

    shape: tuple[int, ...]
    pieces: tuple[Stored, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file of the folder: its size in bytes and one hash, in hex."""

    size: int
    xxh128: str | None = None
    sha256: str | None = None
    """What files have instead in manifests of version 1."""

    @property
    def hash(self) -> tuple[str, str]:
        """(algorithm, value): the one it has, by an algorithm of files.HASHES."""
        return ("xxh128", self.xxh128 or "") if self.sha256 is None else ("sha256", self.sha256)


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a checkpoint of `step`."""

    step: int
    files: dict[str, FileEntry]
    tensors: dict[tuple[str, str], TensorEntry]
    """By (name, kind)."""

    @property
    def sha256(self) -> str:
        """Of the content: equal on two ranks exactly when they see the same checkpoint."""
        return _digest(self._body())

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        body = self._body()
        return json.dumps({**body, "sha256": _digest(body)}, indent=1)

    @staticmethod
    def from_json(text: bytes) -> Manifest:
        """Parse and check everything but coverage; raises CheckpointError on any other text."""
        _expect(len(text) <= LARGEST_MANIFEST, f"the manifest has more than {LARGEST_MANIFEST} bytes")
        # One long text of other characters would take eight times its bytes.
        blocks = range(0, len(text) - LONGEST_NAME + 1, LONGEST_NAME)
        named = text.isascii() and all(text.find(b'"', i, i + LONGEST_NAME) >= 0 for i in blocks)
        what = f"{LONGEST_NAME} bytes without a quote, or one that is not ASCII"
        _expect(named, f"the manifest is not JSON that a run writes: it has {what}")
        body = parse_json(text, "the manifest")
        found = body.pop("sha256", None)
        _expect(body.get("format") == FORMAT, f"the manifest's format is not {FORMAT!r}")
        version = body.get("version")
        known = type(version) is int and version in (1, VERSION)
        _expect(known, f"the manifest has version {shown(version)}; this program reads 1 and {VERSION}")
        _expect(found == _digest(body), "the manifest does not match its own sha256")
        return parse(body)

    def check_sizes(self, folder: Path, each: Callable[[Iterable[str]], Iterable[str]] = iter) -> None:
        """Raise CheckpointError unless each file is a regular one in `folder`, of its size; each: yields names."""
        for name in each(self.files):
            entry = self.files[name]
            size = regular_size(folder / name)
            _expect(size == entry.size, f"{folder / name} has {size} bytes; expected {entry.size}")

    def check_coverage(self) -> None:
        """Raise CheckpointError unless each element of each tensor is stored exactly once, and the files hold no more.

        Ranges tile their slices, and the slices, all of one dimension, tile the tensor: intervals are all it takes.
        """
        least, most = dict.fromkeys(self.files, 0), dict.fromkeys(self.files, HEADER_BYTES)
        for (name, kind), entry in self.tensors.items():
            where, sizes = f"{name} ({kind})", entry.shape or (1,)
            dims = {piece.dim for piece in entry.pieces}
            _expect(len(dims) == 1, f"{where} is cut along dimensions {sorted(dims)}; expected one")
            dim = dims.pop()
            slices: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for piece in entry.pieces:
                ranges = slices.setdefault((piece.start, piece.stop), [])
                ranges.append((piece.offset, piece.offset + piece.length))
                least[piece.file] += 4 * piece.length
                most[piece.file] += 4 * piece.length + HEADER_BYTES + len(piece.key)
            _expect(_tiles(list(slices), sizes[dim]), f"the slices of {where} do not make it up exactly")
            for (start, stop), ranges in slices.items():
                whole = f"{where}, {start}:{stop} of dimension {dim}"
                count = Slice(entry.shape, dim, start, stop).numel
                _expect(_tiles(ranges, count), f"the pieces of {whole}, do not make it up exactly")
        for name in self.files.keys() - {"state.json"}:  # before any is hashed, however large it is said to be
            size, low, high = self.files[name].size, least[name], most[name]
            _expect(low > 0, f"the manifest lists {name}, which holds no tensor")
            _expect(low <= size <= high, f"{name} has {size} bytes in the manifest; its tensors take {low} to {high}")

    def _body(self) -> dict[str, Any]:
        tensors: dict[str, dict[str, Any]] = {}
        for (name, kind), entry in sorted(self.tensors.items()):
            pieces = [asdict(piece) for piece in entry.pieces]
            tensors.setdefault(name, {})[kind] = {"shape": list(entry.shape), "pieces": pieces}
        files = {name: dict([("size", entry.size), entry.hash]) for name, entry in sorted(self.files.items())}
        return {"format": FORMAT, "version": VERSION, "step": self.step, "files": files, "tensors": tensors}


def merge(parts: Iterable[Manifest]) -> Manifest:
    """One manifest of what the ranks of a save wrote; CheckpointError where they disagree."""
    parts = list(parts)
    steps = sorted({part.step for part in parts})
    _expect(steps, "no rank saved anything")
    _expect(len(steps) == 1, f"ranks saved different steps, {steps}")
    files = [item for part in parts for item in part.files.items()]
    _expect(len(dict(files)) == len(files), "two ranks wrote the same file")
    tensors: dict[tuple[str, str], TensorEntry] = {}
    for key, entry in (item for part in parts for item in part.tensors.items()):
        before = tensors.get(key, TensorEntry(entry.shape, ()))
        _expect(before.shape == entry.shape, f"ranks disagree on the shape of {key}")
        tensors[key] = TensorEntry(entry.shape, before.pieces + entry.pieces)
    return Manifest(steps[0], dict(files), tensors)


def parse(body: dict[str, Any]) -> Manifest:
    """The manifest in a JSON object without its sha256; raises CheckpointError."""
    try:
        step = read(int, body.get("step"), "step")
        files = read(dict[str, FileEntry], body.get("files"), "files")
        by_name = read(dict[str, dict[str, TensorEntry]], body.get("tensors"), "tensors")
    except InputError as error:
        raise CheckpointError(f"the manifest cannot be read: {error}") from error
    _expect(step >= 0, f"the manifest has step {step}; expected at least 0")
    for name, entry in files.items():
        _expect(NAME.fullmatch(name) and name != MANIFEST, f"the manifest has a file named {shown(name)}")
        _expect(entry.xxh128 is None or entry.sha256 is None, f"{name} has two hashes in the manifest; expected one")
        algorithm, value = entry.hash
        _expect(HEX[algorithm].fullmatch(value), f"{name} has no valid {algorithm} in the manifest")
        most = LARGEST_STATE if name == "state.json" else 2**63 - 1
        _expect(0 <= entry.size <= most, f"{name} has {entry.size} bytes in the manifest; expected 0 to {most}")
    tensors = {(name, kind): entry for name, kinds in by_name.items() for kind, entry in kinds.items()}
    for (name, kind), entry in tensors.items():
        _expect(NAME.fullmatch(name), f"the manifest has a tensor named {shown(name)}")
        _expect(kind in KINDS, f"{name} has the unknown kind {shown(kind)}; expected one of {KINDS}")
        where = f"{name} ({kind})"
        shaped = len(entry.shape) <= MAX_DIMS and min(entry.shape, default=1) >= 1
        _expect(shaped, f"{where} has the shape {shown(entry.shape)}; expected up to {MAX_DIMS} sizes of 1 or more")
        for piece in entry.pieces:
            if fault := _fault(name, kind, entry.shape, piece, files):
                raise CheckpointError(f"{where}{fault}")
    return Manifest(step, files, tensors)


def _fault(name: str, kind: str, shape: tuple[int, ...], piece: Stored, files: Collection[str]) -> str | None:
    """What is wrong unless the slice lies in the tensor, the range in the slice, and both in a file of their own."""
    sizes, start, stop, offset = shape or (1,), piece.start, piece.stop, piece.offset
    if piece.file not in files or piece.file == "state.json":
        return f" lies in {shown(piece.file)}, which is not listed as a file of tensors"
    if piece.key != key_of(kind, name, start, stop, offset):  # else two tensors might be one
        return f" lies under the key {shown(piece.key)}; expected {key_of(kind, name, start, stop, offset)}"
    if not 0 <= piece.dim < len(sizes):
        return f" has no dimension {piece.dim}"
    if not 0 <= start < stop <= sizes[piece.dim]:
        return f": {start}:{stop} is not a part of its dimension {piece.dim}"
    if offset < 0 or piece.length < 1 or offset + piece.length > Slice(shape, piece.dim, start, stop).numel:
        return f": elements from {offset}, {piece.length} of them, do not lie in its slice"
    return None


def key_of(kind: str, name: str, start: int, stop: int, offset: int) -> str:
    """The name, in its safetensors file, of the range of a slice that begins at `offset`."""
    return f"{kind}/{name}/{start}:{stop}/{offset}"


def _tiles(intervals: list[tuple[int, int]], length: int) -> bool:
    """Whether the half-open intervals cover 0..length, each point once."""
    starts, stops = zip(*sorted(intervals), strict=True)
    return (*starts, length) == (0, *stops)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _expect(condition: Any, message: str) -> None:
    if not condition:
        raise CheckpointError(message)
