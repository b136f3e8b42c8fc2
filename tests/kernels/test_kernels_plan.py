"""Launch plans: what is handed to the compiled kernel, and when Triton's own path is taken instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from kernels import plan as module
from kernels.plan import Layout, Plan, made, planned

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class Launcher:
    """Stands for Triton's, whose `launch` looks for descriptors among all arguments unless that has been taken off."""

    def __init__(self, launcher: Callable[..., None]) -> None:
        tensordesc_meta = [{"swizzle": 3, "elem_size": 4, "elem_type": 8, "block_size": [2, 16]}]

        def launch(*arguments: Any) -> None:
            launcher("wrapped", len(tensordesc_meta), *arguments)

        self.launch = launch

    def __call__(self, *arguments: Any) -> None:
        self.launch(*arguments)


class Kernel:
    """Stands for a kernel compiled by Triton: notes the calls of both paths as (path, grid, arguments, ...)."""

    def __init__(self, compiles: bool = True) -> None:
        self.calls: list[tuple] = []
        self.compiles = compiles
        self.pre_run_hooks: list = []
        self.scope = {"CONSTANT": 1}
        self.used_global_vals = {("CONSTANT", 0): (1, self.scope)}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def through_triton(*arguments: Any, **options: Any) -> CompiledKernel | None:
            self.calls.append(("triton", grid, arguments, options))
            compiled = object.__new__(CompiledKernel)
            compiled.function, compiled.packed_metadata = 7, (4, 1, 0)
            name = len(self.calls)
            compiled._run = Launcher(lambda *arguments: self.calls.append(("plan", name, arguments)))
            return compiled if self.compiles else None

        return through_triton


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver that launches nothing; its current device and streams can be set."""
    state = SimpleNamespace(device=0, stream=10, entered=[])

    @contextmanager
    def entered(index: int) -> Any:
        state.entered.append(index)
        before, state.device = state.device, index
        yield
        state.device = before

    active = SimpleNamespace(
        get_current_device=lambda: state.device, get_current_stream=lambda device: state.stream + device,
        utils=SimpleNamespace(fill_tma_descriptor=lambda *fields: fields),
    )  # fmt: skip
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(torch.cuda, "device", entered)
    return state


def paths(kernel: Kernel) -> list[str]:
    return [call[0] for call in kernel.calls]


def test_later_calls_hand_addresses_to_the_compiled_kernel(gpu: SimpleNamespace) -> None:
    kernel = Kernel()
    plan = Plan(kernel, 5, CPU, 3, 16, warps=8, stages=2)
    x, y = torch.zeros(8), torch.zeros(8)
    plan(x, None, y, numbers=(0.5, 9))
    plan(y, None, x, numbers=(0.25, -9))
    first, second = kernel.calls
    assert first == ("triton", (5,), (x, None, y, 0.5, 9, 3, 16), {"num_warps": 8, "num_stages": 2})
    addresses = y.data_ptr(), None, x.data_ptr()
    launch = 5, 1, 1, 10, 7, (4, 1, 0), None, None, None, *addresses, 0.25, -9, 3, 16
    assert second == ("plan", 1, ("wrapped", 1, *launch))


def test_nothing_is_launched_for_no_programs(gpu: SimpleNamespace) -> None:
    kernel = Kernel()
    Plan(kernel, 0, CPU)(torch.zeros(0))
    assert kernel.calls == []


def test_each_alignment_has_code_of_its_own(gpu: SimpleNamespace) -> None:
    kernel = Kernel()
    plan = Plan(kernel, 1, CPU)
    x = torch.zeros(16)
    for _ in range(2):
        plan(x, x)
        plan(x, x[1:])  # 4 bytes on
        plan(x[1:], x)
        plan(x[2:], x)
    assert paths(kernel) == ["triton"] * 3 + ["plan"] * 5
    assert [call[1] for call in kernel.calls[3:]] == [3, 1, 2, 3, 3]


def test_a_kernel_that_is_not_compiled_is_asked_for_again(gpu: SimpleNamespace) -> None:
    kernel = Kernel(compiles=False)
    plan = Plan(kernel, 1, CPU)
    for _ in range(2):
        plan(torch.zeros(1))
    assert paths(kernel) == ["triton"] * 2


def test_hooks_and_changed_constants_go_through_triton(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    plan = Plan(kernel, 1, CPU)
    x = torch.zeros(1)
    plan(x)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
        plan(x)
    plan(x)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "pre_run_hooks", [print])
        plan(x)
    plan(x)
    kernel.scope["CONSTANT"] = 2  # Triton refuses this, or compiles again
    plan(x)
    plan(x)
    assert paths(kernel) == ["triton", "triton", "plan", "triton", "plan", "triton", "plan"]


def test_launches_go_to_the_tensors_device_and_its_current_stream(gpu: SimpleNamespace) -> None:
    kernel = Kernel()
    plan = Plan(kernel, 1, torch.device("cuda", 1))
    x = torch.zeros(1)
    plan(x)
    plan(x)
    gpu.device, gpu.stream = 1, 20
    plan(x)
    assert paths(kernel) == ["triton", "plan", "plan"]
    assert [call[2][5] for call in kernel.calls[1:]] == [11, 21]
    assert gpu.entered == [torch.device("cuda", 1), 1]


def test_descriptors_are_checked_once_and_then_take_the_new_address(gpu: SimpleNamespace) -> None:
    kernel = Kernel()
    plan = Plan(kernel, 1, CPU, layouts=[Layout((4, 16), (16, 1), (2, 16))])
    x, y = torch.zeros(4, 16), torch.zeros(4, 16)
    plan(x, y)
    plan(y, x)
    described, tensor = kernel.calls[0][2]
    assert (described.base is x, described.shape, described.strides, described.block_shape, tensor is y) == (
        True, [4, 16], [16, 1], [2, 16], True,
    )  # fmt: skip
    filled, *sizes, address = kernel.calls[1][2][9:]
    assert filled == (y.data_ptr(), 3, 4, 10, [2, 16], (4, 16), (16, 1), 0)  # 10: the host's number of the type
    assert (sizes, address) == ([4, 16, 16, 1], x.data_ptr())


def test_plans_are_made_once_for_equal_keys_by_any_thread() -> None:
    seen = []

    @planned
    def double(*key: Any) -> int:
        seen.append(key)
        return 2 * len(seen)

    keys = [(torch.Size([2]), (1,), dtype, CPU) for dtype in (torch.float32, torch.bfloat16)]
    assert [double(*key) for key in keys * 2] == [2, 4, 2, 4]
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(double(*keys[0]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 4
    assert len(seen) == 2
    assert made.cache_info().maxsize is not None


# Both paths on each launch of operators compiled for a GPU, by a driver that notes what its launcher is given.
BOTH_PATHS = """
import json, torch
from unittest.mock import patch
from benchmarks.kernels import host
from kernels.plan import Plan

