"""Linears in FP8: the products of their quantised operands, and the same under every cut, scales and bytes included."""

from __future__ import annotations

from functools import partial
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from fp8_faults import FAULTS
from torch import Tensor, nn

from llm.config import ParallelConfig
from llm.model.fp8 import E4M3, E5M2, largest, quantise
from llm.model.layers import LinearRole
from llm.parallel import fp8
from llm.parallel.fp8 import FP8, FP8Layers, TensorParallelFP8Layers
from llm.parallel.layers import TensorParallel
from llm.parallel.mesh import Mesh
from llm.slices import slice_of
from pool import RankPool

B, T, I, O = 2, 16, 64, 128  # noqa: E741
HOWS = {
    "tensorwise": FP8(rowwise=False, high=False),
    "tensorwise-high": FP8(rowwise=False, high=True),
    "rowwise": FP8(rowwise=True, high=False),
    "rowwise-high": FP8(rowwise=True, high=True),
}


def sloping(shape: tuple[int, ...], *slopes: int) -> Tensor:
    """Random numbers whose size goes by a factor of 2^18 down (-1) or up (1) along the last dimensions."""
    x = torch.randn(shape)
    for dim, slope in enumerate(slopes, len(shape) - len(slopes)):
        size = shape[dim]
        x = x * 2.0 ** (slope * 18 * torch.arange(size) / size).view([-1 if d == dim else 1 for d in range(len(shape))])
    return x


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the weight, the bias and the gradient of y.

    In each product one operand rises where the other falls. So what is small in one counts in the result, and its
    rounding there depends on the scale.
    """
    torch.manual_seed(0)
    x, weight, dy = sloping((B, T, I), -1, -1), sloping((O, I), 1, 1), sloping((B, T, O), 1, -1)
    return x.to(dtype), weight.to(dtype), torch.randn(O).to(dtype), dy.to(dtype)


def filled(linear: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    linear.to(weight.dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        parameter = cast(nn.Parameter, getattr(linear, name))
        parameter.data = slice_of(parameter).take(value).clone()
    return linear


def results(linear: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(direction)
    return [y.detach(), cast(Tensor, x.grad), *(cast(Tensor, p.grad) for p in linear.parameters())]


def dense(how: FP8, dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias, direction = tensors(dtype)
    linear = filled(FP8Layers(how, seed=0).linear("up", I, O, bias=True), weight, bias)
    return results(linear, x, direction)


def value(x: Tensor, form: torch.dtype, dims: tuple[int, ...]) -> Tensor:
    found = quantise(x, form, largest(x, dims))
    return (found.values.double() * found.scale.double()).flatten(0, -2)


@pytest.mark.parametrize("name", HOWS)
def test_a_linear_is_the_products_of_its_quantised_operands(name: str) -> None:
    how, dtype = HOWS[name], torch.bfloat16
    x, weight, bias, dy = tensors(dtype)
    y, grad_x, grad_weight, grad_bias = dense(how, dtype)
    last, first, tokens = ((-1,), (0,), (0, 1)) if how.rowwise else ((), (), ())
    close = partial(torch.testing.assert_close, rtol=2**-8, atol=1e-6)
    product = value(x, E4M3, last) @ value(weight, E4M3, last).t()
    close(y.flatten(0, 1).double(), product + bias.double(), atol=2**-8 * float(product.abs().max()))  # rounded twice
    close(grad_x.flatten(0, 1).double(), value(dy, E5M2, last) @ value(weight, E4M3, first))
    if how.high:
        expected = dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    else:
        expected = value(dy, E5M2, tokens).t() @ value(x, E4M3, tokens)
    close(grad_weight.double(), expected)
    close(grad_bias.double(), dy.double().sum((0, 1)), atol=2**-8 * float(dy.abs().max()))


def test_only_what_is_asked_for() -> None:
    """A frozen weight has no gradient, and neither an input without one."""
    linear = FP8Layers(HOWS["tensorwise"], seed=0).linear("up", 16, 16, bias=False)
    weight = cast(nn.Parameter, linear.weight)
    weight.requires_grad_(False)
    x = torch.ones(1, 16, 16, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None and weight.grad is None
    weight.requires_grad_(True)
    linear(torch.ones(1, 16, 16)).sum().backward()
    assert weight.grad is not None


# -- The same under every cut --


def same_as_dense(role: LinearRole, name: str, sequence_parallel: bool) -> list[str]:
    """What differs on this rank from this rank's part of what one rank computes. Collective."""
    how, dtype = HOWS[name], torch.bfloat16 if HOWS[name].rowwise else torch.float32
    group = Mesh.create(ParallelConfig(tensor_parallel=2), "cpu").tp_group
    tp = TensorParallel.of(group, sequence_parallel)
    x, weight, bias, direction = tensors(dtype)
    linear = filled(TensorParallelFP8Layers(how, tp, seed=0).linear(role, I, O, bias=True), weight, bias)
    column = role in ("qkv", "up")

    def part(tensor: Tensor, cut: int | None) -> Tensor:
        return tensor if cut is None else tensor.chunk(tp.size, cut)[tp.rank]

    tokens = 1 if sequence_parallel else None
    cuts = (2, tokens, 0, 0) if column else (tokens, 2, 1, None)  # of y, dx, dW, db
    found = results(linear, part(x, cuts[1]), part(direction, cuts[0]))
    wrong = []
    # The ranks' parts of a sum are added in the precision of the result.
    rtol = 2**-20 if dtype == torch.float32 else 2**-6
    for what, mine, whole, cut in zip(("y", "dx", "dW", "db"), found, dense(how, dtype), cuts, strict=True):
        expected = part(whole, cut).double()
        columns = expected.abs().flatten(0, -2).amax(0) if expected.dim() > 1 else expected.abs().max()
        if not ((mine.double() - expected).abs() <= rtol * columns).all():
            wrong.append(what)
    return wrong


