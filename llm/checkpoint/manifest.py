"""What a checkpoint folder holds, as JSON: every file, and every tensor as flat ranges of slices.

A checkpoint belongs to the model: tensors go by name and global shape, and nothing here knows
ranks. A rank's report of what it wrote (rank-00000.json) is a manifest too, of its part.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import Tensor

from llm.errors import CheckpointError
from llm.files import parse_json
from llm.slices import Slice

FORMAT, VERSION = "ingot-checkpoint", 1
KINDS = ("master", "exp_avg", "exp_avg_sq")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")


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
    """float32 [length] on the CPU."""


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
    """A file of the folder: its size in bytes and its sha256 in hex."""

    size: int
    sha256: str


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
        body = parse_json(text, "the manifest")
        found = body.pop("sha256", None)
        _expect(body.get("format") == FORMAT, f"the manifest's format is not {FORMAT!r}")
        _expect(
            body.get("version") == VERSION,
            f"the manifest has version {body.get('version')!r}; this program reads {VERSION}",
        )
        _expect(found == _digest(body), "the manifest does not match its own sha256")
        return parse(body)

    def check_coverage(self) -> None:
        """Raise CheckpointError unless each element of each tensor is stored exactly once."""
        for (name, kind), entry in self.tensors.items():
            _check_tensor(f"{name} ({kind})", entry)

    def _body(self) -> dict[str, Any]:
        tensors: dict[str, dict[str, Any]] = {}
        for (name, kind), entry in sorted(self.tensors.items()):
            pieces = [asdict(piece) for piece in entry.pieces]
            tensors.setdefault(name, {})[kind] = {"shape": list(entry.shape), "pieces": pieces}
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": files,
            "tensors": tensors,
        }


def merge(parts: Iterable[Manifest]) -> Manifest:
    """One manifest of what the ranks of a save wrote; CheckpointError where they disagree."""
    step, files, tensors = None, {}, {}
    for part in parts:
        _expect(step in (None, part.step), f"ranks saved different steps, {step} and {part.step}")
        step = part.step
        _expect(not files.keys() & part.files.keys(), "two ranks wrote the same file")
        files.update(part.files)
        for key, entry in part.tensors.items():
            before = tensors.get(key, TensorEntry(entry.shape, ()))
            _expect(before.shape == entry.shape, f"ranks disagree on the shape of {key}")
            tensors[key] = TensorEntry(entry.shape, before.pieces + entry.pieces)
    _expect(step is not None, "no rank saved anything")
    return Manifest(step, files, tensors)  # pyright: ignore[reportArgumentType]


def parse(body: dict[str, Any]) -> Manifest:
    """The manifest in a JSON object without its sha256; raises CheckpointError."""
    files, tensors = {}, {}
    for name, entry in _object(body.get("files"), "files").items():
        _expect(NAME.fullmatch(name), f"the manifest has a file named {name!r}")
        entry = _object(entry, name, FileEntry)
        _expect(_is_match(SHA256, entry["sha256"]), f"{name} has no valid sha256 in the manifest")
        files[name] = FileEntry(_integer(entry["size"], 0, name), entry["sha256"])
    for name, kinds in _object(body.get("tensors"), "tensors").items():
        _expect(NAME.fullmatch(name), f"the manifest has a tensor named {name!r}")
        for kind, entry in _object(kinds, name).items():
            _expect(kind in KINDS, f"{name} has the unknown kind {kind!r}; expected one of {KINDS}")
            tensors[name, kind] = _parse_tensor(f"{name} ({kind})", entry, files)
    return Manifest(_integer(body.get("step"), 0, "step"), files, tensors)


def _parse_tensor(where: str, entry: Any, files: dict[str, FileEntry]) -> TensorEntry:
    entry = _object(entry, where, TensorEntry)
    _expect(isinstance(entry["shape"], list), f"{where} has no shape")
    _expect(isinstance(entry["pieces"], list), f"{where} has no list of pieces")
    shape = tuple(_integer(size, 1, where) for size in entry["shape"])
    pieces = []
    for found in entry["pieces"]:
        fields = _object(found, where, Stored)
        _expect(
            isinstance(fields["key"], str) and isinstance(fields["file"], str),
            f"a piece of {where} does not name its tensor and file",
        )
        for key in ("dim", "start", "stop", "offset", "length"):
            _integer(fields[key], 0, where)
        piece = Stored(**fields)
        _expect(piece.file in files, f"{where} lies in {piece.file!r}, which is not listed")
        _check_range(where, shape, piece)
        pieces.append(piece)
    return TensorEntry(shape, tuple(pieces))


def _check_range(where: str, shape: tuple[int, ...], piece: Stored) -> None:
    """The slice lies in the tensor and the range in the slice."""
    sizes = shape or (1,)
    _expect(piece.dim < len(sizes), f"{where} has no dimension {piece.dim}")
    _expect(
        piece.start < piece.stop <= sizes[piece.dim],
        f"{where}: {piece.start}:{piece.stop} is not a part of its dimension {piece.dim}",
    )
    count = prod(sizes) // sizes[piece.dim] * (piece.stop - piece.start)
    _expect(
        piece.length >= 1 and piece.offset + piece.length <= count,
        f"{where}: elements from {piece.offset}, {piece.length} of them, do not lie in its slice",
    )


def _check_tensor(where: str, entry: TensorEntry) -> None:
    """Ranges tile their slices, and the slices, all of one dimension, tile the tensor.

    So it takes intervals alone, whatever the size of the tensor.
    """
    sizes = entry.shape or (1,)
    dims = {piece.dim for piece in entry.pieces}
    _expect(len(dims) == 1, f"{where} is cut along dimensions {sorted(dims)}; expected one")
    dim = dims.pop()
    slices: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for piece in entry.pieces:
        ranges = slices.setdefault((piece.start, piece.stop), [])
        ranges.append((piece.offset, piece.offset + piece.length))
    _expect(_tiles(list(slices), sizes[dim]), f"the slices of {where} do not make it up exactly")
    for (start, stop), ranges in slices.items():
        count = prod(sizes) // sizes[dim] * (stop - start)
        _expect(
            _tiles(ranges, count),
            f"the pieces of {where}, {start}:{stop} of dimension {dim}, do not make it up exactly",
        )


def _tiles(intervals: list[tuple[int, int]], length: int) -> bool:
    """Whether the half-open intervals cover 0..length, each point once."""
    position = 0
    for start, stop in sorted(intervals):
        if start != position:
            return False
        position = stop
    return position == length


def _digest(body: dict[str, Any]) -> str:
    try:
        text = json.dumps(body, sort_keys=True)
    except RecursionError as error:
        raise CheckpointError("the manifest is nested too deeply") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _expect(condition: Any, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def _object(value: Any, where: str, fields: type | None = None) -> dict[str, Any]:
    """A JSON object; with exactly the fields of the dataclass `fields` where given."""
    _expect(isinstance(value, dict), f"the manifest's entry of {where} is not an object")
    if fields is not None:
        expected = list(fields.__dataclass_fields__)
        _expect(
            sorted(value) == sorted(expected),
            f"the manifest's entry of {where} has {sorted(value)}; expected {sorted(expected)}",
        )
    return value


def _integer(value: Any, low: int, where: str) -> int:
    """An integer >= low: JSON's true and 1.0 are none."""
    _expect(type(value) is int and value >= low, f"{value!r} in {where} is not an integer >= {low}")
    return value


def _is_match(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