noted, launches = [], []

def note(*launch):
    arguments = launch[13:] if host.TRITON_3_6 else launch[-1]
    given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in (*launch[:4], *arguments)]
    noted.append(json.loads(json.dumps(given)))  # shapes of descriptors are lists or tuples

def both(self, *tensors, numbers=()):
    noted.clear()
    call(self, *tensors, numbers=numbers)  # through Triton at first
    call(self, *tensors, numbers=numbers)
    self.compile("again", tensors, numbers)
    launches.append((self.kernel.fn.__name__, len(noted), noted[1] == noted[0] == noted[2], len(noted[1])))

call = Plan.__call__
names = ("layer_norm", "rope_qkv", "gelu", "swiglu", "attention")
some = [operation for operation in host.operations() if operation[0] in names]
with (
    patch.object(host, "launch_nothing", note),
    patch.object(Plan, "__call__", both),
    patch.object(host, "operations", lambda: some),
    patch.object(host, "CALLS", 1),
    patch.object(host, "GRAPHS", 1),
):
    host.measured()
print(json.dumps(launches))
"""


def test_a_plan_hands_over_what_triton_would() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOTH_PATHS],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    launches = json.loads(done.stdout)
    assert {name for name, *_ in launches} == {
        "norm_forward_kernel", "norm_backward_kernel", "sum_partials_kernel", "rope_kernel", "gelu_forward_kernel",
        "gelu_backward_kernel", "swiglu_forward_kernel", "swiglu_backward_kernel", "attention_forward_kernel",
        "attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel",
    }  # fmt: skip
    for name, paths, same, arguments in launches:
        assert (paths, same) == (3, True), name
        assert arguments > 8, name
