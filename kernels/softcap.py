"""The tangent of soft-caps, cap(s) = c tanh(s / c) (Gemma 2, 2024), for attention's scores and the loss's logits."""

import triton
import triton.language as tl


@triton.jit
def tanh_of_half(x):
    """tanh(x ln(2) / 2) of fp32 x, to a few units in the last place however small x is; NaN of NaN.

    Below 1/2 it is a polynomial (relative error 5e-8), since 1 - 2 / (1 + e^..) would cancel. Past 64 it is 1 in fp32,
    and exp2 stays finite.
    """
    y = x * 0.34657359027997264
    u = y * y
    near = y + y * u * (-0.333333111 + u * (0.133304765 + u * (-0.0533871106 + u * 0.0179887444)))
    far = 1.0 - 2.0 / (1.0 + tl.exp2(tl.minimum(x, 64.0, propagate_nan=tl.PropagateNan.ALL)))
    return tl.where(tl.abs(y) < 0.5, near, far)