CASES = [(role, how, sp) for role in ("up", "down") for how in HOWS for sp in (False, True)]


def all_cases() -> dict[str, list[str]]:
    """What is wrong on this rank, by case. Collective."""
    found = {f"{role} {how} {'sp' if sp else 'tp'}": same_as_dense(cast(Any, role), how, sp) for role, how, sp in CASES}
    return {case: wrong for case, wrong in found.items() if wrong}


def test_every_cut_gives_the_same(two_ranks: RankPool) -> None:
    assert two_ranks.run(all_cases) == [{}, {}]


def with_fault(name: str) -> set[str]:
    with FAULTS[name]():
        try:
            return set(all_cases())
        except ValueError as error:  # on every rank
            return {str(error)}


FOUND_IN = {
    "own-largest": {f"{role} {how} {'sp' if sp else 'tp'}" for role, how, sp in CASES},
    "scale-of-the-wrong-tensor": {"up tensorwise tp", "up rowwise tp", "down tensorwise sp", "down rowwise-high sp"},
    "not-dequantised": {"up tensorwise tp", "up rowwise tp", "down tensorwise sp", "down rowwise-high sp"},
    "formats-swapped": {"the right FP8 operand is in torch.float8_e5m2; expected torch.float8_e4m3fn"},
    "gradients-in-e4m3": {"up tensorwise tp", "up rowwise tp", "down tensorwise sp", "down rowwise-high sp"},
    "scale-of-the-wrong-rank": {"up tensorwise sp", "up rowwise sp", "down tensorwise sp"},
    "not-gathered-in-order": {"up tensorwise sp", "up rowwise-high sp", "down tensorwise sp", "down rowwise sp"},
    "partial-sums": {"up tensorwise tp", "up rowwise tp", "down tensorwise tp", "down rowwise tp"},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, two_ranks: RankPool) -> None:
    assert all(found >= FOUND_IN[name] for found in two_ranks.run(with_fault, name))


# -- What is sent --


def bytes_given(collective: str, role: LinearRole, name: str) -> list[int]:
    """What this rank gives to each call of a collective under SP: forward, -1, and the backward pass. Collective."""
    given: list[int] = []
    honest = getattr(fp8, collective)

    def noting(x: Tensor, *arguments: Any) -> Tensor:
        given.append(x.nbytes)
        return honest(x, *arguments)

    group = Mesh.create(ParallelConfig(tensor_parallel=2), "cpu").tp_group
    layers = TensorParallelFP8Layers(HOWS[name], TensorParallel.of(group, True), seed=0)
    linear = layers.linear(role, I, O, bias=False).to(torch.bfloat16)
    x = torch.ones((B, T // 2, I) if role == "up" else (B, T, I // 2), dtype=torch.bfloat16)
    with patch.object(fp8, collective, noting):
        y = linear(x.requires_grad_())
        given.append(-1)
        y.sum().backward()
    return given


def all_given(collective: str) -> dict[tuple[str, str], list[int]]:
    roles: tuple[LinearRole, ...] = ("up", "down")
    return {(role, name): bytes_given(collective, role, name) for role in roles for name in HOWS}


def test_a_byte_is_sent_for_an_element(two_ranks: RankPool) -> None:
    x, dy, rows = B * T // 2 * I, B * T // 2 * O, 4 * B * T // 2
    found = two_ranks.run(all_given, "start_all_gather")[0]
    assert found["up", "tensorwise"] == [x, -1, x]
    assert found["up", "tensorwise-high"] == [x, -1, 2 * x]
    assert found["up", "rowwise"] == [x, rows, -1, x]  # in the backward pass with scales of columns, which none cuts
    assert found["up", "rowwise-high"] == [x, rows, -1, 2 * x]
    assert found["down", "tensorwise"] == [-1, dy]
    assert found["down", "tensorwise-high"] == found["down", "rowwise"] == found["down", "rowwise-high"] == [-1, 2 * dy]


def test_one_all_reduce_joins_the_largest_numbers_of_a_product(two_ranks: RankPool) -> None:
    """4 bytes for a tensor, a row or a column."""
    found = two_ranks.run(all_given, "all_reduce")[0]
    assert found["up", "tensorwise"] == found["up", "tensorwise-high"] == [4 + 4, -1, 4]
    assert found["up", "rowwise"] == [-1, 4 * I, 4 * (B * T + I)]
    assert found["up", "rowwise-high"] == [-1, 4 * (B * T + I)]
    assert found["down", "tensorwise"] == [4 + 4, -1, 4]
    assert found["down", "tensorwise-high"] == [4 + 4, -1]  # dy is gathered first
    assert found["down", "rowwise"] == found["down", "rowwise-high"] == [4 * (B * T + O), -1]
