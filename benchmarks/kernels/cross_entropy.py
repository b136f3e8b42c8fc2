"""Cross-entropy of logits, and of the last layer, in bfloat16.

Logits: `forward` gives the losses; `backward` is for those that compute the gradient there; `step` is both, and adds
those that compute it in the forward pass. The least is to read the logits and, but for `forward`, write their gradient.
Those in place get logits of their own, which they overwrite call after call: they are timed, not compared.

Last layer: `step` is the loss with its gradients with respect to x and the weight, three products. Its backward pass
alone would be a multiplication by a number. "ingot, products alone" has the same chunks and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import BenchCase, Setup
from kernels.cross_entropy import cross_entropy
from kernels.cross_entropy.linear import add_product, chunk_tokens, linear_cross_entropy

LOGITS = [
    *((8192, V) for V in (32000, 50257, 50304, 128256)),
    *((32768, V) for V in (256, 1024, 4096, 16384, 65536)),
]
# Tokens, width, vocabulary: kernels of others are published at the first three; then GPT 124M, 350M, 1.3B and 6.7B.
LAYERS = [
    (8192, 2048, 50304), (8192, 4096, 32000), (8192, 4096, 128256),
    (16384, 768, 50304), (16384, 1024, 50304), (16384, 2048, 50304), (8192, 4096, 50304), (2048, 4096, 128256),
]  # fmt: skip
SMALL_LOGITS, SMALL_LAYERS = [(64, 500)], [(96, 32, 300)]
LARGEST_REFERENCE = 2**29  # logits: it keeps several copies in fp32
UNLIKE = frozenset({"ingot, in place", "Liger, in place", "QuACK, in place", "ingot, products alone"})

Losses = Callable[[Tensor], Tensor]
Layer = Callable[[Tensor, Tensor], Tensor]


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    for N, V in SMALL_LOGITS if small else LOGITS:
        torch.manual_seed(0)
        logits = torch.randn(N, V, device=device, dtype=dtype)
        targets = torch.randint(0, V, (N,), device=device)
        for part, passes in (("forward", 1), ("backward", 2), ("step", 2)):
            yield BenchCase(
                "cross_entropy", part, f"N={N} V={V}", "vocabulary", V, str(dtype)[6:], 0.0,
                passes * N * V * dtype.itemsize, _of_logits(part, logits, targets), f"N={N}", UNLIKE,
            )  # fmt: skip
    for N, C, V in SMALL_LAYERS if small else LAYERS:
        torch.manual_seed(0)
        x = torch.randn(N, C, device=device, dtype=dtype)
        weight = torch.randn(V, C, device=device, dtype=dtype) / C**0.5
        targets = torch.randint(0, V, (N,), device=device)
        for part, products in (("forward", 1), ("step", 3)):
            moved = (1 if part == "forward" else 2) * (N + V) * C * dtype.itemsize
            yield BenchCase(
                "linear_cross_entropy", part, f"N={N} C={C} V={V}", "vocabulary", V, str(dtype)[6:],
                2.0 * products * N * C * V, moved, _of_layer(part, x, weight, targets), unlike=UNLIKE,
            )  # fmt: skip


def _of_logits(part: str, logits: Tensor, targets: Tensor) -> dict[str, Setup]:
    ours = "triton" if logits.is_cuda else "torch"

    def stock(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets, reduction="none")

    def quack(inplace: bool) -> Losses:
        from quack.cross_entropy import cross_entropy as function  # pyright: ignore[reportMissingImports]

        return lambda z: function(z, targets, reduction="none", inplace_backward=inplace)

    makers: dict[str, Callable[[], Losses]] = {
        "ingot": lambda: lambda z: cross_entropy(z, targets, impl=ours)[0],
        "torch": lambda: stock,
        "torch.compile": lambda: torch.compile(stock),
        "QuACK": lambda: quack(False),
    }
    if logits.numel() <= LARGEST_REFERENCE:
        makers["reference"] = lambda: lambda z: cross_entropy(z, targets, impl="reference")[0]
    if part == "step":
        makers["ingot, in place"] = lambda: lambda z: cross_entropy(z, targets, inplace=True, impl=ours)[0]
        makers["Liger, in place"] = lambda: _liger(targets)
        makers["QuACK, in place"] = lambda: quack(True)
    return {name: _timed(part, make, logits, name.endswith("in place")) for name, make in makers.items()}


def _liger(targets: Tensor) -> Losses:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # pyright: ignore[reportMissingImports]

    def losses(z: Tensor) -> Tensor:  # weight, ignore_index, lse_square_scale, label_smoothing, reduction
        return LigerCrossEntropyFunction.apply(z, targets, None, -100, 0.0, 0.0, "sum")[0]

    return losses


def _timed(part: str, make: Callable[[], Losses], logits: Tensor, inplace: bool) -> Setup:
    def forward() -> Callable[[], object]:
        function = make()

        def run() -> Tensor:
            with torch.no_grad():
                return function(logits)

        return run

    def backward() -> Callable[[], object]:
        leaf = logits.detach().requires_grad_()
        loss = make()(leaf).sum()
        return lambda: torch.autograd.grad(loss, leaf, retain_graph=True)

    def step() -> Callable[[], object]:
        function = make()
        leaf = (logits.clone() if inplace else logits.detach()).requires_grad_()

        def run() -> tuple[Tensor, ...]:
            losses = function(leaf)
            return losses, *torch.autograd.grad(losses.sum(), leaf)

        return run

    return {"forward": forward, "backward": backward, "step": step}[part]


def _of_layer(part: str, x: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Setup]:
    ours = "triton" if x.is_cuda else "torch"

    def stock(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), targets, reduction="sum")

    makers: dict[str, Callable[[], Layer]] = {
        "ingot": lambda: lambda a, w: linear_cross_entropy(a, w, targets, impl=ours),
        "torch": lambda: stock,
        "torch.compile": lambda: torch.compile(stock),
    } | _libraries(targets)
    if len(x) * len(weight) <= LARGEST_REFERENCE:
        makers["reference"] = lambda: lambda a, w: linear_cross_entropy(a, w, targets, impl="reference")
    setups: dict[str, Setup] = {name: _layer_timed(part, make, x, weight) for name, make in makers.items()}
    setups["ingot, products alone"] = lambda: lambda: _products(part, x, weight)
    return setups


def _libraries(targets: Tensor) -> dict[str, Callable[[], Layer]]:
    def liger() -> Layer:
        from liger_kernel.ops import fused_linear_cross_entropy as module  # pyright: ignore[reportMissingImports]

        function: Any = module.LigerFusedLinearCrossEntropyFunction
        # bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, and the
        # dtype in which the weight's gradient is summed
        options = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
        return lambda a, w: function.apply(a, w, targets, *options)[0]

    def quack() -> Layer:
        from quack import linear_cross_entropy as module  # pyright: ignore[reportMissingImports]

        return lambda a, w: module.chunked_linear_cross_entropy(a, w, targets, chunk_size=4096, reduction="sum")

    def apple(**options: Any) -> Layer:
        from cut_cross_entropy import linear_cross_entropy as function  # pyright: ignore[reportMissingImports]

        return lambda a, w: function(a, w, targets, reduction="sum", **options)

    return {
        "Liger": liger,
        "QuACK": quack,
        "CCE": apple,
        "CCE, unfiltered": lambda: apple(filter_eps=None),
    }


def _layer_timed(part: str, make: Callable[[], Layer], x: Tensor, weight: Tensor) -> Setup:
    def forward() -> Callable[[], object]:
        function = make()

        def run() -> Tensor:
            with torch.no_grad():
                return function(x, weight)

        return run

    def step() -> Callable[[], object]:
        function = make()
        leaves = [t.detach().requires_grad_() for t in (x, weight)]

        def run() -> tuple[Tensor, ...]:
            loss = function(*leaves)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return run

    return forward if part == "forward" else step


def _products(part: str, x: Tensor, weight: Tensor) -> None:
    """The products of our chunks, their results left where ours leaves them."""
    chunk = chunk_tokens(x.device)
    logits = x.new_empty(min(chunk, len(x)), len(weight))
    grad_x, total = torch.empty_like(x), torch.empty_like(weight, dtype=None if len(x) <= chunk else torch.float32)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk]
        torch.mm(rows, weight.t(), out=logits[: len(rows)])
        if part == "step":
            torch.mm(logits[: len(rows)], weight, out=grad_x[start : start + chunk])
            add_product(total, logits[: len(rows)].t(), rows, start == 0)
