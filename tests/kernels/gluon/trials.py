"""Launches of the Gluon kernels of attention on a CPU, and what they must write."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import emulator
from kernels.attention.backward import padded_length
from kernels.attention.gluon import backward as host_backward
from kernels.attention.gluon import launch as host
from kernels.attention.options import Options
from kernels.attention.reference import attention_with_lse
from mutants import Mutant, helpers, mutants

LOG2_E = math.log2(math.e)
PACKAGE = "kernels.attention.gluon"
MODULES = ("parts", "forward", "dkdv", "dq")


@dataclass(frozen=True)
class Trial:
    """Sizes and masks of a call.

    cuts: where documents begin among the B * T tokens. stages: of the rings, if others than the launch's own.
    packed: q, k and v lie in one tensor.
    """

    kernel: str
    T: int
    D: int = 64
    B: int = 1
    H: int = 1
    K: int = 1
    window: int | None = None
    cuts: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    stages: int | None = None
    packed: bool = False

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.cuts is None else torch.tensor([0, *self.cuts, self.B * self.T], dtype=torch.int32)

    def bounds(self) -> Tensor | None:
        """The first and the last token of each token's document, as kernels.attention.documents finds them."""
        if self.cu_seqlens is None:
            return None
        tokens = torch.arange(self.B * self.T)
        document, row = torch.searchsorted(self.cu_seqlens, tokens, right=True), tokens // self.T * self.T
        first, after = self.cu_seqlens[document - 1] - row, self.cu_seqlens[document] - row
        return torch.stack([first, after - 1]).view(2, self.B, self.T).int()

    def inputs(self) -> tuple[Tensor, ...]:
        """Random q, k, v and the gradient of o."""
        generator = torch.Generator().manual_seed(self.T)
        heads = self.H, self.K, self.K, self.H
        x = torch.randn(self.B, self.T, sum(heads), self.D, generator=generator).to(self.dtype)
        return tuple(part if self.packed else part.contiguous() for part in x.split(heads, 2))

    def right(self, *inputs: Tensor) -> dict[str, Tensor]:
        """In float64: o and lse in base 2; for the backward kernels also delta and the gradients."""
        q, k, v, do = (x.double().requires_grad_(self.kernel != "forward") for x in inputs)
        o, lse = attention_with_lse(q, k, v, window=self.window, cu_seqlens=self.cu_seqlens)
        found = {"o": o.detach(), "lse": lse.detach() * LOG2_E}
        if self.kernel != "forward":
            found["delta"] = (o * do).sum(-1).transpose(1, 2).detach()
            found |= zip(("dq", "dk", "dv"), torch.autograd.grad(o, (q, k, v), do), strict=True)
        return found


@dataclass
class Prepared:
    """A launch with the tensors that it writes, by name, and what is right in float64."""

    launch: Any
    outputs: dict[str, Tensor]
    right: dict[str, Tensor]
    errors: dict[str, float] = field(default_factory=dict)

    def fault(self, seed: int, sources: Mapping[str, str] | None = None) -> str:
        """Run it: the first finding, or which output is wrong, or "" if all is well. seed: of the schedule."""
        for output in self.outputs.values():
            output.fill_(math.nan)
        report = emulator.run(self.launch, seed, sources, until_found=True)
        if report.findings:
            return str(report.findings[0])
        for name, output in self.outputs.items():
            right = self.right[name]
            self.errors[name] = ((output.double() - right).abs() / (1 + right.abs().max())).max().item()
            if not self.errors[name] <= (1e-5 if name == "lse" else 0.01):
                return f"wrong: the error of {name} is {self.errors[name]:.2g} of the largest number"
        return ""


def prepared(trial: Trial) -> Prepared:
    q, k, v, do = trial.inputs()
    right, bounds, options = trial.right(q, k, v, do), trial.bounds(), Options(window=trial.window)
    if trial.kernel == "forward":
        outputs = {"o": torch.empty(q.shape, dtype=q.dtype), "lse": torch.empty(trial.B, trial.H, trial.T)}
        launch = host.forward_launch(q, k, v, *outputs.values(), options, bounds)
    else:
        rows = torch.zeros(trial.B, trial.H, 2, padded_length(trial.T))
        rows[:, :, 0], rows[:, :, 0, : trial.T], rows[:, :, 1, : trial.T] = math.inf, right["lse"], right["delta"]
        names = ("dk", "dv") if trial.kernel == "dkdv" else ("dq",)
        outputs = {name: torch.empty(right[name].shape, dtype=q.dtype) for name in names}
        launch_of = getattr(host_backward, f"{trial.kernel}_launch")
        launch = launch_of(do, q, k, v, rows, *outputs.values(), options, bounds)
    stages = {name: trial.stages for name in launch.arguments if name.endswith("STAGES") and trial.stages}
    return Prepared(launch._replace(arguments=launch.arguments | stages), outputs, right)


def drawn(seed: int, kernels: Sequence[str]) -> Trial:
    """A trial from everything that fits together, of at most some hundred tokens."""
    chance = random.Random(seed)
    H, K = chance.choice([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
    B, D = chance.choice([1, 1, 2, 3]), chance.choice([64, 128])
    T = chance.choice([chance.randint(1, 140), chance.randint(1, 1500 // (B * H))])
    window = chance.choice([None, 1, chance.randint(1, T), chance.randint(1, 2 * T)])
    cuts = tuple(sorted(chance.randint(0, B * T) for _ in range(chance.randint(0, 8))))
    kernel = chance.choice(kernels)
    stages = [None, 3, 4] if kernel == "dq" else [None, 1, 2, 3, 4]  # dq waits for a tile two ahead
    return Trial(
        kernel, T, D, B, H, K, window, chance.choice([None, cuts]),
        chance.choice([torch.bfloat16, torch.float16]), chance.choice(stages), chance.random() < 0.3,
    )  # fmt: skip


def sources() -> dict[str, str]:
    """The texts of the kernels' modules, by name."""
    return {name: inspect.getsource(import_module(f"{PACKAGE}.{name}")) for name in MODULES}


@cache
def mutants_of(name: str) -> list[Mutant]:
    """All mutants of one of MODULES."""
    texts = sources()
    return list(mutants(texts[name], helpers(*texts.values())))


def survivors(
    name: str, chosen: Sequence[Mutant], trials: Sequence[Callable[[], Prepared]], seeds: int
) -> Iterator[tuple[Mutant, str]]:
    """Each chosen mutant of a module and how it was found: "" if no trial found it under any seed."""
    for mutant in chosen:
        runs = (trial().fault(seed, {f"{PACKAGE}.{name}": mutant.source}) for seed in range(seeds) for trial in trials)
        yield mutant, next(filter(None, runs), "")
