"""Fused causal attention: `attention` is the public function."""

from kernels.attention.op import attention

__all__ = ["attention"]
