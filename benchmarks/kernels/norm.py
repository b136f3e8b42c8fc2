"""The cases of norms, alone and after the residual addition, in bfloat16 at GPT presets' and QuACK's shapes."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Contest, Function, Loader, loaders, name_of, normal, setups, timed_dtype
from kernels import norm
from kernels.philox import DropoutKey

EPS = 1e-5
KEY = DropoutKey(0.1, seed=3, site=2**32 - 1)
# 124M, 350M, 1600, 1.3B, 6.7B, 13B with the tokens of a micro-batch; then QuACK's table.
PRESETS = [(16384, 768), (16384, 1024), (16384, 1600), (16384, 2048), (8192, 4096), (8192, 5120)]
SHAPES = [(32768, C) for C in (256, 1024, 4096, 8192, 16384)]
SMALL = [(64, 96)]
OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
WIDTHS = (128, 768, 1600, 2048, 4096, 5120, 8192, 16384)  # whose kernels are compiled


def case(
    device: torch.device, dtype: torch.dtype, op: str, *shape: int, bias: bool = True,
    dropout: DropoutKey | None = None, weights: torch.dtype | None = None,
) -> Case:  # fmt: skip
    """`op` of x [..., C] = shape, [B, T, C] with dropout. bias: of a layer norm. weights: their dtype, x's if None."""
    adds, rms, C = op.startswith("add"), op.endswith("rms_norm"), shape[-1]
    rows = normal(device, dtype, *[shape] * (2 * (1 + adds)))
    tensors = [*rows[: 1 + adds], (torch.rand(C, device=device) + 0.5).to(weights or dtype)]
    if bias and not rms:
        tensors.append(torch.randn(C, device=device).to(weights or dtype))
    options: dict[str, Any] = {"eps": EPS}
    if dropout is not None:
        samples, positions = torch.arange(shape[0], device=device) + 2**33, torch.arange(shape[1], device=device)
        options |= {"dropout": dropout, "samples": samples, "positions": positions}

    def function(*tensors: Tensor, impl: str) -> Any:
        none = () if bias or rms else (None,)
        return getattr(norm, op)(*tensors, *none, impl=impl, **options)

    name = f"{op} M={rows[0].numel() // C} C={C}" + " bias" * (len(tensors) > 2 + adds) + " dropout" * bool(dropout)
    name += f" weights={name_of(weights)}" if weights else ""
    return Case(name, function, tuple(tensors), rows[1 + adds :], may_spill=dtype == torch.float32)


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    make = partial(case, torch.device("cpu"), dtype)
    for C in WIDTHS:
        yield make("rms_norm", 2, 24, C)
        yield make("add_layer_norm", 2, 24, C, dropout=KEY)
        if dtype != torch.bfloat16:
            continue
        yield make("layer_norm", 2, 24, C)
        yield make("add_layer_norm", 2, 24, C)
        yield make("add_rms_norm", 2, 24, C)
        yield make("add_rms_norm", 2, 24, C, dropout=KEY)
    if dtype == torch.bfloat16:
        for op, bias in (("add_layer_norm", True), ("add_layer_norm", False), ("add_rms_norm", False)):
            yield make(op, 2, 24, 768, bias=bias, weights=torch.float32)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    for group, shapes in {"": SMALL}.items() if small else {"presets": PRESETS, "widths": SHAPES}.items():
        for M, C in shapes:
            for op in OPS:
                given = case(device, timed_dtype(small), op, M, C)
                adds, rms = op.startswith("add"), op.endswith("rms_norm")
                found = loaders(given, stock(adds, rms)) | others(op)
                # Forward reads x (and residual) and writes y (and the stream); backward reads what was normalised, dy
                # (and dstream) and writes dx, which is the residual's gradient too.
                x = given.tensors[0]
                for part, tensors in (("forward", 4 if adds else 2), ("backward", 4 if adds else 3)):
                    yield Contest(
                        op, part, f"M={M} C={C}", "width", C, x.dtype, tensors * x.nbytes, setups(given, part, found),
                        group=group,
                    )  # fmt: skip


def others(op: str) -> dict[str, Loader]:
    """Who has this operation beside us."""
    adds, rms = op.startswith("add"), op.endswith("rms_norm")
    found: dict[str, Loader] = {"flash_attn": lambda: flash_attn(adds, rms)}
    if op in LIGER:
        found["Liger"] = lambda: liger(op)
    if rms:
        found["QuACK"] = lambda: quack(adds)
    return found | ({"apex": apex} if op == "layer_norm" else {})


def stock(adds: bool, rms: bool) -> Function:
    """PyTorch's own operators."""

    def alone(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if rms:
            return F.rms_norm(x, weight.shape, weight, EPS)
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    def added(x: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        stream = residual + x
        return alone(stream, *weights), stream

    return added if adds else alone


LIGER = {
    "layer_norm": ("layer_norm", "LigerLayerNormFunction"),
    "rms_norm": ("rms_norm", "LigerRMSNormFunction"),
    "add_rms_norm": ("fused_add_rms_norm", "LigerFusedAddRMSNormFunction"),
}


def liger(op: str) -> Function:
    file, name = LIGER[op]
    function: Any = getattr(import_module(f"liger_kernel.ops.{file}"), name)
    # The weight's offset, whose rounding is imitated, and whether dy is overwritten, which a second run must not find.
    mode = () if op == "layer_norm" else (0.0, "llama", False)
    return lambda *a: function.apply(*a, EPS, *mode)


def quack(adds: bool) -> Function:
    function: Any = import_module("quack.rmsnorm").rmsnorm
    if not adds:
        return lambda x, weight: function(x, weight, eps=EPS)
    return lambda x, residual, weight: function(x, weight, residual=residual, eps=EPS, prenorm=True)


def flash_attn(adds: bool, rms: bool) -> Function:
    function: Any = import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn

    def form(x: Tensor, *rest: Tensor) -> Any:
        residual, weight, bias = (*([] if adds else [None]), *rest, *([None] if rms else []))
        return function(x, weight, bias, residual=residual, eps=EPS, prenorm=adds, is_rms_norm=rms)

    return form


def apex() -> Function:
    function: Any = import_module("apex.contrib.layer_norm.layer_norm").FastLayerNormFN
    return lambda x, weight, bias: function.apply(x, weight, bias, EPS)
