"""Any checkpoint to a Hugging Face folder and back, one tensor at a time; forms.py says what such folders hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm import files
from llm.checkpoint.forms import GPT2, form_of, read_config, weights, write_config
from llm.checkpoint.manifest import NAME, Piece
from llm.checkpoint.reader import CheckpointReader, TensorFiles
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
        self._open = TensorFiles(folder)
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
        start, stop = (part.start, part.stop) if part.dim == 0 else (0, weight.shape[0])
        columns = slice(None) if part.dim == 0 else slice(part.start, part.stop)
        target = torch.empty(part.shape)
        for tensor, runs in weight.runs().items():
            stored, before = self._stored(tensor), 0
            for run in runs:
                first, last = torch.searchsorted(run, torch.tensor([start, stop])).tolist()
                keys = (slice(before + first, before + last), columns)[: len(weight.shape)]
                found = stored[keys[::-1]].t() if weight.transposed else stored[keys]
                target[run[first:last] - start] = found.float()
                before += len(run)
        if not target.isfinite().all():
            raise CheckpointError(f"{name} has values that are not finite in {self.folder}")
        return target

    def pieces(self) -> Iterator[Piece]:
        """All of the weights, as a checkpoint is written of them."""
        for name, weight in self._weights.items():
            rows, row = weight.shape[0], prod(weight.shape[1:])
            step = max(1, BLOCK // row)
            for start in range(0, rows, step):
                part = Slice(weight.shape, 0, start, min(start + step, rows))
                data = self.read_slice(name, "master", part).flatten()
                yield Piece(name, "master", Slice.full(weight.shape), start * row, data)

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
        return dict.fromkeys(self._open.file(SINGLE).keys(), SINGLE)

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
            same = torch.equal(self._stored(head)[:], table[:])
            require(same, f"{head} differs from the embedding that it is tied to")
            extra = []
        require(not extra, f"{', '.join(extra[:3])}: no such weights in a {self.form.model_type} of Ingot's")

    def _stored(self, tensor: str) -> Any:
        """A tensor to be sliced; `tensor` as the form calls it."""
        name = tensor.removeprefix(self._prefix)
        require(name in self._files, f"{tensor} is missing")
        return self._open.tensor(self._files[name], name)


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
    form, kind = form_of(config), DTYPES[dtype]
    ours = weights(form, config)
    # GPT-2's form always has biases: they are zero where the model has none.
    table = weights(form, replace(config, bias=True)) if form is GPT2 else ours
    shapes = {tensor: shape for weight in table.values() for tensor, shape in weight.shapes().items()}

    def theirs() -> Iterator[Tensor]:
        for name, weight in table.items():
            whole = _whole(source, name, kind) if name in ours else torch.zeros(weight.shape, dtype=kind)
            for runs in weight.runs().values():
                rows = torch.cat(runs)
                yield whole.t().index_select(-1, rows) if weight.transposed else whole.index_select(0, rows)
            del whole  # before the next is read

    sizes = {name: prod(shape) * kind.itemsize for name, shape in shapes.items()}
    shards, tensors, files_of = list(files.by_size(sizes, sizes.__getitem__, shard_bytes)), theirs(), {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        files.create_safetensors(folder / file, kind, {name: shapes[name] for name in shard}, tensors)
        files_of |= dict.fromkeys(shard, file)
    contents = {"config.json": write_config(config, end=end, dtype=dtype)}
    contents["generation_config.json"] = {"eos_token_id": end, "pad_token_id": end}
    if len(shards) > 1:
        contents[INDEX] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files_of}
    for file, content in contents.items():
        files.create_bytes(folder / file, json.dumps(content, indent=2).encode())


def write_plain(source: CheckpointReader, folder: Path, *, dtype: str = "float32") -> None:
    """Write model.safetensors with whole tensors under Ingot's names."""
    shapes = {name: source.shape(name) for name, kind in sorted(source.manifest.tensors) if kind == "master"}
    tensors = (_whole(source, name, DTYPES[dtype]) for name in shapes)
    files.create_safetensors(folder / SINGLE, DTYPES[dtype], shapes, tensors)


def _whole(source: CheckpointReader, name: str, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`, which can hold its values."""
    found = source.read(name)
    low, high = found.aminmax()
    largest, limit = float(torch.maximum(-low, high)), torch.finfo(dtype).max
    require(largest < inf, f"{name} has values that are not finite; choose an earlier checkpoint")
    require(largest <= limit, f"{name} has values up to {largest:g}; {dtype} ends at {limit:g}: choose another --dtype")
    return found.to(dtype)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may be a link; raises CheckpointError, ReadError."""
    return files.read_json(path.resolve())
