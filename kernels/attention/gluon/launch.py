"""The host's side of the Gluon kernels: what they are launched with, and the forward pass.

A plan (kernels/plan.py) is made by a pure function. It launches on a GPU; `launch_of` lays the same arguments open, so
that tests can run the kernel on a CPU and compile it for a GPU that is not there.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.gluon.forward import CONSUMERS, gluon_forward_kernel
from kernels.attention.options import Options
from kernels.attention.problem import Problem, section_of
from kernels.attention.tiles import HOPPER
from kernels.dispatch import cdiv
from kernels.plan import Layout, Plan, planned

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
M, N = 64, 128  # rows of a consumer's tile of queries, and of a tile of keys
STAGES = {64: (4, 4), 128: (2, 4)}  # of keys and of values, by head width: powers of two, for short address arithmetic


class Launch(NamedTuple):
    """A kernel with a grid and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int


def launch_of(plan: Plan, *tensors: Tensor | None) -> Launch:
    """The launch that plan(*tensors) makes."""
    arguments = dict(zip(plan.kernel.arg_names, plan.arguments(tensors), strict=True))
    return Launch(plan.kernel, (plan.programs,), arguments, plan.options["num_warps"])


def layout_of(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, rows: int) -> Layout:
    """How a tensor [B, T, heads, D] lies, for a descriptor of [B, heads, T, D] in tiles [1, 1, rows, D]."""
    B, T, heads, D = shape
    # The stride of a side of length 1 is never used: torch may say anything, TMA wants a multiple of 16 bytes.
    b, t, h = (stride if side > 1 else D for stride, side in zip(strides[:3], shape[:3], strict=True))
    block = (1, 1, rows, D)
    shared = gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[dtype])
    return Layout((B, heads, T, D), (b, h, t, 1), block, partial(TensorDescriptor, layout=shared))


def described(x: Tensor) -> Tensor:
    """x [B, T, heads, D], or a copy if TMA cannot read it: if its address or a stride is no multiple of 16 bytes."""
    lies = x.data_ptr() % 16 == 0 and x.stride(3) == 1
    for side, stride in zip(x.shape[:3], x.stride(), strict=False):
        lies = lies and (side == 1 or (stride > 0 and stride * x.element_size() % 16 == 0))
    return x if lies else x.clone(memory_format=torch.contiguous_format)


@planned
def plan_of(problem: Problem) -> Plan:
    B, T, _, H, K, D = problem.sizes
    window, scale, *_ = problem.numbers
    bounded = problem.options.window is not None or problem.documents
    section = section_of(HOPPER.l2, 2 * T * D * problem.dtype.itemsize, H // K)
    layouts = [
        layout_of(shape, strides, problem.dtype, rows)
        for shape, strides, rows in zip((problem.q, problem.k, problem.k), problem.strides, (M, N, N), strict=True)
    ]
    layouts.append(layout_of(problem.q, (T * H * D, H * D, D, 1), problem.dtype, M))
    return Plan(
        gluon_forward_kernel, cdiv(T, CONSUMERS.value * M) * B * H, problem.device,
        T, H, H // K, section, window, scale, M, N, D, *STAGES[D], bounded,
        warps=4, layouts=layouts,
    )  # fmt: skip


def forward_launch(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options, bounds: Tensor | None
) -> Launch:
    """What `forward` launches. o [B, T, H, D] and lse fp32 [B, H, T] are contiguous; q, k and v are `described`."""
    plan = plan_of(Problem.of(options, bounds is not None, q, k, v))
    return launch_of(plan, q, k, v, o, lse, None if bounds is None else bounds[0])


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As kernels.attention.forward.forward, for what `why_not_gluon` permits."""
    q, k, v = map(described, (q, k, v))
    B, T, H, _ = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    plan = plan_of(Problem.of(options, bounds is not None, q, k, v))
    plan(q, k, v, o, lse, None if bounds is None else bounds[0])
    return o, lse
