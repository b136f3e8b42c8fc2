"""FP8 operands against formats decoded bit by bit, and products of them against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm.model.fp8 import E4M3, E5M2, LEAST_SCALE, Quantised, largest, product, quantise

# Bits of the exponent and of the mantissa, and the largest number.
FORMATS = {E4M3: (4, 3, 448.0), E5M2: (5, 2, 57344.0)}


def numbers(form: torch.dtype) -> Tensor:
    """All finite numbers of a format that are not negative, by its definition: float64, ascending."""
    exponent_bits, mantissa_bits, most = FORMATS[form]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    found += [(1 + m / steps) * 2.0 ** (e - bias) for e in range(1, 2**exponent_bits) for m in range(steps)]
    return torch.tensor([x for x in found if x <= most], dtype=torch.float64)


def rounded(x: Tensor, form: torch.dtype) -> Tensor:
    """Each x, float64, as the nearest number of the format; of two, the one with an even mantissa."""
    grid = numbers(form)
    above = torch.searchsorted(grid, x.abs().contiguous()).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    up = (x.abs() - low > high - x.abs()) | ((x.abs() - low == high - x.abs()) & (above % 2 == 0))
    return torch.where(up, high, low).copysign(x)


def scale_of(most: float, form: torch.dtype) -> float:
    return 2.0 ** math.ceil(math.log2(most / FORMATS[form][2]))


def dequantised(x: Quantised) -> Tensor:
    return x.values.double() * x.scale.double()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(), (2,), (0, 1)])
def test_an_operand_is_rounded_once(form: torch.dtype, dtype: torch.dtype, dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    # Numbers over many binades: some lie below what the format has, some on the middle between two numbers.
    x = (torch.randn(3, 32, 48) * 2.0 ** torch.randint(-24, 1, (3, 32, 48))).to(dtype)
    x[0, 0, :16], x[1, 1, :16] = x[2, 2, :16], 1.0625  # the middle of 1 and 1.125
    found = quantise(x, form, largest(x, dims))
    most = x.double().abs().amax(dims, keepdim=True) if dims else x.double().abs().amax()
    scales = torch.tensor([scale_of(float(m), form) for m in most.flatten()]).double().view(most.shape)
    assert found.values.dtype == form and found.values.is_contiguous()
    assert torch.equal(found.scale.double(), scales)
    assert torch.equal(dequantised(found), rounded(x.double() / scales, form) * scales)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [1.0, 1.0 + 2**-23, 1.0 - 2**-24, 0.5, 1 / 3, 2.0**-40])
def test_scales_at_the_edges(form: torch.dtype, share: float) -> None:
    """The largest number stays finite and its scale the least power of two, also where that changes."""
    x = torch.tensor([FORMATS[form][2] * share, -1e-3 * share])
    found = quantise(x, form, largest(x, ()))
    ratio = float(x[0]) / float(found.scale)
    assert FORMATS[form][2] / 2 < ratio <= FORMATS[form][2] * (1 + 2**-23) and math.log2(float(found.scale)) % 1 == 0
    assert found.values.float().isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_a_scale_is_that_of_the_quotient_for_every_mantissa(form: torch.dtype) -> None:
    """quantise multiplies by the rounded reciprocal of the largest number."""
    mantissas = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)
    found = quantise(torch.zeros(()), form, mantissas).scale
    quotient = (mantissas.double() / FORMATS[form][2]).float()
    assert ((found >= quotient) & (found < 2 * quotient)).all()


def test_a_scale_changes_no_number_that_is_not_small() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    x[x.abs() < 2**-8] = 1.0
    whole, tenfold = (dequantised(quantise(x, E4M3, n * largest(x, ()))) for n in (1, 10))
    assert torch.equal(whole, tenfold)


def test_zeros_and_what_is_not_finite() -> None:
    x, w = torch.ones(4, 32), torch.ones(16, 32)
    zeros = quantise(x * 0, E4M3, largest(x * 0, ()))
    assert float(zeros.scale) == LEAST_SCALE
    weights = quantise(w, E4M3, largest(w, ()))
    assert torch.equal(product(zeros, weights, torch.float32), torch.zeros(4, 16))
    for bad in (math.inf, -math.inf, math.nan):
        x[1, 2] = bad
        assert product(quantise(x, E4M3, largest(x, ())), weights, torch.float32).isnan().all()
        rows = quantise(x, E4M3, largest(x, (1,)))
        y = product(rows, quantise(w, E4M3, largest(w, (1,))), torch.bfloat16)
        assert y[1].isnan().all() and torch.equal(y[[0, 2, 3]], torch.full((3, 16), 32.0, dtype=torch.bfloat16))


Operands = tuple[Quantised, Quantised]


def operands(rowwise: bool, left: torch.dtype = E4M3, M: int = 5, N: int = 32, K: int = 48) -> Operands:
    torch.manual_seed(0)
    a, b = torch.randn(M, K) * 10.0 ** torch.arange(-2, M - 2)[:, None], torch.randn(N, K)
    dims = (1,) if rowwise else ()
    return quantise(a, left, largest(a, dims)), quantise(b, E4M3, largest(b, dims))


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("left", FORMATS)
def test_a_product_is_that_of_its_operands(rowwise: bool, left: torch.dtype) -> None:
    a, b = operands(rowwise, left)
    expected, sizes = dequantised(a) @ dequantised(b).t(), dequantised(a).abs() @ dequantised(b).abs().t()
    for dtype in (torch.bfloat16,) if rowwise else (torch.float32, torch.bfloat16, torch.float16):
        found = product(a, b, dtype)
        assert found.dtype == dtype
        # Of 48 summands in fp32, and of the result.
        bound = 48 * 2.0**-24 * sizes + torch.finfo(dtype).eps / 2 * expected.abs()
        assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("rowwise", [False, True])
def test_the_cpu_s_own_product(rowwise: bool) -> None:
    """Hundreds of times slower, and so not used."""
    a, b = operands(rowwise)
    scales = {"scale_a": a.scale, "scale_b": b.scale.t()}
    theirs = torch._scaled_mm(a.values, b.values.t(), **scales, out_dtype=torch.bfloat16)
    torch.testing.assert_close(product(a, b, torch.bfloat16), theirs, rtol=2**-7, atol=1e-4)


def swapped(both: Operands) -> Operands:
    return both[1], both[0]


def with_scale(x: Quantised, scale: Tensor) -> Quantised:
    return Quantised(x.values, scale)


REFUSED: dict[str, tuple[Callable[[], Operands], torch.dtype]] = {
    "multiples of 16": (lambda: operands(False, K=40), torch.float32),
    "N multiples of 16": (lambda: operands(False, N=24), torch.float32),
    "equal widths": (lambda: (operands(False)[0], operands(False, K=32)[1]), torch.float32),
    "right FP8 operand is in torch.float8_e5m2": (lambda: swapped(operands(False, E5M2, M=16)), torch.float32),
    "with scales of": (lambda: (operands(True)[0], operands(False)[1]), torch.bfloat16),
    "one for each, or for every row": (
        lambda: (with_scale(operands(True)[0], torch.ones(1, 48)), operands(True)[1]),
        torch.bfloat16,
    ),
    "gives torch.bfloat16; found torch.float32": (lambda: operands(True), torch.float32),
    "gives torch.bfloat16; found torch.float16": (lambda: operands(True), torch.float16),
    "not contiguous": (
        lambda: (operands(False)[0], Quantised(operands(False, N=48, K=48)[1].values.t(), torch.tensor(1.0))),
        torch.float32,
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_gpu_refuses_is_refused(words: str) -> None:
    make, dtype = REFUSED[words]
    with pytest.raises(ValueError, match=words):
        product(*make(), dtype)
