"""Attention in Gluon, Triton's language in which a program's warps have different tasks: for NVIDIA's Hopper GPUs."""

from importlib.util import find_spec

import torch

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
HEAD_WIDTHS = (64, 128)
# An older Triton has no such module. Looked up here, as torch.compile could not follow it.
INSTALLED = find_spec("triton.experimental") is not None and find_spec("triton.experimental.gluon") is not None


def why_not_gluon(
    device: torch.device, dtype: torch.dtype, head_width: int, dropout: float, sparse: bool, softcap: float,
    decoding: bool = False,
) -> str | None:  # fmt: skip
    """Why attention with such tensors and options has no Gluon form; None where it has. decoding: Tq is not Tk."""
    if not INSTALLED:
        return "found a Triton without Gluon, expected 3.6 or later: install one, or use impl=auto or triton"
    if device.type != "cuda":
        return f"found tensors on {device.type!r}, expected them on a Hopper GPU: use impl=auto"
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"found a GPU of compute capability {found}, expected 9.0 (Hopper): use impl=auto or triton"
    if dtype not in DTYPES:
        return f"found {dtype}, expected bfloat16 or float16: use impl=auto or triton"
    if head_width not in HEAD_WIDTHS:
        return f"found heads of width {head_width}, expected 64 or 128: use impl=auto or triton"
    found = "dropout" if dropout > 0 else "a block-sparse pattern" if sparse else "softcap" if softcap > 0 else None
    found = "fewer queries than keys" if decoding else found
    return None if found is None else f"found {found}, which the Gluon form does not take: use impl=auto or triton"
