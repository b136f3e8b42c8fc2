"""Launch plans: all that a launch depends on beyond the addresses of its tensors, worked out once.

Triton types, binds and hashes every argument on every call, which takes longer than a small kernel runs. Here the first
call goes through Triton, which compiles; later ones hand the addresses to the compiled kernel's own launcher. An
operator uses it so:

    @planned
    def plan_of(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Plan:
        ...                                         # checks, tiles, grid: pure, from the arguments alone
        return Plan(kernel, programs, device, strides[0], shape[0], ROWS, COLS, warps=8)

    def op(x: Tensor, seed: int) -> Tensor:
        y = torch.empty_like(x)
        plan_of(x.shape, x.stride(), x.dtype, x.device)(x, y, numbers=(seed,))
        return y

for a kernel(x_ptr, y_ptr, seed, stride, M, ROWS, COLS): tensors come first, then numbers that may differ from call to
call, then what the plan keeps. A planning function may return several plans, or a plan and the sizes of results.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dispatch import INTERPRETED

Made = TypeVar("Made")


# One cache for all operators. A plan holds numbers and compiled kernels, no tensor: about 2 KB each. A cache that is
# full forgets what was used longest ago, and nothing but time is lost. What is cached is a function of its key alone,
# so that neither the order of calls nor other threads can change it; lru_cache has its own lock.
@lru_cache(maxsize=4096)
def made(make: Callable[..., Any], *key: Any) -> Any:
    return make(*key)


def planned(make: Callable[..., Made]) -> Callable[..., Made]:
    """Decorator: `make`, called once for equal arguments, which are positional and hashable.

    They must say all that decides the kernels' code and arguments: shapes, strides and dtypes of tensors, which of them
    are None, the device, and the options.
    """
    return partial(made, make)


class Layout(NamedTuple):
    """How a tensor lies that a kernel takes as a TMA descriptor. block: the shape of a tile. kind: the descriptor's."""

    shape: Sequence[int]
    strides: Sequence[int]
    block: Sequence[int]
    kind: Callable[..., Any] = TensorDescriptor


def descriptor_of(layout: Layout, metadata: dict[str, Any]) -> tuple[Callable[..., Any], tuple, tuple[int, ...]]:
    """(fill, fields, sizes): Triton's launcher makes of a descriptor a map by fill(address, *fields), then sizes."""
    active: Any = driver.active
    utils = active.utils  # the other name is that of Triton 3.6
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    element = TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]]
    form = metadata["swizzle"], metadata["elem_size"], element, metadata["block_size"]
    return fill, (*form, layout.shape, layout.strides, 0), (*layout.shape, *layout.strides)


def unwrapped(run: Any, layouts: Sequence[Layout]) -> tuple[Any, Sequence[tuple]]:
    """(Triton's launcher `run` of a kernel that takes descriptors, without its search for them among all arguments,
    which takes longer than all else of a launch; what it makes of each).
    """
    wrapper = inspect.getclosurevars(run.launch).nonlocals
    run = copy.copy(run)
    run.launch = wrapper["launcher"]
    return run, [descriptor_of(*pair) for pair in zip(layouts, wrapper["tensordesc_meta"], strict=True)]


class Plan:
    """`programs` programs of a Triton kernel on `device`, whose last arguments are `last`.

    layouts: of the first tensors, if the kernel takes those as TMA descriptors.
    """

    def __init__(
        self, kernel: Any, programs: int, device: torch.device, *last: Any,
        warps: int = 4, stages: int = 1, layouts: Sequence[Layout] = (),
    ) -> None:  # fmt: skip
        self.kernel, self.programs, self.device, self.last = kernel, programs, device, last
        self.options = {"num_warps": warps, "num_stages": stages}
        self.layouts = layouts
        # (launcher, its function, its metadata, what it makes of descriptors) by which addresses are multiples of 16
        # (0: all are), since Triton's code differs.
        self.ready: dict[Any, tuple[Any, Any, Any, Sequence[tuple]]] = {}
        self.globals: list[tuple[dict[str, Any], str, Any]] = []

    def __call__(self, *tensors: Tensor | None, numbers: tuple[float, ...] = ()) -> None:
        """Launch on the device's current stream, whichever device is the current one.

        numbers: floats, and 32-bit integers that the kernel does not specialise on.
        """
        if self.programs == 0:
            return
        if INTERPRETED:
            self.compile(0, tensors, numbers)
            return
        arguments: list[Any] = [x if x is None else x.data_ptr() for x in tensors]
        aligned: Any = 0
        for address in arguments:
            aligned |= address or 0
        aligned &= 15
        if aligned:
            aligned = tuple([address is None or address % 16 == 0 for address in arguments])
        ready = self.ready.get(aligned)
        # Profilers count on Triton's hooks, and Triton refuses a kernel whose global constants were changed.
        if (
            ready is None or knobs.runtime.launch_enter_hook.calls or self.kernel.pre_run_hooks
            or (self.globals and self.is_stale())
        ):  # fmt: skip
            self.compile(aligned, tensors, numbers)
            return
        active: Any = driver.active
        here = active.get_current_device()
        if self.device.index not in (None, here):
            with torch.cuda.device(self.device.index):
                self(*tensors, numbers=numbers)
            return
        run, function, metadata, descriptors = ready
        if descriptors:
            described: list[Any] = []
            for address, (fill, fields, sizes) in zip(arguments, descriptors, strict=False):
                described += fill(address, *fields), *sizes
            arguments[: len(descriptors)] = described
        stream = active.get_current_stream(here)
        run(self.programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *numbers, *self.last)

    def arguments(self, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...] = ()) -> list[Any]:
        """What the kernel takes, as Triton's own path wants it."""
        described = [
            kind(x, list(shape), list(strides), list(block))
            for x, (shape, strides, block, kind) in zip(tensors, self.layouts, strict=False)
        ]
        return [*described, *tensors[len(described) :], *numbers, *self.last]

    def compile(self, aligned: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        """Launch by Triton's own path, which compiles if it must, and keep what it ran."""
        arguments = self.arguments(tensors, numbers)
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            compiled = self.kernel[(self.programs,)](*arguments, **self.options)
        if isinstance(compiled, CompiledKernel):
            used = self.kernel.used_global_vals
            self.globals = [(used[key][1], key[0], used[key][1].get(key[0])) for key in used]
            run, descriptors = unwrapped(compiled.run, self.layouts) if self.layouts else (compiled.run, ())
            self.ready[aligned] = run, compiled.function, compiled.packed_metadata, descriptors

    def is_stale(self) -> bool:
        """Whether a global constant that the kernel was compiled with has another value now."""
        for scope, name, value in self.globals:  # noqa: SIM110 - `any` takes four times as long
            if scope.get(name) is not value:
                return True
        return False
