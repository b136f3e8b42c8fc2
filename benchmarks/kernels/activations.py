"""The cases of GELU and SwiGLU's product. GELU reads one tensor and writes one; its backward pass reads two and writes
one. SwiGLU reads gate and up and writes one; its backward pass reads three and writes two.
"""

from collections.abc import Iterator
from functools import partial
from importlib import import_module

import torch

from benchmarks.kernels.case import Case, Contest, Function, loaders, normal, setups, timed, timed_dtype
from kernels.gelu import gelu
from kernels.swiglu import swiglu

# Rows and width of the result. Both: GPT presets; SwiGLU: LLaMA 7B and Liger's widest too.
GELU_SHAPES = [(16384, 3072), (16384, 4096), (16384, 8192), (8192, 16384)]
SWIGLU_SHAPES = [(16384, 3072), (16384, 8192), (8192, 16384), (8192, 11008), (8192, 32768)]
SMALL = [(32, 48)]


def case(
    device: torch.device, dtype: torch.dtype, function: Function, rows: int, F: int, *, strided: bool = False
) -> Case:
    """function: gelu or swiglu. strided: the rows lie apart, so that the kernel cannot take them as one."""
    width = 2 * F if function is swiglu else F
    x, dy = normal(device, dtype, (rows, width + strided * F), (rows, F))
    return Case(f"N={rows} F={F}{' strided' * strided}", function, (x[:, :width],), (dy,))


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    """A flattened tensor, a common width, and one narrower than a tile."""
    make = partial(case, torch.device("cpu"), dtype)
    for function in (gelu, swiglu):
        yield make(function, 48, 2048)
        yield make(function, 48, 2048, strided=True)
        yield make(function, 48, 64, strided=True)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    dtype = timed_dtype(small)
    for rows, F in SMALL if small else GELU_SHAPES:
        given = case(device, dtype, gelu, rows, F)
        found = loaders(given) | {"flash_attn": lambda: import_module("flash_attn.ops.activations").fast_gelu_impl}
        for part, passes in (("forward", 2), ("backward", 3)):
            moved = passes * rows * F * dtype.itemsize
            yield Contest("gelu", part, given.name, "width", F, dtype, moved, setups(given, part, found))
    for rows, F in SMALL if small else SWIGLU_SHAPES:
        given = case(device, dtype, swiglu, rows, F)
        (x,), dy = given.tensors, given.gradients
        pair = [x[:, 0::2].contiguous(), x[:, 1::2].contiguous()]
        for part, passes in (("forward", 3), ("backward", 5)):
            rivals = setups(given, part, loaders(given))
            rivals |= {name: partial(timed, part, load, pair, dy) for name, load in OF_TWO_TENSORS.items()}
            # The gradients of these are of two tensors; Liger writes them over gate and up.
            unlike = frozenset(OF_TWO_TENSORS if part == "backward" else ())
            moved = passes * rows * F * dtype.itemsize
            yield Contest("swiglu", part, given.name, "width", F, dtype, moved, rivals, unlike=unlike)


# Rivals that take gate and up as two contiguous tensors.
OF_TWO_TENSORS = {
    "Liger": lambda: import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply,
    "flash_attn": lambda: import_module("flash_attn.ops.activations").swiglu,
}
