"""Compares two results, and says whether they differ by more than two correct programs may.

The bounds are those of two correct programs that add the same numbers in another order. |.| is the 2-norm of a complete
tensor or of a scalar. g_all is all gradients together, o the oracle's result in the layout's precision, e in fp32:

                                fp32                           bf16 and fp16
    gradient        |g - e| <=  1e-5 |e| + 1e-7 |g_all|        4 |o - e| + 1e-7 |g_all|
    loss                        1e-6 |e|                       4 |o - e|, the largest over the steps (scalar_checks)
    gradient norm               1e-5 |e|                       4 |o - e|, the largest over the steps (scalar_checks)
    gradient norm, with e that of the layout's own gradients:  1e-5 |e| in every precision
    weight, moment, made from equal gradients:                 1e-6 |e| in every precision, for all of them are fp32
    and for a weight that Muon moves by u:          + 7e-4 |u|                      + 4 |o - e|

Newton-Schulz multiplies small singular values, and so the rounding of what it is given, by up to 3.4445^5 = 485. Where
a mean gradient may be off by 1e-6 of itself, the orthogonal matrix is off by 4.9e-4 at most, and its 2-norm is at least
0.7. In bf16 its own rounding is larger than that: o and e are then the weights after iterations in bf16 and in fp32.
    second moment, likewise:                                   2e-6 |e|: the norm by which gradients are clipped, with
                                                               its rounding, counts twice in their squares

With train.fp8 in any precision |g - o| <= 3 |o - e| + 1e-7 |g_all| for a gradient g (docs/parallelism.md says why), and
for scalars the bounds of bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRADIENT, NORM_SHARE = 1e-5, 1e-7
UPDATE = 1e-6
SCALARS = {"loss": 1e-6, "gradient norm": 1e-5, "validation loss": 1e-6}
LOW_PRECISION = 4.0
ORTHOGONALISED = 3.4445**5 * UPDATE / 0.7
FP8 = 3.0
# Half the distance from 1 to the next number.
UNIT_ROUNDOFF = {"fp8": 2.0**-4, "bf16": 2.0**-8, "fp16": 2.0**-11}


@dataclass(frozen=True)
class Check:
    """One comparison: of a parameter's gradient, say, in one step."""

    quantity: str
    """gradient, weight, exp_avg, exp_avg_sq; loss, gradient norm, validation loss."""
    name: str
    """Of the parameter; empty for a scalar."""
    step: int
    error: float
    bound: float
    size: float
    """2-norm of what was expected."""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound < math.inf  # never true of a NaN, nor where the oracle overflowed

    @property
    def share(self) -> float:
        """The error as a share of its bound: above 1 fails."""
        return _ratio(self.error, self.bound)

    @property
    def relative(self) -> float:
        """The error as a share of what was expected."""
        return _ratio(self.error, self.size)

    def __str__(self) -> str:
        where = f"{self.name} {self.quantity}".strip()
        return f"{where}, step {self.step}: error {self.error:.2e}, bound {self.bound:.2e}"


def _ratio(error: float, unit: float) -> float:
    if error == 0:
        return 0.0
    return error / unit if unit > 0 and not math.isnan(error) else math.inf


def worst(checks: Iterable[Check]) -> Check | None:
    """The check with the largest share of its bound; None of none."""
    return max(checks, key=lambda check: check.share, default=None)


def size(tensor: Tensor) -> float:
    """2-norm, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def distance(found: Tensor, expected: Tensor) -> float:
    """2-norm of the difference; infinite where shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return size(found.to(expected.device).double() - expected.double())


def gradient_check(
    name: str, step: int, found: Tensor, own: Tensor, exact: Tensor, all_gradients: float, *, fp8: bool = False
) -> Check:
    """`own`: the oracle's in the layout's precision; `exact`: in fp32 (the same tensor); `all_gradients`: |g_all|."""
    expected, error = size(exact), distance(found, own if fp8 else exact)
    factor = FP8 if fp8 else LOW_PRECISION
    bound = GRADIENT * expected if own is exact else factor * distance(own, exact)
    return Check("gradient", name, step, error, bound + NORM_SHARE * all_gradients, expected)


def norm_check(step: int, found: float, gradients: Iterable[Tensor]) -> Check:
    """The layout's norm against that of the very gradients it reports: exact in every precision."""
    expected = math.hypot(*map(size, gradients))
    return Check("gradient norm", "", step, abs(found - expected), SCALARS["gradient norm"] * expected, expected)


def state_check(
    kind: str, name: str, step: int, found: Tensor, expected: Tensor, *, same: bool, more: float = 0.0
) -> Check:
    """A weight (`kind` "master") or moment after an update; `same`: there was none, so that no bit may change.

    more: is added to the bound.
    """
    quantity, norm = {"master": "weight"}.get(kind, kind), size(expected)
    bound = 0.0 if same else UPDATE * norm * (2 if kind == "exp_avg_sq" else 1) + more
    return Check(quantity, name, step, distance(found, expected), bound, norm)


@dataclass(frozen=True)
class Scalar:
    """A loss or norm of one step from the layout, the oracle in its precision, and the oracle in fp32."""

    quantity: str
    step: int
    found: float
    own: float
    exact: float


def scalar_checks(scalars: Sequence[Scalar], precision: str, targets: int) -> list[Check]:
    """Compare scalars; all those of one quantity have one bound in bf16 and fp16.

    The oracle's own error is a single number that may be near zero by luck, so the largest over the steps counts, and
    no less than the deviation that rounding alone gives: of a mean of n = `targets` losses, each rounded on its own,
    (unit roundoff) x (loss) / sqrt(n).
    """
    checks = []
    for scalar in scalars:
        bound = SCALARS[scalar.quantity] * abs(scalar.exact)
        if precision != "fp32":
            alike = [s for s in scalars if s.quantity == scalar.quantity]
            floor = UNIT_ROUNDOFF[precision] * abs(scalar.exact) / math.sqrt(targets)
            bound = LOW_PRECISION * max(floor, *(abs(s.own - s.exact) for s in alike))
        error = abs(scalar.found - scalar.exact)
        checks.append(Check(scalar.quantity, "", scalar.step, error, bound, abs(scalar.exact)))
    return checks
