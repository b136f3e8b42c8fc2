"""Runs a layout beside its oracle: the check behind launch/verify.py."""

from __future__ import annotations

import torch

from llm.config import RunConfig
from llm.parallel.agreement import broadcast
from llm.parallel.mesh import Mesh
from llm.parity.layout import Layout
from llm.parity.oracle import Oracle
from llm.parity.report import Report

# fp16 finds its loss scale by steps that overflow and are skipped: so many more are made than were asked for.
SKIPPED_STEPS = 16


def check_parity(config: RunConfig, mesh: Mesh, device: torch.device, steps: int) -> Report:
    """Make `steps` updates under the layout of `config` and compare each with the plain engine's.

    The oracle is on rank 0, dense and in one process, with the same micro-batches. It makes each step from the layout's
    weights and moments, and each update from the layout's gradients, so that no difference grows into another. The
    report is whole on rank 0; whether it passed is known to all. Collective.
    """
    layout = Layout(config, mesh, device)
    oracle = Oracle(config, device) if mesh.rank == 0 else None
    if oracle is not None:
        oracle.check_start(layout.state)
    number = 0
    while layout.updates < steps and number < steps + SKIPPED_STEPS:
        number += 1
        record = layout.step(number)
        if oracle is not None:
            oracle.check_step(record)
    if layout.updates < steps:
        layout.note([f"{number - layout.updates} of {number} steps overflowed and were skipped"])
    validation = layout.validation_loss(number + 1)
    if oracle is not None:
        oracle.check_validation(number + 1, layout.state, validation)
    layout.engine.close()
    checks = oracle.verdicts() if oracle is not None else []
    passed = broadcast(str(not layout.problems and all(check.passed for check in checks))) == "True"
    return Report(config, mesh.world_size, steps, tuple(checks), tuple(layout.problems), passed)
