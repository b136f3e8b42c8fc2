"""Layer and RMS norm, alone or fused with the residual addition before it."""

from kernels.norm.op import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
