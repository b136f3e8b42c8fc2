"""Stages `correctness` and `gluon`: every kernel of a training step, in the types it is trained in, against float64 on
the same GPU. Attention's Gluon kernels come apart: a fault of their barriers would hang.

The rule is FlashAttention's, as in tests/gpu: an error is at most twice that of PyTorch's own form of the operation in
the same type, plus one rounding of the largest value. Then the kernel runs REPEATS times, and must give the same bits.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_proof.stage import NO_HOPPER, Items
from benchmarks.kernels import activations, adamw, attention, cross_entropy, embedding, norm, rope
from benchmarks.kernels.attention import Shape
from benchmarks.kernels.case import Case, name_of
from benchmarks.report import Record
from kernels.dispatch import INTERPRETED, KernelError
from kernels.gelu import gelu
from kernels.swiglu import swiglu

REPEATS = 20
BF16, FP32 = torch.bfloat16, torch.float32
Make = Callable[[], Case]


def shapes(D: int) -> list[Shape]:
    """8192 tokens and 1024 channels: plain, grouped heads, a window, documents, an odd length, atomic additions."""
    H = 1024 // D
    plain = Shape(8, 1024, H, D)
    return [
        plain, replace(plain, B=2, T=4096), replace(plain, K=H // 4), replace(plain, window=256),
        Shape(1, 4096, H, D, documents=9), replace(plain, T=1000), replace(plain, B=2, T=4096, atomics=True),
    ]  # fmt: skip


def cases(device: torch.device, small: bool, layer_rows: int = 8192) -> dict[str, Make]:
    """By name. small: tiny sizes. layer_rows: tokens of the last layer, whose number decides nothing of its kernels."""
    C, V, F, N, B, T = (24, 80, 48, 3000, 2, 8) if small else (768, 50304, 3072, 124_439_808, 8, 1024)
    found: dict[str, Make] = {}
    few = [Shape(2, 24, 4, 16, K=2, window=9, atomics=True), Shape(1, 40, 2, 16, documents=3)]
    for shape in few if small else [*shapes(64), *shapes(128)]:
        found[f"attention {shape}"] = partial(attention.case, device, BF16, shape)
    for width in (C,) if small else (C, 1024, 4096):
        for op in norm.OPS:
            found[f"{op} C={width}"] = partial(norm.case, device, BF16, op, B, T, width)
    targets = partial(cross_entropy.targets_of, V=V, device=device)
    found[f"cross-entropy V={V}"] = lambda: cross_entropy.case(BF16, targets(B * T), V)
    found[f"cross-entropy in place V={V}"] = lambda: cross_entropy.case(BF16, targets(B * T), V, inplace=True)
    tokens = 16 if small else layer_rows
    found[f"last layer C={C} V={V}"] = lambda: cross_entropy.layer_case(BF16, targets(tokens), C, V, z_loss=1e-4)
    for K, R, D in ((2, 3, 16),) if small else ((12, 1, 64), (8, 4, 128)):
        found[f"rotary H={K * R} K={K} D={D}"] = partial(rope.case, device, BF16, B, T, K, R, D)
    for function in (gelu, swiglu):
        found[f"{function.__name__} F={F}"] = partial(activations.case, device, BF16, function, B * T, F)
    found[f"embedding C={C}"] = lambda: embedding.case(BF16, embedding.tokens_of(B * T, V).to(device), C, V)
    update = partial(adamw.case, device, FP32, N, scalars=True)
    return found | {"adamw": update, "adamw, bf16 gradient and copy": partial(update, gradient=BF16, low=BF16)}


def correctness(device: torch.device) -> Items:
    found = cases(device, small=device.type == "cpu")
    return {name: partial(check, make, device) for name, make in found.items()}


def gluon_cases(device: torch.device) -> dict[str, Make]:
    """Attention's sizes for the Gluon kernels, then parts of a tile and of several, and fp16."""
    found: dict[str, Make] = {}
    for D in (64, 128):
        sizes = [shape for shape in shapes(D) if not shape.atomics] + [Shape(2, T, 4, D, K=2) for T in (1, 129, 700)]
        for shape, dtype in [*((shape, BF16) for shape in sizes), (sizes[0], torch.float16)]:
            shape = replace(shape, gluon=True)
            found[f"attention {name_of(dtype)} {shape}"] = partial(attention.case, device, dtype, shape)
    return found


def gluon(device: torch.device) -> Items:
    if not attention.on_hopper(Shape(1, 1, 1, 64), device):
        return NO_HOPPER
    return {name: partial(check, make, device) for name, make in gluon_cases(device).items()}


def check(make: Make, device: torch.device) -> Record:
    """share: the largest error of any result, of what is allowed; repeats: how many runs gave the same bits."""
    impl = make().impl if device.type == "cuda" or INTERPRETED else "torch"
    mine = results(make, impl)
    triples = zip(mine, plainly(make), results(make, "reference", torch.float64), strict=True)
    shares = [share(*triple) for triple in triples]
    found = {"share": max(shares, key=lambda x: (x != x, x)), "shares": shares}  # NaN is the worst
    if not found["share"] <= 1:
        return found | {"wrong": f"errors of {shares} times what is allowed"}
    if "atomics" in make().name:
        return found
    repeats = REPEATS if device.type == "cuda" else 1
    again = (zip(results(make, impl), mine, strict=True) for _ in range(repeats))
    same = sum(all(torch.equal(a, b) for a, b in pairs) for pairs in again)
    return found | {"repeats": same} | ({"wrong": "repeats gave other bits"} if same < repeats else {})


def share(ours: Tensor, plain: Tensor, true: Tensor) -> float:
    error, other = (float((x.double() - true).abs().max()) for x in (ours, plain))
    allowed = 2 * other + torch.finfo(ours.dtype).eps * float(true.abs().max())
    return error / allowed if allowed else float(error > 0)


def results(make: Make, impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Of a case made anew, since some overwrite their tensors."""
    case = make()
    if impl not in ("torch", "reference") or case.tensors[0].dim() < 4:
        return [t.detach() for t in case.results(impl, dtype)]
    # Attention's other forms store every weight: a row at a time.
    parts = [
        replace(case, tensors=row(case.tensors, b), gradients=row(case.gradients, b)).results(impl, dtype)
        for b in range(len(case.tensors[0]))
    ]
    return [torch.cat(tensors).detach() for tensors in zip(*parts, strict=True)]


def row(tensors: tuple[Tensor, ...], b: int) -> tuple[Tensor, ...]:
    return tuple(t[b : b + 1] for t in tensors)


def plainly(make: Make) -> list[Tensor]:
    """PyTorch's results in the kernel's own type: of its operators, or where they have no such option the twin's."""
    try:
        return results(make, "torch")
    except KernelError:
        return results(make, "reference")
