"""Attention's Gluon form on a CPU: what it launches runs in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction

import emulator
from kernels.attention.gluon.launch import launch_of
from kernels.plan import Plan


@contextmanager
def emulated(seed: int = 0) -> Iterator[None]:
    """Calls on a CPU pass as calls on a Hopper GPU. Gluon kernels run under the schedule of `seed`, without a finding.

    Triton's own kernels run in its interpreter. What no kernel stores is NaN.
    """
    interpreted = Plan.compile

    def compile(plan: Plan, aligned: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        if isinstance(plan.kernel, GluonJITFunction):
            report = emulator.run(launch_of(plan, *tensors), seed)
            assert not report.findings, report
        else:
            interpreted(plan, aligned, tensors, numbers)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kernels.attention.op.why_not_gluon", lambda *_: None)
        patched.setattr(Plan, "compile", compile)
        torch.use_deterministic_algorithms(True)  # so that torch.empty gives NaN
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
