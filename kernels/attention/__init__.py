"""Fused causal attention: `attention` and `attention_with_lse` are the public functions."""

from kernels.attention.op import attention, attention_with_lse
from kernels.attention.options import Strided

__all__ = ["Strided", "attention", "attention_with_lse"]
