"""The backward pass of attention in Gluon: what its kernels are launched with, and the launches.

The formulas are those of kernels/attention/backward.py, whose first kernel finds lse and delta in rows padded to whole
tiles. One kernel then sums dK and dV over the queries, another dQ over the keys, each in a fixed order: every run gives
the same bits.
"""

import math
from functools import partial

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.backward import delta_plan, padded_length
from kernels.attention.gluon.dkdv import CONSUMERS, gluon_dkdv_kernel
from kernels.attention.gluon.dq import gluon_dq_kernel
from kernels.attention.gluon.launch import Launch, described, launch_of, layout_of
from kernels.attention.options import Options
from kernels.attention.problem import Problem, section_of
from kernels.attention.tiles import HOPPER
from kernels.dispatch import cdiv, empty_like
from kernels.plan import Layout, Plan, planned

TILE = 64  # rows of a consumer's tile, and of the tiles that it visits
STAGES = 4  # a power of two, for short address arithmetic; dq waits for a tile two ahead of the one that it releases


def rows_layout(B: int, H: int, length: int) -> Layout:
    """Of lse and delta, fp32 [B, H, 2, length], in tiles [1, 1, 2, TILE]."""
    kind = partial(TensorDescriptor, layout=gl.NVMMASharedLayout(0, 32, 4))
    return Layout((B, H, 2, length), (2 * H * length, 2 * length, length, 1), (1, 1, 2, TILE), kind)


@planned
def plans_of(problem: Problem, outputs: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Plan, Plan]:
    """(of dkdv, of dq). outputs: the strides of dq, and of dk and dv."""
    B, T, _, H, K, D = problem.sizes
    window, scale, *_ = problem.numbers
    bounded = problem.options.window is not None or problem.documents
    length = padded_length(T)

    def layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
        return layout_of(shape, strides, problem.dtype, TILE)

    shapes = problem.q, problem.k, problem.k, problem.q
    inputs = [layout(*pair) for pair in zip(shapes, problem.strides, strict=True)]
    of_q, of_k = layout(problem.q, outputs[0]), layout(problem.k, outputs[1])
    head_bytes, tiles = 2 * T * D * problem.dtype.itemsize, cdiv(T, CONSUMERS.value * TILE)
    form = window, scale, 1 / math.sqrt(D), TILE, TILE, D, STAGES, bounded

    keys = section_of(HOPPER.l2, head_bytes * (H // K), 1)
    dkdv = Plan(
        gluon_dkdv_kernel, tiles * B * K, problem.device, T, H, H // K, keys, *form,
        warps=4, layouts=[*inputs, rows_layout(B, H, length), of_k, of_k],
    )  # fmt: skip
    queries = section_of(HOPPER.l2, head_bytes, H // K)
    dq = Plan(
        gluon_dq_kernel, tiles * B * H, problem.device, length, T, H, H // K, queries, *form,
        warps=4, layouts=[*inputs, of_q],
    )  # fmt: skip
    return dkdv, dq


def plans(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, options: Options, bounds: Tensor | None
) -> tuple[Plan, Plan]:
    return plans_of(Problem.of(options, bounds is not None, q, k, v, do), (dq.stride(), dk.stride()))


def dkdv_launch(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, dk: Tensor, dv: Tensor, options: Options,
    bounds: Tensor | None,
) -> Launch:  # fmt: skip
    """What `backward` launches for dk and dv, [B, T, K, D] with equal strides. do, q, k and v are `described`.

    rows: fp32 [B, H, 2, length] as attention_delta_kernel writes them.
    """
    plan, _ = plans(do, q, k, v, q, dk, options, bounds)
    return launch_of(plan, q, k, v, do, rows, dk, dv, None if bounds is None else bounds[1])


def dq_launch(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, dq: Tensor, options: Options, bounds: Tensor | None
) -> Launch:
    """What `backward` launches for dq [B, T, H, D]. Other arguments: see dkdv_launch."""
    _, plan = plans(do, q, k, v, dq, k, options, bounds)
    return launch_of(plan, q, k, v, do, dq, rows, None if bounds is None else bounds[0])


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options,
    bounds: Tensor | None = None, packed: bool = False,
) -> list[Tensor]:  # fmt: skip
    """As kernels.attention.backward.backward, for what `why_not_gluon` permits."""
    q, k, v, do = map(described, (q, k, v, do))
    B, T, H, D = q.shape
    if packed:
        found = [q.new_empty(B, T, H, 3, D)]
        dq, dk, dv = found[0].unbind(3)
    else:
        dq, dk, dv = found = [empty_like(x) for x in (q, k, v)]
    problem = Problem.of(options, bounds is not None, q, k, v, do)
    rows = q.new_empty(B, H, 2, padded_length(T), dtype=torch.float32)
    delta_plan(problem, (0, 0, 0) if dlse is None else dlse.stride())(o.contiguous(), do, lse, dlse, rows)
    of_keys, of_queries = plans_of(problem, (dq.stride(), dk.stride()))
    starts, ends = (None, None) if bounds is None else bounds.unbind()
    of_keys(q, k, v, do, rows, dk, dv, ends)
    of_queries(q, k, v, do, dq, rows, starts)
    return found
