"""Chooses the form of an operation that runs, and says why a form that was asked for cannot.

triton     the kernels of this package: on an NVIDIA GPU, or on any device if the process was started with
           TRITON_INTERPRET=1, which runs them in Triton's interpreter (slow; for tests)
gluon      attention's kernels for Hopper GPUs (kernels/attention/gluon); no other operation has this form
torch      the best operators that PyTorch has
reference  the same operation in a few lines of PyTorch, fp32 inside, beside each kernel
auto       triton on a GPU where it can run, else torch, else reference
"""

from typing import Any

import torch
from triton import knobs

IMPLS = ("auto", "triton", "gluon", "torch", "reference")
LEAST_CAPABILITY = (8, 0)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton fixes the mode when a kernel is decorated, on import; this constant is read on the same import.
INTERPRETED: bool = knobs.runtime.interpret


class KernelError(ValueError):
    """A request that cannot be served. The message says what was found, what was expected and what to do."""


def expect(condition: bool, message: str) -> None:
    """Raise KernelError(message) unless `condition`."""
    if not condition:
        raise KernelError(message)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why no kernel of this package runs there, or None if they do."""
    if device.type != "cuda" and not INTERPRETED:
        return (
            f"found tensors on {device.type!r}, expected 'cuda': use impl=auto, or start the process "
            f"with TRITON_INTERPRET=1 to run the kernels in Triton's interpreter (slow)"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"found a GPU of compute capability {found}, expected at least 8.0: use impl=torch or impl=reference"
    if dtype not in TRITON_DTYPES:
        return f"found {dtype}, expected float32, float16 or bfloat16: use impl=torch or reference"
    return None


def choose(
    impl: str, op: str, *, device: torch.device, dtype: torch.dtype, no_triton: str | None = None,
    no_torch: str | None = None,
    no_gluon: str | None = "found an operation that has no Gluon form: use impl=auto or triton",
) -> str:  # fmt: skip
    """The form of `op` to run: "triton", "gluon", "torch" or "reference". Pure: the caller logs it.

    no_triton, no_torch: why the arguments of this call, beyond device and dtype, rule that form out; None if they
    do not. no_gluon: why anything rules that form out. Raises KernelError if `impl` is unknown, or names a form that
    cannot run. auto never chooses "gluon".
    """
    if impl not in IMPLS:
        raise KernelError(f"impl: found {impl!r}, expected one of {', '.join(IMPLS)}")
    no_triton = why_not_triton(device, dtype) or no_triton
    if impl == "auto":
        if device.type == "cuda" and no_triton is None:
            return "triton"
        return "torch" if no_torch is None else "reference"
    reason = {"triton": no_triton, "gluon": no_gluon, "torch": no_torch}.get(impl)
    if reason is not None:
        raise KernelError(f"{op} with impl={impl}: {reason}")
    return impl


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that references compute in: float32, or float64 if x is."""
    return x if x.dtype == torch.float64 else x.float()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def padded(width: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `width` and `least`, as the sides of Triton's tiles are."""
    return max(least, 1 << (width - 1).bit_length())


def interpretable(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Return the tensors, of which some may be None, as kernels may read them: in the interpreter bfloat16 as float32.

    The interpreter multiplies bfloat16 as integers and truncates; so `rounded` rounds the kernels' results.
    """
    if not INTERPRETED:
        return tensors
    return tuple(t.float() if t is not None and t.dtype == torch.bfloat16 else t for t in tensors)


def readable(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """`interpretable`, and copies of those whose last dimension is not contiguous, as every kernel wants it."""
    found: Any = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors]
    return interpretable(*found) if INTERPRETED else found


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a kernel wrote, in the dtype that it has outside of the interpreter."""
    return x.to(dtype) if INTERPRETED else x


def empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor for a kernel to write, sooner made than by its shape."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
