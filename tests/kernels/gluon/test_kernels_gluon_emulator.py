"""The emulator finds each kind of fault in small kernels, and none where there is none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

import emulator
import toys
from emulator.language import language
from emulator.machine import Machine
from emulator.schedule import Random
from emulator.trace import Costs
from emulator.values import rounded

ROWS, WIDTH, STAGES = 64, 64, 2
SOURCE = inspect.getsource(toys)


def launch(kernel: Any, grid: int, **arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(kernel=kernel, grid=(grid,), arguments=arguments, num_warps=4)


def descriptor(x: torch.Tensor) -> TensorDescriptor:
    block = [ROWS, WIDTH]
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def ring(T: int = 700) -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    """A launch of toys.ring, its result, and the right result in float64."""
    x = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.full((ROWS, WIDTH), math.nan, dtype=torch.bfloat16)
    tiles = torch.nn.functional.pad(x.double(), (0, 0, 0, -T % ROWS)).view(-1, ROWS, WIDTH)
    right = (torch.exp2(tiles @ tiles.mT * 0.125) @ tiles).sum(0)
    sizes = dict(T=T, ROWS=ROWS, WIDTH=WIDTH, STAGES=STAGES)
    return launch(toys.ring, 1, x_desc=descriptor(x), y_desc=descriptor(y), **sizes), y, right


def division() -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    """A launch of toys.divide of positive and negative numbers, its results, and the right ones."""
    x = torch.arange(-500, 500, 3, dtype=torch.int32) * 1000
    found = torch.full((2, len(x)), 77, dtype=torch.int32)
    right = torch.stack([torch.div(x, 7, rounding_mode="trunc"), torch.fmod(x, 7)])
    return launch(toys.divide, 3, x_ptr=x, q_ptr=found[0], r_ptr=found[1], T=len(x), by=7, SIZE=128), found, right


def handover() -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    x = torch.full((16, 16), math.nan)
    return launch(toys.handover, 1, x_ptr=x, value=2.5), x, torch.full((16, 16), 2.5)


def shift() -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    x = torch.arange(200).float()
    right = torch.where(torch.arange(200) % 64 == 0, x, x - 1)
    return launch(toys.shift, 4, x_ptr=x, T=200, SIZE=64), x, right


TOYS = {function.__name__: function for function in (ring, division, handover, shift)}


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("toy", TOYS)
def test_a_right_kernel_is_clean_and_its_numbers_are_right(toy: str, seed: int):
    wanted, found, right = TOYS[toy]()
    report = emulator.run(wanted, seed)
    assert not report.findings, str(report)
    assert (found.double() - right).abs().max() <= 0.01 * right.abs().max() * (toy == "ring")


RING = [
    ("race", "        mbarrier.wait(full.index(s), (i // STAGES) & 1)\n", ""),
    ("race", "        mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)\n", ""),
    ("error", "        y, p = warpgroup_mma_wait(0, deps=(y, p))\n", ""),
    ("deadlock", "empty.index(i), count=1", "empty.index(i), count=2"),
    ("deadlock", "        mbarrier.arrive(empty.index(s))\n", ""),
    ("deadlock", "full.index(i), count=1", "full.index(i), count=2"),
    ("deadlock", "x_desc.block_type.nbytes", "2 * x_desc.block_type.nbytes"),
    ("bytes", "x_desc.block_type.nbytes", "x_desc.block_type.nbytes // 2"),
    ("arrivals", "        mbarrier.arrive(empty.index(s))\n", "        mbarrier.arrive(empty.index(s), count=2)\n"),
    ("parity", "((i // STAGES) & 1) ^ 1", "(i // STAGES) + 1"),
    ("lapped", "        mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)\n", ""),
    ("barrier", "        mbarrier.init(empty.index(i), count=1)\n", ""),
    ("barrier", "empty.index(i), count=1)", "empty.index(i), count=1)\n        mbarrier.init(empty.index(i), count=1)"),
    ("early", "y, p = warpgroup_mma_wait(0", "y, p = warpgroup_mma_wait(1"),
    ("lifetime", "y, p = warpgroup_mma_wait(0, deps=(y, p))", "y = warpgroup_mma_wait(0, deps=(y,))"),
    ("accumulator", "        y, p = ", "        z = warpgroup_mma(p, x, y, is_async=True)\n        y, p = "),
    ("fence", "    fence_async_shared()\n", ""),
    ("unfinished", "    tma.store_wait(0)\n", ""),
    ("unfinished", "    y_s.store(", "    z = warpgroup_mma(y_s, y_s, y, is_async=True)\n    y_s.store("),
    ("uninitialised", "    y_s.store(y.to(gl.bfloat16))\n", ""),
    ("bounds", "x_s.index(s))", "x_s.index(s + 1))"),
    ("alignment", "[i * ROWS, 0]", "[i * ROWS, 4]"),
    ("error", "scores = warpgroup_mma_wait(0, deps=(scores,))", "pass"),
    ("error", "deps=(scores,))", "deps=None)"),
    ("error", "mbarrier.arrive(empty.index(s))", "mbarrier.arrive(empty.index(s), 1)"),
    ("error", "is_async=True", "asynchronous=True"),
    ("error", "full, empty, n, ROWS, STAGES)),", "full, empty, ROWS, n, STAGES)),"),
    ("error", "[1],\n        [24],", "[1],"),
    ("error", "y.to(gl.bfloat16)", "y"),
    ("error", "[0, 0], y_s)", "[0, 0, 0], y_s)"),
    ("never stored", "[0, 0], y_s)", "[8, 0], y_s)"),
]  # fmt: skip
LATE = "    mbarrier.init(ready.index(0), count=1)\n    mbarrier.wait(ready.index(0), 0)\n"
AFTER = "    mbarrier.invalidate(ready.index(1))\n    mbarrier.arrive(ready.index(1))\n"
OTHERS = [
    (division, "overflow", "x // by", "x * 100000"),
    (division, "overflow", "gl.program_id(0) * SIZE + gl", "gl.program_id(0) * SIZE * 2000000000 + gl"),
    (division, "overflow", "x // by", "(gl.cast(x, gl.int64) * 100000).to(gl.int32)"),
    (division, "division", "x // by", "x // (by - 7)"),
    (division, "double store", "gl.program_id(0) * SIZE + gl", "gl.program_id(0) * (SIZE // 2) + gl"),
    (division, "bounds", "q_ptr + at, x // by, mask=at < T", "q_ptr + at, x // by"),
    (division, "bounds", "x_ptr + at, mask=at < T", "x_ptr + at - 1, mask=at < T"),
    (division, "error", "gl.arange(0, SIZE,", "gl.arange(0, SIZE - 1,"),
    (division, "error", "x // by", "x / by // by"),
    (division, "error", "x // by", "x[:, None] // x"),
    (shift, "race", "gl.load(x_ptr + at, mask=at < T", "gl.load(x_ptr + at - 1, mask=(0 < at) & (at < T)"),
    (handover, "race", "    mbarrier.wait(ready.index(0), 0)\n", ""),
    (handover, "race", "mbarrier.wait(ready.index(0), 0)", "mbarrier.wait(ready.index(0), 1)"),
    (handover, "deadlock", "    mbarrier.arrive(ready.index(0))\n", ""),
    (handover, "barrier", "    mbarrier.init(ready.index(0), count=1)\n", ""),
    (handover, "barrier", "    mbarrier.wait(ready.index(0), 0)\n", LATE),
    (handover, "barrier", "    mbarrier.invalidate(ready.index(1))\n", AFTER),
]  # fmt: skip


def kinds(toy: Callable, old: str, new: str) -> list[set[str]]:
    """What is found in a toy with a fault, under three seeds."""
    assert old in SOURCE
    return [emulator.run(toy()[0], seed, {"toys": SOURCE.replace(old, new)}).kinds for seed in range(3)]


@pytest.mark.parametrize(("kind", "old", "new"), RING)
def test_a_fault_in_the_ring_is_found_under_its_name(kind: str, old: str, new: str):
    found = kinds(ring, old, new)
    assert any(kind in each for each in found) and all(found), found


@pytest.mark.parametrize(("toy", "kind", "old", "new"), OTHERS)
def test_a_fault_is_found_under_its_name(toy: Callable, kind: str, old: str, new: str):
    found = kinds(toy, old, new)
    assert any(kind in each for each in found) and all(found), found


def test_a_deadlock_names_who_waits_for_what():
    source = SOURCE.replace("        mbarrier.arrive(empty.index(s))\n", "")
    found = emulator.run(ring()[0], 0, {"toys": source}).findings
    text = "".join(finding.text for finding in found)
    assert "produce waits for parity 0 of empty[0] (in phase 0, 1 of 1 arrivals and 0 bytes missing)" in text
    assert "consume waits for parity 0 of full[0] (in phase 1" in text or "parity 1 of full[0]" in text
    assert all(finding.line.startswith("toys:") for finding in found)


def test_only_the_tensors_of_a_launch_must_be_stored_and_all_of_them():
    """Two results lie in one piece of memory, which no launch stores as a whole."""
    wanted, _, right = division()
    both = torch.full((right.shape[1], 3), math.nan)
    wanted.arguments |= {"q_ptr": both.T[1], "r_ptr": both.T[0]}
    packed = SOURCE.replace("(q_ptr + at,", "(q_ptr + at * 3,").replace("(r_ptr + at,", "(r_ptr + at * 3,")
    assert not emulator.run(wanted, 0, {"toys": packed}).findings
    assert torch.equal(both[:, 1].int(), right[0].int()) and both[:, 2].isnan().all()
    both.fill_(math.nan)
    less = packed.replace("x % by, mask=at < T", "x % by, mask=at < T - 5")
    (finding,) = emulator.run(wanted, 0, {"toys": less}).findings
    assert finding.kind == "never stored" and finding.text.startswith("5 of 334 elements of r_ptr")


def test_a_barrier_must_be_initialised_before_others_may_use_it():
    init = "    mbarrier.init(ready.index(0), count=1)\n"
    source = SOURCE.replace(init, "").replace("    x_s.store(", f"{init}    x_s.store(")
    found = [emulator.run(handover()[0], seed, {"toys": source}).findings for seed in range(6)]
    texts = "".join(finding.text for each in found for finding in each if finding.kind == "barrier")
    assert all(found) and "read uses ready[0] without being ordered after its init" in texts


def test_a_choice_between_numbers_adds_none():
    source = SOURCE.replace("x // by", "gl.where(at >= 0, x // by, 2147483647)")
    assert not emulator.run(division()[0], 0, {"toys": source}).findings


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_numbers_are_rounded_as_pytorch_rounds_them(dtype: str):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-9, 9, 20_000)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, math.inf, -math.inf, math.nan, -0.0])
    x = torch.cat([x, ties])
    with np.errstate(over="ignore"):
        found = torch.from_numpy(rounded(x.numpy(), getattr(gl, dtype)))
    assert torch.equal(found.nan_to_num(7.0), x.to(getattr(torch, dtype)).float().nan_to_num(7.0))


def parameters(function: Callable) -> list[tuple[str, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(each.name, each.kind) for each in found if not each.name.startswith("_")]


def test_the_emulators_functions_take_no_more_than_gluons():
    """Each parameter is one of the real function's, in its place; what is positional only may have another name."""
    fake = language(Machine((1,), Random(0), {}, Costs()))
    pairs = [(fake, gl), (fake.nvidia.hopper, hopper)]
    pairs += [(fake.nvidia.hopper.tma, hopper.tma), (fake.nvidia.hopper.mbarrier, hopper.mbarrier)]
    checked = 0
    for ours, theirs in pairs:
        for name, function in vars(ours).items():
            if not inspect.isfunction(function) or name in ("constant", "constexpr", "MBarrierLayout"):
                continue
            real = getattr(theirs, name)
            wanted = [parameter for parameter, _ in parameters(getattr(real, "fn", inspect.unwrap(real)))]
            for i, (parameter, kind) in enumerate(parameters(function)):
                if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
                    assert len(wanted) > i, f"{name} {parameter}"
                elif kind == inspect.Parameter.KEYWORD_ONLY:
                    assert parameter in wanted, f"{name} has no {parameter}"
                else:
                    assert wanted[i : i + 1] == [parameter], f"{name}: {parameter} is not in place {i} of {wanted}"
            checked += 1
    assert checked > 50
