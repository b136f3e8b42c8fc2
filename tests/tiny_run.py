"""A tiny training run under any layout, on made-up data, for comparing layouts with the plain engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llm.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from llm.parallel.mesh import Mesh
from llm.parity.batches import micro_batches
from llm.train.build import build_engine, build_model
from llm.train.engines.base import Engine, MicroBatch
from llm.train.engines.plain import PlainEngine

G, T, V = 8, 16, 50  # V divides by neither 4 nor 3: the vocabulary is padded

BASE = RunConfig(
    model=ModelConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, vocab_size=V, max_seq_len=T, position="rope"),
    data=DataConfig(seq_len=T),
    optim=OptimConfig(lr=1e-3, min_lr=1e-3, warmup_steps=0, grad_clip=0.5),
    parallel=ParallelConfig(timeout_seconds=60),
    train=TrainConfig(global_batch_size=G, micro_batch_size=2, max_steps=10, impl="auto"),
    # Parameters this small would otherwise stay whole on every rank under ZeRO 3.
    deepspeed={},
)


def case(**sections: Any) -> RunConfig:
    """BASE with fields replaced by section: case(model=dict(bias=False), train=dict(precision="bf16"))."""
    changed = {name: replace(getattr(BASE, name), **fields) for name, fields in sections.items()}
    config = replace(BASE, **changed)
    if config.parallel.zero_stage == 3 and config.train.engine == "deepspeed":
        config = replace(config, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    return config


def plain(config: RunConfig, **train: Any) -> RunConfig:
    """The same run for the plain engine on one process."""
    return replace(
        config,
        train=replace(config.train, engine="plain", **train),
        parallel=ParallelConfig(),
        deepspeed={},
    )


def batches(config: RunConfig, step: int, dp_rank: int, dp_size: int, ragged: bool) -> list[MicroBatch]:
    """This rank's micro-batches of a step; ragged: ever fewer targets count towards the batch's end."""
    return micro_batches(config, step, torch.device("cpu"), dp_rank=dp_rank, dp_size=dp_size, ragged=ragged)


def target_count(ragged: bool) -> int:
    return sum(T - 2 * i for i in range(G)) if ragged else G * T


def trajectory(
    engine: Engine, config: RunConfig, dp_rank: int, dp_size: int, steps: int, ragged: bool
) -> dict[str, Any]:
    """Losses, norms, the first step's gradients and the validation loss after the last."""
    losses, norms, gradients = [], [], {}
    names = [name for name, _ in engine.parameters.items()]  # pyright: ignore[reportAttributeAccessIssue]
    for step in range(steps):
        engine.set_lr(config.optim.lr)
        data = batches(config, step, dp_rank, dp_size, ragged)
        losses.append(float(engine.forward_backward(data, target_count(ragged))))
        if step == 0:
            gradients = {name: engine.gradient(name).clone().numpy() for name in names}
        norms.append(float(engine.step().grad_norm))
    total, count = engine.evaluate(batches(config, 99, dp_rank, dp_size, ragged))
    return {"losses": losses, "norms": norms, "gradients": gradients, "validation": total / count}


def on_ranks(config: RunConfig, steps: int, ragged: bool = False) -> dict[str, Any]:
    """Run on this rank of a pool. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, torch.device("cpu"))
    result = trajectory(engine, config, mesh.dp_rank, mesh.dp_size, steps, ragged)
    engine.close()
    return result


def oracle(config: RunConfig, steps: int, ragged: bool = False) -> dict[str, Any]:
    """The same run by the plain engine in this process, whole batch at once."""
    config = plain(config, micro_batch_size=G, activation_checkpointing="none")
    engine = PlainEngine(config, build_model(config, None), None, torch.device("cpu"))
    return trajectory(engine, config, 0, 1, steps, ragged)
