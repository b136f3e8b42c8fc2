"""Products of matrices in FP8: operands in 8-bit floating point, sums in fp32, a result in 16 or 32 bits.

Micikevicius et al. 2022 ("FP8 formats for deep learning") give two formats: e4m3, with 3 bits of mantissa and numbers
up to 448, for weights and activations, and e5m2, with 2 bits and numbers up to 57344, for gradients. An operand x is
held as round(x / s) with a scale s, which is made anew from each tensor: the least power of two for which max |x| / s
is within the format. There is one for a tensor, or one for each row or column.

Division by a power of two rounds nothing. So an operand is x rounded once, and to the same number whatever the scale
is, if it is above 2^-14 (e4m3; e5m2: 2^-29) of the largest number that the format has there.

Zeros give zeros. One number that is not finite makes the scale infinite, and NaN of all that is computed with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# On a GPU both sides of the right operand are multiples of it.
MULTIPLE = 16
LEAST_SCALE = 2.0**-100  # below all that is trained with; the product of two is 0, and no scale is


class Quantised(NamedTuple):
    """A tensor in FP8: values * scale."""

    values: Tensor
    """FP8 [..., K], contiguous."""
    scale: Tensor
    """fp32 [], or [..., 1] with one for each row, or [1, ..., K] with one for each column; powers of two, or inf."""

    def rows(self) -> Quantised:
        """The matrix [M, K], M all other dimensions, with a scale [] or [M, 1]; not with scales of columns."""
        return Quantised(self.values.flatten(0, -2), self._side())

    def columns(self) -> Quantised:
        """Its transpose [K, M], contiguous, with a scale [] or [K, 1]; not with scales of rows."""
        return Quantised(self.values.flatten(0, -2).t().contiguous(), self._side())

    def _side(self) -> Tensor:
        return self.scale if self.scale.dim() == 0 else self.scale.reshape(-1, 1)


def largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """max |x| over `dims`, fp32, these kept with 1 element; with none of them over all, []. NaN counts as infinity.

    So the maximum over ranks, which may pass over NaN, tells all of them of it.
    """
    found = x.abs().amax(dims, keepdim=True) if dims else x.abs().amax()
    return found.float().nan_to_num(nan=math.inf, posinf=math.inf)


def quantise(x: Tensor, form: torch.dtype, largest: Tensor) -> Quantised:
    """x [..., K] in E4M3 or E5M2, with scales of the shape of `largest`, which is max |x| of what shares a scale."""
    least = (largest * (1 / torch.finfo(form).max)).clamp(min=LEAST_SCALE)  # no quotient, which graphs approximate
    # The least power of two that is no smaller: a mantissa that is not 0 carries into the exponent.
    scale = (least.view(torch.int32) + 0x7FFFFF & ~0x7FFFFF).view(torch.float32)
    return Quantised((x.float() / scale).to(form).contiguous(), scale)


def product(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """a b^T: [M, K] and [N, K], as `rows` and `columns` give them -> [M, N] of `dtype`, summed in fp32.

    On a GPU by torch._scaled_mm, elsewhere as the fp32 product of values * scale; under the same rules, which are the
    GPU's: ValueError if K or N is no multiple of 16, if b is not in E4M3, if one has a scale and the other many, if
    scales for rows are to give anything but bf16, or if one is not contiguous.
    """
    (M, K), (N, contracted) = a.values.shape, b.values.shape
    shapes, scales = f"[{M}, {K}] and [{N}, {contracted}]", (a.scale.shape, b.scale.shape)
    if contracted != K or K % MULTIPLE or N % MULTIPLE:
        raise ValueError(f"FP8 operands {shapes}: expected equal widths, and K and N multiples of {MULTIPLE}")
    if b.values.dtype != E4M3:
        raise ValueError(f"the right FP8 operand is in {b.values.dtype}; expected {E4M3}")
    if scales not in (((), ()), ((M, 1), (N, 1))):
        raise ValueError(f"FP8 operands {shapes} with scales of {scales}; expected one for each, or for every row")
    if a.scale.dim() and dtype != torch.bfloat16:
        raise ValueError(f"an FP8 product with scales for rows gives torch.bfloat16; found {dtype}")
    if not (a.values.is_contiguous() and b.values.is_contiguous()):
        raise ValueError("an FP8 operand is not contiguous")
    if a.values.is_cuda:
        # Not with fast accumulation, in which tensor cores keep fewer bits of a sum than fp32 has.
        return torch._scaled_mm(a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale.t(), out_dtype=dtype)
    return F.linear(a.values.float() * a.scale, b.values.float() * b.scale).to(dtype)
