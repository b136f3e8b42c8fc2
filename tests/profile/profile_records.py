"""Made-up profiles: of a step in which nothing is wrong, and of the same with something changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llm.profile.record import Collective, Host, Loader, Machine, Memory, Op, Owner, Part, Record, Sync, Tokens

MODEL = {"embedding": 2.0, "qkv": 10.0, "attention": 6.0, "norm": 4.0, "feed_forward": 30.0, "head_loss": 12.0}
STEP = {"gradients": 1.0, "clip": 0.5, "optimizer": 4.0}
LAYOUT = {"tp": 1, "dp": 2, "engine": "deepspeed", "zero_stage": 1, "micro_batch": 8, "grad_accum": 1, "seq_len": 64}
LAYOUT |= {"recompute": "none", "precision": "fp32", "impl": "auto"}


def record(rank: int = 0, world: int = 2, **changed: Any) -> Record:
    """A step of 75 ms on a machine of 1 TFLOP/s and 10 GB/s, of which the model's parts reach 80 %."""
    parts = [Part(name, ms / 3, ms * 2 / 3, 0, 0, ms * 0.8e9, ms * 1e6) for name, ms in MODEL.items()]
    parts += [Part(name, ms, 0, 0, 0, 0, ms * 8e6) for name, ms in STEP.items()]
    whole = Record(
        rank=rank, world=world, host=f"node{rank}", device="cpu", layout=dict(LAYOUT), steps=(5, 9),
        tokens_per_step=Tokens(512, 512 * world), step_ms=75.0, unprofiled_step_ms=73.0,
        busy_ms=(73.8,) * 5, machine=Machine(1.0, 10.0), parts=tuple(parts),
        unattributed_ms=0.5, collectives=(Collective("all_reduce", 2, 3, 5.0, 1.0, 4e6),),
        host_time=Host(900, 4.0, 3.0), syncs=(Sync("llm/train/engines/shared.py:60", 1, 0.1),),
        ops=(Op("aten::addmm", "feed_forward", 32, 20.0), Op("aten::native_layer_norm", "norm", 9, 2.0),
             Op("aten::add_", "qkv", 100, 0.3)),
        loader=Loader(0.2),
        memory=Memory(9_000_000, {"weights": 2_000_000, "activations": 6_800_000}, 200_000,
                      (Owner("feed_forward", 4_000_000),), ((0.0, 2_000_000), (40.0, 9_000_000), (75.0, 2_000_000))),
    )  # fmt: skip
    return replace(whole, **changed)


def longer(part: str, ms: float, found: Record, field: str = "forward_ms") -> Record:
    """The record with a part, and so its step, that takes so much longer."""
    parts = tuple(
        replace(each, **{field: getattr(each, field) + ms}) if each.name == part else each for each in found.parts
    )
    busy = tuple(each + ms for each in found.busy_ms)
    return replace(
        found, parts=parts, step_ms=found.step_ms + ms, unprofiled_step_ms=found.unprofiled_step_ms + ms, busy_ms=busy
    )


def waiting(ms: float, found: Record) -> Record:
    """The record of a rank that waits so much longer for the others."""
    first = found.collectives[0]
    waited = replace(first, ms=first.ms + ms, exposed_ms=first.exposed_ms + ms)
    return replace(
        found, collectives=(waited,), step_ms=found.step_ms + ms, unprofiled_step_ms=found.unprofiled_step_ms + ms
    )
