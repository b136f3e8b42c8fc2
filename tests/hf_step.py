"""A training step from the weights of Hugging Face folders on four ranks, which need not import `transformers`."""

from __future__ import annotations

from pathlib import Path

import torch
from states import state_of

from llm.checkpoint.convert import open_hf
from llm.checkpoint.writer import write_checkpoint
from llm.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from llm.config.parse import to_dict
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from llm.train.engines.base import MicroBatch

T, V, G = 64, 301, 8
LR, EPS = 1e-2, 1e-3  # Adam's first update is lr g / (|g| + eps): smooth, so that rounding stays rounding


def tokens(rows: int) -> torch.Tensor:
    """int64 [rows, T]"""
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(3))


def config_of(model: ModelConfig) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(seq_len=T - 1),
        optim=OptimConfig(lr=LR, min_lr=LR, eps=EPS, weight_decay=0.0, grad_clip=0.0),
        parallel=ParallelConfig(tensor_parallel=2, zero_stage=2, timeout_seconds=60),
        train=TrainConfig(global_batch_size=G, micro_batch_size=2),
    )


def step_on_ranks(folders: dict[str, Path], runs: Path) -> None:
    """On this rank of four: a step of each folder's weights under TP 2 x ZeRO 2, then a checkpoint. Collective."""
    for form, folder in folders.items():
        reader = open_hf(folder)
        config = config_of(reader.config)
        mesh = Mesh.create(config.parallel, "cpu")
        engine = build_engine(config, mesh, torch.device("cpu"), reader)
        ids, positions, share = tokens(G), torch.arange(T - 1), G // mesh.dp_size
        rows = torch.arange(G).split(2)[mesh.dp_rank * share // 2 : (mesh.dp_rank + 1) * share // 2]
        batches = [MicroBatch(ids[cut, :-1], positions, cut, ids[cut, 1:]) for cut in rows]
        engine.set_lr(LR)
        engine.forward_backward(batches, G * (T - 1))
        engine.step()
        state = state_of(1, config=to_dict(config))
        write_checkpoint(runs / form / "checkpoints", 1, engine.state_pieces(), state, keep_last=1)
        engine.close()
