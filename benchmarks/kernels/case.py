"""A case: one operation on given tensors, to be compiled ahead of time, timed beside rivals, or tested on a GPU.

Each family of kernels has a module with two functions: `compiled(dtype)` gives the cases whose kernels are compiled for
every architecture, and `contests(device, small)` those that are timed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Thunk

FAMILIES = ("attention", "cross_entropy", "dropout", "adamw", "embedding", "activations", "rope", "norm")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# An implementation: takes the tensors of a case and returns a tensor or several.
Function = Callable[..., Any]
# Loads an implementation. Raises where it is not installed, or has no such operation.
Loader = Callable[[], Function]
# Makes what is timed.
Setup = Callable[[], Thunk]


@dataclass(frozen=True)
class Case:
    """One operation on given tensors.

    name: its sizes and options. function(*tensors, impl=...): the public function, which returns a tensor or several.
    gradients: of the results, one each; none for an operation without a backward pass. may_spill: whether a few bytes
    spilled are accepted of its kernels (in fp32, to have more blocks on a multiprocessor). impl: of its kernels.
    """

    name: str
    function: Function
    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] = ()
    may_spill: bool = False
    impl: str = "triton"

    def results(self, impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The results, and the gradient of each tensor, in `dtype`; by default in the tensors' own."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.tensors]
        outputs = sequence(self.function(*leaves, impl=impl))
        if not self.gradients:
            return outputs
        gradients = [g.to(output.dtype) for g, output in zip(self.gradients, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


@dataclass(frozen=True)
class Contest:
    """One part of a case, timed for several rivals on the same tensors.

    kernel: a plot each. part: "forward", "backward" or "step". width: the number on the plot's axis, of which `axis` is
    the name. bytes, flops: the least that the operation must move and compute (docs/kernels.md); what bounds it decides
    which of the two the report gives a rate of. rivals: by name; "ingot" and names that begin so are ours, "reference"
    is the plain PyTorch twin. group: contests of one kernel and part that share a table and a panel of the plot.
    unlike: rivals that rightly give other numbers than ours, and so are timed without being compared.
    """

    kernel: str
    part: str
    shape: str
    axis: str
    width: int
    dtype: torch.dtype
    bytes: float
    rivals: Mapping[str, Setup]
    flops: float = 0.0
    group: str = ""
    unlike: frozenset[str] = frozenset()


def sequence(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def normal(device: torch.device, dtype: torch.dtype, *shapes: Sequence[int]) -> tuple[Tensor, ...]:
    """A tensor of each shape, normally distributed, from a fixed seed."""
    torch.manual_seed(0)
    return tuple(torch.randn(*shape, device=device).to(dtype) for shape in shapes)


def timed_dtype(small: bool) -> torch.dtype:
    """Of the tensors of a contest: bfloat16 on a GPU."""
    return torch.float32 if small else torch.bfloat16


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def loaders(case: Case, stock: Function | None = None) -> dict[str, Loader]:
    """Ours, its twin in plain PyTorch, and PyTorch's own operators (`stock`, else impl="torch"), also compiled."""
    forms = {impl: partial(case.function, impl=impl) for impl in ("triton", "reference", "torch")}
    return {
        "ingot": lambda: forms["triton" if case.tensors[0].is_cuda else "torch"],
        "reference": lambda: forms["reference"],
        "torch": lambda: stock or forms["torch"],
        "torch.compile": lambda: torch.compile(stock or forms["torch"]),
    }


def setups(case: Case, part: str, found: Mapping[str, Loader]) -> dict[str, Setup]:
    """Each implementation on the tensors of the case."""
    return {name: partial(timed, part, load, case.tensors, case.gradients) for name, load in found.items()}


def timed(part: str, load: Loader, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Thunk:
    """What is timed: the forward pass without a graph, the backward pass alone, or with `step` both."""
    function = load()
    if part == "forward":
        return torch.no_grad()(lambda: function(*tensors))
    leaves = [t.detach().requires_grad_() for t in tensors]

    def forward() -> list[Tensor]:
        return sequence(function(*leaves))

    def step() -> tuple[Tensor, ...]:
        outputs = forward()
        return *(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, gradients)

    if part == "step":
        return step
    outputs = forward()
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
