"""Ingot's Triton kernels. Each has a plain PyTorch reference beside it.

This file imports neither torch nor triton: other libraries probe a package called `kernels` and may
import it just to read its version, which must stay below that of Hugging Face's `kernels` (see
docs/decisions/0001).
"""

__version__ = "0.0.0"
