"""Norms, alone and after the residual addition, at GPT presets' and QuACK's shapes, in bfloat16."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import BenchCase, Setup, Thunk
from kernels import norm
from kernels.norm import reference

EPS = 1e-5
# 124M, 350M, 1600, 1.3B, 6.7B, 13B with the tokens of a micro-batch; then QuACK's table.
PRESETS = [(16384, 768), (16384, 1024), (16384, 1600), (16384, 2048), (8192, 4096), (8192, 5120)]
SHAPES = [(32768, C) for C in (256, 1024, 4096, 8192, 16384)]
SMALL = [(64, 96)]
LARGEST_REFERENCE = 2**29  # elements: it keeps several copies in fp32
OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")


@dataclass(frozen=True)
class Given:
    """The arguments of `op` that require a gradient, and the gradients of its results."""

    op: str
    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    @property
    def rms(self) -> bool:
        return self.op.endswith("rms_norm")

    @property
    def adds(self) -> bool:
        return self.op.startswith("add")


Form = Callable[..., Any]


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    groups = {"": SMALL} if small else {"presets": PRESETS, "widths": SHAPES}
    for group, shapes in groups.items():
        for M, C in shapes:
            for op in OPS:
                given = make(op, M, C, device, dtype)
                rows = M * C * dtype.itemsize
                # Forward reads x (and residual) and writes y (and the stream); backward reads what was normalised, dy
                # (and dstream) and writes dx, which is the residual's gradient too.
                moved = {"forward": 4 if given.adds else 2, "backward": 4 if given.adds else 3}
                for part, tensors in moved.items():
                    rivals = {name: setup(form, given, part) for name, form in forms(given, device).items()}
                    yield BenchCase(
                        op, part, f"M={M} C={C}", "width", C, str(dtype)[6:], 0.0, tensors * rows, rivals, group
                    )


def make(op: str, M: int, C: int, device: torch.device, dtype: torch.dtype) -> Given:
    def rows() -> Tensor:
        return torch.randn(M, C, device=device, dtype=dtype)

    adds, rms = op.startswith("add"), op.endswith("rms_norm")
    weights = [torch.ones(C, device=device, dtype=dtype), torch.zeros(C, device=device, dtype=dtype)][: 2 - rms]
    tensors = [t.requires_grad_() for t in (rows(), *([rows()] if adds else []), *weights)]
    return Given(op, tuple(tensors), tuple(rows() for _ in range(1 + adds)))


def setup(form: Callable[[], Form], given: Given, part: str) -> Setup:
    """form: gives the function of given.tensors that is timed, or raises where its library is missing."""

    def start() -> Thunk:
        function = form()
        if part == "forward":
            return lambda: function(*given.tensors)
        outs = function(*given.tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return lambda: torch.autograd.grad(outs, given.tensors, given.gradients, retain_graph=True)

    return start


def forms(given: Given, device: torch.device) -> dict[str, Callable[[], Form]]:
    ours = "triton" if device.type == "cuda" else "torch"
    plain = {"reference": lambda: getattr(reference, given.op)}
    return (plain if given.tensors[0].numel() <= LARGEST_REFERENCE else {}) | {
        "ingot": lambda: lambda *a: getattr(norm, given.op)(*a, eps=EPS, impl=ours),
        "torch": lambda: stock(given),
        "torch.compile": lambda: torch.compile(stock(given)),
        "Liger": lambda: liger(given),
        "QuACK": lambda: quack(given),
        "flash_attn": lambda: flash_attn(given),
        "apex": lambda: apex(given),
    }


def stock(given: Given) -> Form:
    """PyTorch's own operators."""

    def alone(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if given.rms:
            return F.rms_norm(x, weight.shape, weight, EPS)
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    def added(x: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        stream = residual + x
        return alone(stream, *weights), stream

    return added if given.adds else alone


def refuse(condition: bool, what: str) -> None:
    if condition:
        raise NotImplementedError(f"it has no {what}")


def liger(given: Given) -> Form:
    refuse(given.op == "add_layer_norm", "layer norm after an addition that gives the sum too")
    file, name = {
        "layer_norm": ("layer_norm", "LigerLayerNormFunction"),
        "rms_norm": ("rms_norm", "LigerRMSNormFunction"),
        "add_rms_norm": ("fused_add_rms_norm", "LigerFusedAddRMSNormFunction"),
    }[given.op]
    function: Any = getattr(importlib.import_module(f"liger_kernel.ops.{file}"), name)
    # The weight's offset, whose rounding is imitated, and whether dy is overwritten, which a second run must not find.
    mode = (0.0, "llama", False) if given.rms else ()
    return lambda *a: function.apply(*a, EPS, *mode)


def quack(given: Given) -> Form:
    function: Any = importlib.import_module("quack.rmsnorm").rmsnorm
    refuse(not given.rms, "layer norm with a backward")
    if not given.adds:
        return lambda x, weight: function(x, weight, eps=EPS)
    return lambda x, residual, weight: function(x, weight, residual=residual, eps=EPS, prenorm=True)


def flash_attn(given: Given) -> Form:
    function: Any = importlib.import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn

    def form(x: Tensor, *rest: Tensor) -> Any:
        residual, weight, bias = (*([] if given.adds else [None]), *rest, *([None] if given.rms else []))
        return function(x, weight, bias, residual=residual, eps=EPS, prenorm=given.adds, is_rms_norm=given.rms)

    return form


def apex(given: Given) -> Form:
    function: Any = importlib.import_module("apex.contrib.layer_norm.layer_norm").FastLayerNormFN
    refuse(given.op != "layer_norm", "such form of it")
    return lambda x, weight, bias: function.apply(x, weight, bias, EPS)
