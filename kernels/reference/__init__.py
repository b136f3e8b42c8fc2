"""The same operations in plain PyTorch, fp32 inside (float64 stays float64): the oracle."""

from kernels.reference.attention import attention
from kernels.reference.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.reference.norm import layer_norm

__all__ = ["attention", "cross_entropy", "layer_norm", "linear_cross_entropy"]
