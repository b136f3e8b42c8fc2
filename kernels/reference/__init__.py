"""The same operations in plain PyTorch, fp32 inside (float64 stays float64): the oracle."""

from kernels.reference.adamw import adamw_
from kernels.reference.attention import attention
from kernels.reference.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.reference.embedding import embedding
from kernels.reference.gelu import bias_gelu
from kernels.reference.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from kernels.reference.rope import rope, rope_qkv
from kernels.reference.swiglu import swiglu

__all__ = [
    "adamw_",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "embedding",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_qkv",
    "swiglu",
]
