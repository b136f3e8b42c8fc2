"""The cases of cross-entropy, of logits and of the last layer, in bfloat16.

Logits: `forward` computes the losses. `backward` is for rivals that compute the gradient there. `step` is both, and
includes the rivals that compute the gradient in the forward pass. The least traffic is to read the logits and, but for
`forward`, to write their gradient. In-place rivals overwrite logits of their own: they are timed, not compared.

Last layer: `step` is the loss and its gradients of x and the weight, three products. It has no part of its own for the
backward pass, which only multiplies by a number.
"""

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Contest, Function, Setup, loaders, normal, setups, timed, timed_dtype
from kernels.cross_entropy import cross_entropy, linear_cross_entropy

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
VOCABULARIES = (256, 2048, 8192, 32000, 50304, 128256)  # whose kernels are compiled
LARGEST_REFERENCE = 2**29  # logits: it keeps several copies in fp32
UNLIKE = frozenset({"ingot, in place", "Liger, in place", "QuACK, in place"})


def targets_of(N: int, V: int, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, V, (N,), device=device)


def case(dtype: torch.dtype, targets: Tensor, V: int, **options: Any) -> Case:
    """Of logits [N, V] on the device of targets [N]; `options` of cross_entropy. In place they are overwritten."""
    N = len(targets)
    (logits,) = normal(targets.device, dtype, (N, V))

    def function(logits: Tensor, impl: str) -> Tensor:
        return cross_entropy(logits, targets, impl=impl, **options)[0]

    named = [f"{name}={value}" for name, value in options.items() if name != "vocabulary"]
    named += ["part"] * ("vocabulary" in options)
    gradients = (torch.ones(N, device=targets.device),)
    return Case(" ".join([f"N={N} V={V}", *named]), function, (logits,), gradients, may_spill=dtype == torch.float32)


def layer_case(dtype: torch.dtype, targets: Tensor, C: int, V: int, **options: Any) -> Case:
    """Of the last layer, x [N, C] and weight [V, C]; `options` of linear_cross_entropy."""
    torch.manual_seed(0)
    N, device = len(targets), targets.device
    x = torch.randn(N, C, device=device).to(dtype)
    weight = (torch.randn(V, C, device=device) / C**0.5).to(dtype)

    def function(x: Tensor, weight: Tensor, impl: str) -> Tensor:
        return linear_cross_entropy(x, weight, targets, impl=impl, **options)

    return Case(f"N={N} C={C} V={V}", function, (x, weight), (torch.ones((), device=device),))


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    """Losses alone with their backward pass, losses with their gradient, and what a part of the vocabulary needs."""
    for V in VOCABULARIES:
        targets = targets_of(3, V, torch.device("cpu"))
        # The first of the parts that ranks hold of a vocabulary; here without the others.
        part = SimpleNamespace(start=0, rows=V, join=lambda *sums: sums)
        for options in ({}, {"softcap": 30.0}):
            yield case(dtype, targets, V, **options)
            yield case(dtype, targets, V, inplace=True, **options)
            yield case(dtype, targets, V, inplace=True, vocabulary=part, **options)
    # Its logits are rows of an odd number of columns that begin at multiples of 64.
    yield layer_case(dtype, targets_of(3, 50257, torch.device("cpu")), 16, 50257)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    dtype = timed_dtype(small)
    for N, V in SMALL_LOGITS if small else LOGITS:
        targets = targets_of(N, V, device)
        given = case(dtype, targets, V)
        for part, passes in (("forward", 1), ("backward", 2), ("step", 2)):
            yield Contest(
                "cross_entropy", part, given.name, "vocabulary", V, dtype, passes * N * V * dtype.itemsize,
                of_logits(part, given, targets), group=f"N={N}", unlike=UNLIKE,
            )  # fmt: skip
    for N, C, V in SMALL_LAYERS if small else LAYERS:
        targets = targets_of(N, V, device)
        given = layer_case(dtype, targets, C, V)
        for part, products in (("forward", 1), ("step", 3)):
            moved = (1 if part == "forward" else 2) * (N + V) * C * dtype.itemsize
            yield Contest(
                "linear_cross_entropy", part, given.name, "vocabulary", V, dtype, moved,
                of_layer(part, given, targets), 2.0 * products * N * C * V,
            )  # fmt: skip


def of_logits(part: str, given: Case, targets: Tensor) -> dict[str, Setup]:
    logits = given.tensors[0]

    def stock(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets, reduction="none")

    def quack(inplace: bool) -> Function:
        function: Any = import_module("quack.cross_entropy").cross_entropy
        return lambda z: function(z, targets, reduction="none", inplace_backward=inplace)

    def liger() -> Function:
        function: Any = import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
        # weight, ignore_index, lse_square_scale, label_smoothing, reduction
        return lambda z: function.apply(z, targets, None, -100, 0.0, 0.0, "sum")[0]

    found = loaders(given, stock) | {"QuACK": lambda: quack(False)}
    if logits.numel() > LARGEST_REFERENCE:
        del found["reference"]
    rivals = setups(given, part, found)
    if part == "step":

        def ours(z: Tensor) -> Tensor:
            return cross_entropy(z, targets, inplace=True, impl="triton" if z.is_cuda else "torch")[0]

        in_place = {"ingot": lambda: ours, "Liger": liger, "QuACK": lambda: quack(True)}
        for name, load in in_place.items():
            gradient = torch.ones(() if name == "Liger" else len(logits), device=logits.device)  # Liger's loss is a sum
            rivals[f"{name}, in place"] = lambda load=load, g=gradient: timed(part, load, [logits.clone()], [g])
    return rivals


def of_layer(part: str, given: Case, targets: Tensor) -> dict[str, Setup]:
    x, weight = given.tensors

    def stock(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), targets, reduction="sum")

    def liger() -> Function:
        module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
        function: Any = module.LigerFusedLinearCrossEntropyFunction
        # bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, and the
        # dtype in which the weight's gradient is summed
        options = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
        return lambda x, weight: function.apply(x, weight, targets, *options)[0]

    def quack() -> Function:
        function: Any = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
        return lambda x, weight: function(x, weight, targets, chunk_size=4096, reduction="sum")

    def apple(**options: Any) -> Function:
        function: Any = import_module("cut_cross_entropy").linear_cross_entropy
        return lambda x, weight: function(x, weight, targets, reduction="sum", **options)

    found = loaders(given, stock) | {"Liger": liger, "QuACK": quack, "CCE": apple}
    found["CCE, unfiltered"] = lambda: apple(filter_eps=None)
    if len(x) * len(weight) > LARGEST_REFERENCE:
        del found["reference"]
    return setups(given, part, found)
