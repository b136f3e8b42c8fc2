"""Records what a call would launch on a GPU, on a machine that has none. Nothing runs.

Triton's own JIT decides what a kernel is specialised on (types, alignment, constants), for CPU tensors as for a GPU's.
This module's driver only names the architecture; a hook takes each launch before it is compiled.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.kernels.case import Case
from benchmarks.kernels.host import no_gpu
from kernels.plan import made


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is specialised on. arch: 10 times the compute capability; specialization: in JSON, as
    JITFunction.preload takes it.
    """

    arch: int
    module: str
    kernel: str
    specialization: str

    @property
    def constants(self) -> str:
        """The compile-time constants that are set, warps and stages."""
        found = json.loads(self.specialization)
        names, options = list(found["signature"]), found["options"]
        values = {names[key[0]]: x for key, x in zip(found["constant_keys"], found["constant_vals"], strict=True)}
        # Lower-case names are arguments that happen to be 1 or None.
        switched = [name if x is True else f"{name}={x}" for name, x in values.items() if name.isupper() and x]
        shown = [text for text in switched if not text.endswith("=1")]
        return " ".join([*shown, f"w{options['num_warps']}", f"s{options['num_stages']}"])

    def compile(self) -> Any:
        """Triton's CompiledKernel, which is left in Triton's cache for a machine with that GPU."""
        with patch.object(driver, "_active", driver_of(self.arch)):
            return getattr(import_module(self.module), self.kernel).preload(self.specialization)


def driver_of(arch: int) -> SimpleNamespace:
    """A driver of Triton's as far as compiling needs one, whose launches do nothing."""
    found = no_gpu()
    found.get_current_target = lambda: GPUTarget("cuda", arch, 32)
    found.get_current_device = lambda: arch  # Triton keeps what it compiled by this number
    return found


@contextlib.contextmanager
def pretended(arch: int) -> Iterator[None]:
    """Inside, the kernels take CPU tensors as if they lay on a GPU of that architecture. They are compiled and not run:
    outputs are left as they were allocated.
    """
    with (
        patch.object(driver, "_active", driver_of(arch)),
        patch("kernels.dispatch.why_not_triton", lambda device, dtype: None),
        patch("kernels.attention.op.why_not_gluon", lambda *_: None),
        patch("kernels.attention.tiles.capability", lambda device: arch // 10),
    ):
        made.cache_clear()  # of plans for another architecture
        yield
    made.cache_clear()


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[dict[Launch, None]]:
    """`pretended`, without compiling: each different launch is noted in the result."""
    launches: dict[Launch, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches[Launch(arch, fn.module, fn.name, compile["specialization_data"])] = None
        return True  # do not compile

    with pretended(arch), patch.object(knobs.runtime, "jit_cache_hook", note):
        yield launches


def launches_of(case: Case, arch: int) -> list[Launch]:
    """What the case launches, forward and backward."""
    with recorded(arch) as launches, torch.autograd.set_multithreading_enabled(False):
        case.results(case.impl)
    return list(launches)
