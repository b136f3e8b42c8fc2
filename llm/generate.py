"""Text from a trained model, with a key/value cache, on one process or over tensor-parallel ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llm.checkpoint.reader import CheckpointReader, find_latest, open_checkpoint, verify
from llm.config import ModelConfig, ParallelConfig, RunConfig
from llm.config.parse import from_dict
from llm.data.tokenizer import Tokenizer
from llm.errors import CheckpointError, InputError, require
from llm.model.gpt import GPT, KVCache
from llm.model.init import fill
from llm.parallel.mesh import Mesh
from llm.parallel.parallelize import choose_layers
from llm.sampling import SamplingConfig, sample


@dataclass(frozen=True)
class Trained:
    """A model with its weights from a checkpoint, and the tokenizer it was trained with."""

    model: GPT
    tokenizer: Tokenizer
    config: RunConfig
    step: int


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint folder and the run folder that `path` names: a run (its newest checkpoint) or one checkpoint."""
    require(
        path.is_dir(),
        f"{path} is not a folder; expected runs/<name> or runs/<name>/checkpoints/step-...",
    )
    if not (path / "checkpoints").is_dir():
        return path, path.parent.parent
    latest, warnings = find_latest(path / "checkpoints")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    require(
        latest is not None,
        f"{path} holds no complete checkpoint; train first, or choose another run",
    )
    assert latest is not None
    return latest, path


def load_trained(path: Path, device: torch.device, mesh: Mesh | None = None) -> Trained:
    """Read a model written under any layout; with a mesh, this tensor-parallel rank's part of it.

    Raises InputError if there is no such checkpoint, or the mesh has more ranks than the model's heads can be cut for.
    """
    checkpoint, run = find_checkpoint(path)
    try:
        verify(checkpoint)
        reader = open_checkpoint(checkpoint)
    except CheckpointError as error:
        raise InputError(f"{checkpoint} is not a whole checkpoint: {error}") from error
    config = from_dict(reader.state["config"])
    # The layout and kernels of the training run do not matter here.
    parallel = ParallelConfig(tensor_parallel=mesh.tp_size if mesh is not None else 1)
    train = replace(config.train, engine="deepspeed", precision="fp32", impl="auto")
    config = replace(config, parallel=parallel, train=train)
    model = GPT(config.model, choose_layers(config, mesh))
    load_weights(model, reader)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    return Trained(model.to(device).eval(), tokenizer, config, reader.state["step"])


def load_weights(model: GPT, reader: CheckpointReader) -> None:
    """Fill every parameter of `model` with its slice of the checkpoint's master weights."""
    for name, parameter in model.named_parameters():
        fill(parameter, reader.read(name, "master"))


def check_prompts(prompts: Sequence[Sequence[int]], model: ModelConfig) -> None:
    """Raise InputError for a prompt that the model cannot continue."""
    for prompt in prompts:
        require(len(prompt) > 0, "a prompt is empty; give at least one character to continue")
        require(
            len(prompt) < model.max_seq_len,
            f"a prompt has {len(prompt)} tokens; the model's longest sequence is {model.max_seq_len} "
            "(model.max_seq_len), and at least one must be free",
        )


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end: int,
    sampling: SamplingConfig,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue each prompt; yields one list per step: each row's new token, or None where it has none.

    prompts: token ids, of any lengths. All rows advance together from the shortest prompt's end; a row that is still
    inside its prompt takes its own next token, so that no padding enters the attention. A row ends at token `end`,
    after `max_new_tokens`, or at the model's longest sequence.
    """
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; expected at least 1")
    check_prompts(prompts, model.config)
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    limits = [min(n + max_new_tokens, model.config.max_seq_len) for n in lengths]
    rows = torch.zeros(len(prompts), max(limits), dtype=torch.long, device=device)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = KVCache(max(limits)) if use_cache else None
    open_rows = [True] * len(prompts)
    start = 0
    for position in range(min(lengths), max(limits)):
        logits = next_logits(model, rows[:, start:position], start, cache)
        start = position if use_cache else 0
        drawn = sample(logits, sampling, history=rows[:, :position], generator=generator).tolist()
        new: list[int | None] = [None] * len(prompts)
        for i, token in enumerate(drawn):
            if lengths[i] <= position < limits[i] and open_rows[i]:
                open_rows[i] = token != end
                rows[i, position] = token
                new[i] = token if open_rows[i] else None
        yield new
        if not any(is_open and position + 1 < limit for is_open, limit in zip(open_rows, limits, strict=True)):
            return


def next_logits(model: GPT, tokens: Tensor, start: int, cache: KVCache | None) -> Tensor:
    """fp32 [B, V] after `tokens` int64 [B, T], the first of which stands at position `start`."""
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    samples = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    x = model.embed(tokens, positions, samples)
    for block in model.blocks.values():
        x = block(x, positions, samples, cache=cache)
    return model.head.logits(model.norm(x[:, -1]))


def stream(trained: Trained, prompts: Sequence[str], max_new_tokens: int, sampling: SamplingConfig) -> Iterator[str]:
    """The prompts and what follows them, as text: one prompt piece by piece, several one after the other at the end."""
    tokenizer = trained.tokenizer
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    steps = generate(trained.model, ids, max_new_tokens=max_new_tokens, end=tokenizer.eod_id, sampling=sampling)
    if len(prompts) == 1:
        pieces = tokenizer.stream()
        yield prompts[0]
        for row in steps:
            if row[0] is not None:
                yield pieces.push(row[0])
        yield pieces.finish() + "\n"
        return
    for row in steps:
        for tokens, new in zip(ids, row, strict=True):
            if new is not None:
                tokens.append(new)
    for number, tokens in enumerate(ids, 1):
        yield f"--- {number} of {len(ids)}\n{tokenizer.decode(tokens)}\n"
