"""The emulator finds each kind of fault in small kernels, and none where there is none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import emulator
from emulator.language import language
from emulator.load import Loader
from emulator.machine import Machine
from emulator.schedule import Random
from emulator.trace import Costs

ROWS, WIDTH, STAGES = 64, 64, 2


def descriptor(x: torch.Tensor) -> TensorDescriptor:
    block = [ROWS, WIDTH]
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def ring(T: int = 700) -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    """A launch of toys.ring, its result, and the right result in float64."""
    x = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.full((ROWS, WIDTH), math.nan, dtype=torch.bfloat16)
    tiles = torch.nn.functional.pad(x.double(), (0, 0, 0, -T % ROWS)).view(-1, ROWS, WIDTH)
    right = (torch.exp2(tiles @ tiles.mT * 0.125) @ tiles).sum(0)
    arguments = dict(x_desc=descriptor(x), y_desc=descriptor(y), T=T, ROWS=ROWS, WIDTH=WIDTH, STAGES=STAGES)
    return SimpleNamespace(kernel=toys.ring, grid=(1,), arguments=arguments, num_warps=4), y, right


@pytest.mark.parametrize("seed", range(20))
def test_a_right_kernel_is_clean_and_its_numbers_are_right(seed: int):
    launch, y, right = ring()
    report = emulator.run(launch, seed)
    assert not report.findings, str(report)
    assert (y.double() - right).abs().max() < 0.01 * right.abs().max()


def parameters(function: Callable) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if not p.name.startswith("_")]


def test_the_emulators_functions_take_no_more_than_gluons():
    """Each parameter is one of the real function's, in its place; what is positional only may have another name."""
    machine = Machine((1,), Random(0), {}, Costs())
    fake = language(machine)
    pairs = [(fake, gl), (fake.nvidia.hopper, hopper)]
    pairs += [(fake.nvidia.hopper.tma, hopper.tma), (fake.nvidia.hopper.mbarrier, hopper.mbarrier)]
    checked = 0
    for ours, theirs in pairs:
        for name, function in vars(ours).items():
            if not inspect.isfunction(function) or name in ("constexpr", "MBarrierLayout"):
                continue
            real = getattr(theirs, name)
            wanted = parameters(getattr(real, "fn", inspect.unwrap(real)))
            places = {each[0]: i for i, each in enumerate(wanted)}
            for i, (parameter, kind, _) in enumerate(parameters(function)):
                if kind == inspect.Parameter.POSITIONAL_ONLY or kind == inspect.Parameter.VAR_POSITIONAL:
                    assert len(wanted) > i, f"{name} {parameter}"
                elif kind == inspect.Parameter.KEYWORD_ONLY:
                    assert parameter in places, f"{name} has no {parameter}"
                else:
                    assert places.get(parameter) == i, f"{name}: {parameter} is not in place {i} of {wanted}"
            checked += 1
    assert checked > 50
    assert Loader(machine, {}).fakes
