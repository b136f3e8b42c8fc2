"""The same operations in plain PyTorch, fp32 inside (float64 stays float64): the oracle."""

from kernels.reference.attention import attention
from kernels.reference.norm import layer_norm

__all__ = ["attention", "layer_norm"]
