"""Any checkpoint to a Hugging Face folder and back, one tensor at a time; forms.py says what such folders hold."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm import files
from llm.checkpoint.forms import GPT2, Weight, form_of, read_config, weights, write_config
from llm.checkpoint.manifest import NAME, Piece
from llm.checkpoint.reader import CheckpointReader
from llm.config import ModelConfig
from llm.errors import CheckpointError, InputError, require
from llm.slices import Slice
from llm.typed import read, shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5_000_000_000
BLOCK = 1 << 24  # elements of a piece
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Constants that older versions of `transformers` stored beside the weights.
HARMLESS = re.compile(r".*(\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)")


class HuggingFaceReader:
    """The weights of a Hugging Face folder under Ingot's names: what an engine loads, like a checkpoint of step 0."""

    def __init__(self, folder: Path) -> None:
        """Check that every tensor is there, in its shape, and no other. Raises InputError or CheckpointError."""
        self.folder = folder
        found = _json(folder / "config.json")
        self.form, self.config = read_config(found)
        ends = found.get("eos_token_id")
        self.end: int | None = read(int | None, ends[0] if ends and isinstance(ends, list) else ends, "eos_token_id")
        """The token that ends a document, the first of several."""
        self._open: dict[str, Any] = {}
        self._files = self._tensor_files()
        # Some files hold the model without the head's class, whose names begin with that of the whole.
        outer = self.form.blocks.split(".")[0] + "."
        self._prefix = "" if any(name.startswith(outer) for name in self._files) else outer
        count, layers = len(self._files), self.config.n_layer
        require(layers <= count, f"there are {layers} blocks by config.json and {count} tensors")
        self._weights = weights(self.form, self.config)
        self._check()

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a parameter."""
        return self._weights[name].shape

    def read_slice(self, name: str, kind: str, part: Slice) -> Tensor:
        """The part of a parameter, fp32 [part.shape] on the CPU; `kind` is "master". Raises CheckpointError."""
        assert kind == "master", f"a Hugging Face folder has no {kind}"
        weight = self._weights[name]
        if part.global_shape != weight.shape:
            raise CheckpointError(
                f"{name} has shape {weight.shape} in {self.folder}; the model has {part.global_shape}"
            )
        start, stop, group = part.start, part.stop, weight.group
        columns = slice(None)
        if part.dim == 1:
            start, stop, columns = 0, weight.shape[0], slice(part.start, part.stop)
        if start % group or stop % group:
            return part.take(self.read_slice(name, kind, Slice.full(weight.shape))).clone()
        target = torch.empty(part.shape)
        for each in weight.parts:
            rows = slice(each.start + start // group * each.rows, each.start + stop // group * each.rows)
            keys = (columns, rows) if weight.transposed else (rows, columns)
            stored = self._stored(each.tensor)
            found = stored[keys] if len(weight.shape) == 2 else stored[rows]
            found = found.t() if weight.transposed and found.dim() == 2 else found
            ours = each.of(target, group)
            ours.copy_(found.unflatten(0, ours.shape[:2]))
        if not target.isfinite().all():
            raise CheckpointError(f"{name} has values that are not finite in {self.folder}")
        return target

    def pieces(self) -> Iterator[Piece]:
        """All of the weights, as a checkpoint is written of them."""
        for name, weight in self._weights.items():
            shape, row = weight.shape, prod(weight.shape[1:])
            step = max(1, BLOCK // (row * weight.group)) * weight.group
            for start in range(0, shape[0], step):
                part = Slice(shape, 0, start, min(start + step, shape[0]))
                yield Piece(
                    name, "master", Slice.full(shape), start * row, self.read_slice(name, "master", part).flatten()
                )

    def _tensor_files(self) -> dict[str, str]:
        """Which file holds each stored tensor."""
        if (self.folder / INDEX).is_file():
            found = read(dict[str, str], _json(self.folder / INDEX).get("weight_map"), f"{INDEX}: weight_map")
            wrong = [file for file in found.values() if not NAME.fullmatch(file)]
            require(not wrong, f"{INDEX} names the file {shown(wrong[:1])}, which is not one of the folder")
            return found
        pickled = [path.name for path in self.folder.iterdir() if path.suffix in PICKLED]
        require(
            (self.folder / SINGLE).is_file() or not pickled,
            f"{', '.join(sorted(pickled)[:3])}: pickled weights can run code when they are read; expected {SINGLE}, "
            "which save_pretrained of transformers writes",
        )
        return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    def _check(self) -> None:
        """Every tensor of the form is there, in its shape and a dtype of DTYPES, and no other."""
        expected = {name: shape for weight in self._weights.values() for name, shape in weight.shapes().items()}
        for name, shape in expected.items():
            stored = self._stored(name)
            found = tuple(stored.get_shape())
            require(found == shape, f"{name} has the shape {found}; expected {shape} by config.json")
            dtype = stored.get_dtype()
            require(dtype in files.DTYPES.values(), f"{name} is {dtype}; expected {', '.join(files.DTYPES.values())}")
        head = "lm_head.weight"
        extra = self._files.keys() - {name.removeprefix(self._prefix) for name in expected}
        extra = sorted(name for name in extra if not HARMLESS.fullmatch(name))
        if extra == [head] and self.config.tie_embeddings:  # a copy of the embedding
            table = self._stored(self.form.names["embedding"] + ".weight")
            require(
                torch.equal(self._stored(head)[:], table[:]), f"{head} differs from the embedding that it is tied to"
            )
            extra = []
        require(not extra, f"{', '.join(extra[:3])}: no such weights in a {self.form.model_type} of Ingot's")

    def _stored(self, tensor: str) -> Any:
        """A tensor to be sliced, safetensors' `PySafeSlice`; `tensor` as the form calls it."""
        name = tensor.removeprefix(self._prefix)
        require(name in self._files, f"{tensor} is missing")
        try:
            return self._file(self._files[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / self._files[name]} cannot be read: {error}") from error

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error
        return self._open[name]


def open_hf(folder: Path) -> HuggingFaceReader:
    """Open a folder of one of the forms; raises InputError where anything is missing, too much or not supported."""
    require(folder.is_dir(), f"{folder} is not a folder; expected one with config.json and {SINGLE}")
    try:
        return HuggingFaceReader(folder)
    except (InputError, CheckpointError) as error:
        raise InputError(f"{folder} cannot be read as a Hugging Face model: {error}") from error


def write_hf(
    source: CheckpointReader,
    config: ModelConfig,
    folder: Path,
    *,
    end: int,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json and the weights into an empty folder; end: the end token's id.

    Raises InputError if no form has the model, or a weight is too large for `dtype`.
    """
    form = form_of(config)
    # GPT-2's form always has biases: they are zero where the model has none.
    table = weights(form, replace(config, bias=config.bias or form is GPT2))
    shapes = {tensor: shape for weight in table.values() for tensor, shape in weight.shapes().items()}
    theirs = _theirs(source, table, weights(form, config).keys(), DTYPES[dtype])
    _write_weights(folder, DTYPES[dtype], shapes, theirs, shard_bytes)
    _write_json(folder / "config.json", write_config(config, end=end, dtype=dtype))
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})


def write_plain(source: CheckpointReader, folder: Path, *, dtype: str = "float32") -> None:
    """Write model.safetensors with whole tensors under Ingot's names."""
    shapes = {name: source.shape(name) for name, kind in sorted(source.manifest.tensors) if kind == "master"}
    tensors = (_whole(source, name, DTYPES[dtype]).to(DTYPES[dtype]) for name in shapes)
    files.create_safetensors(folder / SINGLE, DTYPES[dtype], shapes, tensors)


def _theirs(
    source: CheckpointReader, table: Mapping[str, Weight], ours: Collection[str], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The folder's tensors in the order of `table`; nothing of a weight is held while the next is read."""
    for name, weight in table.items():
        yield from _laid_out(weight, _whole(source, name, dtype) if name in ours else torch.zeros(weight.shape), dtype)


def _whole(source: CheckpointReader, name: str, dtype: torch.dtype) -> Tensor:
    """A weight, fp32, whose values `dtype` can hold."""
    found = source.read(name)
    low, high = found.aminmax()
    largest, limit = float(torch.maximum(-low, high)), torch.finfo(dtype).max
    require(largest < inf, f"{name} has values that are not finite; choose an earlier checkpoint")
    require(largest <= limit, f"{name} has values up to {largest:g}; {dtype} ends at {limit:g}: choose another --dtype")
    return found


def _laid_out(weight: Weight, whole: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors that hold the parts of `whole` [weight.shape] in a folder."""
    for name, shape in weight.shapes().items():
        target = torch.empty(shape, dtype=dtype)
        rows = target.t() if weight.transposed and len(shape) == 2 else target
        for part in weight.parts:
            if part.tensor == name:
                ours = part.of(whole, weight.group)
                rows[part.start : part.start + len(ours) * part.rows].unflatten(0, ours.shape[:2]).copy_(ours)
        yield target


def _write_weights(
    folder: Path, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[Tensor], limit: int
) -> None:
    """Write the tensors into one file, or several and an index: a file ends before it would exceed `limit` bytes."""
    shards, size, total = [dict[str, tuple[int, ...]]()], 0, 0
    for name, shape in shapes.items():
        count = prod(shape) * dtype.itemsize
        if shards[-1] and size + count > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + count, total + count
    files_of: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        files.create_safetensors(folder / file, dtype, shard, tensors)
        files_of |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files_of})


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may be a link; raises CheckpointError."""
    try:
        return files.parse_json(path.read_bytes(), path.name)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    files.create_bytes(path, json.dumps(content, indent=2).encode())
