"""Fused causal attention: `attention` is the function, the others are variants of it and what they take."""

from kernels.attention.documents import document_bounds
from kernels.attention.op import attention, attention_packed, attention_with_lse
from kernels.attention.options import Strided

__all__ = ["Strided", "attention", "attention_packed", "attention_with_lse", "document_bounds"]
