"""Opens a trained run: its newest checkpoint, whichever layout wrote it, and its tokenizer."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm.checkpoint.convert import HuggingFaceReader, open_hf
from llm.checkpoint.merged import without_lora
from llm.checkpoint.reader import CheckpointReader, find_named, open_checkpoint, own_tokenizer
from llm.config import DataConfig, ParallelConfig, RunConfig
from llm.config.parse import from_dict
from llm.data.chat import Chat
from llm.data.tokenizer import Tokenizer
from llm.errors import CheckpointError, InputError, require
from llm.model.build import Model, model_of
from llm.model.decode import store_by_columns
from llm.model.gpt import GPT
from llm.model.init import give_memory
from llm.parallel.mesh import Mesh
from llm.parallel.parallelize import choose_layers
from llm.slices import slice_of


@dataclass(frozen=True)
class Trained:
    """A model with its weights from a checkpoint, and the tokenizer it was trained with, in its chat template."""

    model: Model
    chat: Chat
    config: RunConfig
    step: int
    labels: tuple[str, ...] = ()
    """Of a classifier: what each row of its head stands for."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.chat.tokenizer


def open_trained(path: Path, *, classifier: bool = False) -> tuple[CheckpointReader, RunConfig, Chat]:
    """The checkpoint that `path` names, every byte of it verified, with its config, tokenizer and chat template.

    Raises InputError if there is no such checkpoint, or it is of a language model where a `classifier` is
    expected, or the other way round.

    One of a run with LoRA reads as the model without it, its products added to the weights.
    """
    checkpoint, warnings = find_named(path.resolve() if path.is_symlink() else path)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        reader = open_checkpoint(checkpoint)
    except CheckpointError as error:
        raise InputError(f"{checkpoint} is not a whole checkpoint: {error}") from error
    tokenizer = own_tokenizer(reader)
    if tokenizer is None:
        raise InputError(f"no tokenizer.json in {checkpoint} or the two folders above; copy that of its run there")
    found = from_dict(reader.state["config"]).finetune.task == "classify"
    kinds = "a classifier; expected a language model" if found else "a language model; expected a classifier"
    require(found == classifier, f"{checkpoint} is {kinds}")
    reader, config = without_lora(reader, from_dict(reader.state["config"]))
    return reader, config, Chat.load(tokenizer.parent, Tokenizer.load(tokenizer, config.data.end_token))


def open_hf_folder(folder: Path) -> tuple[HuggingFaceReader, RunConfig, Chat]:
    """The weights of a Hugging Face folder with a config, tokenizer and chat template; else InputError."""
    source = open_hf(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json", source.end)
    found, expected = tokenizer.vocab_size, source.config.vocab_size
    require(found <= expected, f"{folder}: the tokenizer has {found} tokens and the model {expected}")
    own = str(folder / "tokenizer.json")
    data = DataConfig(tokenizer=own, end_token=source.end, seq_len=source.config.max_seq_len)
    return source, RunConfig(model=source.config, data=data), Chat.load(folder, tokenizer)


def load_trained(
    path: Path | str, device: torch.device | str = "cpu", mesh: Mesh | None = None, *, classifier: bool = False
) -> Trained:
    """Read a model written under any layout: fp32, for evaluation; with a mesh, this tensor-parallel rank's part of it.

    path: runs/<name>, the folder of a checkpoint with its tokenizer.json in it or up to two folders above, or a
    Hugging Face folder. Raises InputError as `open_trained`, or if the mesh has more ranks than the model's heads can
    be cut for. classifier: one is expected, else a language model. The weights of linears on a CPU lie in memory by
    columns (llm/model/decode.py).
    """
    path = Path(path)
    theirs = (path / "config.json").is_file()
    require(not (theirs and classifier), f"{path} is a language model; expected a classifier")
    reader, config, chat = open_hf_folder(path) if theirs else open_trained(path, classifier=classifier)
    state: dict[str, Any] = {"step": 0} if isinstance(reader, HuggingFaceReader) else reader.state
    labels = tuple(state["data"].get("labels", ())) if classifier else ()
    require(bool(labels) == classifier, f"{path}: its state.json is damaged, it names no labels; choose another")
    # The layout and kernels of the training run do not matter here.
    parallel = ParallelConfig(tensor_parallel=mesh.tp_size if mesh is not None else 1)
    train = replace(config.train, engine="deepspeed", precision="fp32", fp8="none", impl="auto")
    config = replace(config, parallel=parallel, train=train)
    with torch.device("meta"):
        model = model_of(config.model, choose_layers(config, mesh), labels=len(labels) or None)
        if isinstance(model, GPT) and mesh is None and torch.device(device).type == "cpu":
            store_by_columns(model)
    for name, parameter in model.named_parameters():
        give_memory(parameter, device)
        part = slice_of(parameter)
        with torch.no_grad():
            held = parameter.narrow(part.dim, 0, part.stop - part.start)  # the rest is padding, of zeros
            held.copy_(reader.read_slice(name, "master", part))
    return Trained(model.eval(), chat, config, state["step"], labels)
