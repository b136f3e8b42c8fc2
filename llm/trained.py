"""Opens a trained run: its newest checkpoint, whichever layout wrote it, and its tokenizer."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llm.checkpoint.merged import without_lora
from llm.checkpoint.reader import CheckpointReader, find_named, open_checkpoint, tokenizer_of
from llm.config import ParallelConfig, RunConfig
from llm.config.parse import from_dict
from llm.data.tokenizer import Tokenizer
from llm.errors import CheckpointError, InputError, require
from llm.model.build import Model, model_of
from llm.model.init import fill, give_memory
from llm.parallel.mesh import Mesh
from llm.parallel.parallelize import choose_layers


@dataclass(frozen=True)
class Trained:
    """A model with its weights from a checkpoint, and the tokenizer it was trained with."""

    model: Model
    tokenizer: Tokenizer
    config: RunConfig
    step: int


def open_trained(path: Path) -> tuple[CheckpointReader, RunConfig, Tokenizer]:
    """The checkpoint that `path` names, every byte of it verified, with its config and tokenizer; else InputError.

    One of a run with LoRA reads as the model without it, its products added to the weights.
    """
    checkpoint, warnings = find_named(path.resolve() if path.is_symlink() else path)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise InputError(f"no tokenizer.json in {checkpoint} or the two folders above; copy that of its run there")
    try:
        reader = open_checkpoint(checkpoint)
    except CheckpointError as error:
        raise InputError(f"{checkpoint} is not a whole checkpoint: {error}") from error
    task = from_dict(reader.state["config"]).finetune.task
    require(task != "classify", f"{checkpoint} is a classifier; expected a language model")
    reader, config = without_lora(reader, from_dict(reader.state["config"]))
    return reader, config, Tokenizer.load(tokenizer, config.data.end_token)


def load_trained(path: Path | str, device: torch.device | str = "cpu", mesh: Mesh | None = None) -> Trained:
    """Read a model written under any layout: fp32, for evaluation; with a mesh, this tensor-parallel rank's part of it.

    path: runs/<name>, or the folder of a checkpoint with its tokenizer.json in it or up to two folders above.
    Raises InputError if there is no such checkpoint, or the mesh has more ranks than the model's heads can be cut for.
    """
    reader, config, tokenizer = open_trained(Path(path))
    # The layout and kernels of the training run do not matter here.
    parallel = ParallelConfig(tensor_parallel=mesh.tp_size if mesh is not None else 1)
    train = replace(config.train, engine="deepspeed", precision="fp32", impl="auto")
    config = replace(config, parallel=parallel, train=train)
    with torch.device("meta"):
        model = model_of(config.model, choose_layers(config, mesh))
    for name, parameter in model.named_parameters():
        give_memory(parameter, device)
        fill(parameter, reader.read(name, "master"))
    return Trained(model.eval(), tokenizer, config, reader.state["step"])
