"""The language model's last layer and its loss, a chunk of tokens at a time: the logits of a batch never exist.

N tokens, n those of a chunk, C model width, V rows of the weight. While the logits z = x W^T of a chunk exist, their
gradient overwrites them (kernels/cross_entropy/rows.py), and from it come

    dL/dx = dL/dz W,        dL/dW = sum over chunks of (dL/dz)^T x, in fp32 (not of a weight without a gradient)

so that no product is computed twice (as in Liger Kernel, Hsu et al. 2024). The backward pass only multiplies by the
upstream gradient. The three products are the vendor's. docs/decisions/0006 says why.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.cross_entropy import reference
from kernels.cross_entropy.rows import IGNORED, stock, triton_forward
from kernels.cross_entropy.vocabulary import FullVocabulary, Terms, Vocabulary, check
from kernels.dispatch import KernelError, cdiv, choose
from kernels.registration import operator

CPU_CHUNK = 1024
GPU_CHUNK = 4096  # tokens from which on the vendor's products run at full speed
ALIGNMENT = 64  # columns: a row of logits begins at a whole cache line, which odd vocabularies would forbid


def chunk_tokens(device: torch.device, token_bytes: int) -> int:
    """Tokens of a chunk, unless the caller says: on a GPU the GPU_CHUNKs whose logits fit a 64th of its memory.

    Not of the memory that is free: sums over chunks differ in their last bits, so two runs must cut alike.
    """
    if device.type == "cpu":
        return CPU_CHUNK
    share = torch.cuda.get_device_properties(device).total_memory // 64
    return max(1, share // (token_bytes * GPU_CHUNK)) * GPU_CHUNK


@cache
def accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Try whether this torch adds a product of 16-bit matrices to an fp32 matrix without rounding it first."""
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


@operator("add_product", fake=lambda *_: None, mutates=("total",))
def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total fp32 [V, C] += a b; first: = a b."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else torch.addmm(total, a, b, out=total)
    elif accumulates(total.device, a.dtype):
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=torch.float32, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


@register_flop_formula(torch.ops.ingot.add_product)
def _(total_shape, a_shape, b_shape, *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, terms: Terms, chunk: int | None, form: str, differentiate: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(sum of the losses fp32 [], dL/dx [N, C], dL/dW [V, C]).

    Without `differentiate` both gradients are empty; with `frozen` dL/dW is, which costs a third of the products.
    chunk: None for all tokens at once. dL/dW is then no sum and in weight's dtype, as the torch form's always is; else
    it is in fp32.
    """
    N, V = len(x), len(weight)
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x) if differentiate else x.new_empty(0)
    wide = None if chunk is None else torch.float32
    grad_weight = torch.empty_like(weight, dtype=wide) if differentiate and not frozen else weight.new_empty(0)
    if N == 0:
        grad_weight.zero_()
    chunk = chunk or max(N, 1)
    space = x.new_empty(min(N, chunk) if form == "triton" else 0, cdiv(V, ALIGNMENT) * ALIGNMENT)
    space[:, V:].zero_()  # a CPU's bf16 product reads past the end of a row, and there memory may hold NaN
    for start in range(0, N, chunk):
        part = slice(start, start + chunk)
        if form == "triton":
            logits = torch.mm(x[part], weight.t(), out=space[: min(chunk, N - start), :V])
            grad = logits if differentiate else None
            losses, _ = triton_forward(logits, targets[part], terms, grad)
        else:
            losses, _, grad = stock(F.linear(x[part], weight), targets[part], terms, differentiate)
            grad = None if grad is None else grad.to(x.dtype)
        total += losses.sum()
        if grad is not None:
            torch.mm(grad, weight, out=grad_x[part])
            if not frozen:
                add_product(grad_weight, grad.t(), x[part], start == 0)
    return total, grad_x, grad_weight.to(weight.dtype) if form == "torch" else grad_weight


def _fake(x, weight, targets, rows, ignore_index, z_loss, softcap, chunk, form, differentiate, frozen):
    loss = x.new_empty((), dtype=torch.float32)
    if not differentiate:
        return loss, x.new_empty(0), weight.new_empty(0)
    dtype = torch.float32 if form == "triton" and chunk is not None else weight.dtype
    return loss, torch.empty_like(x), weight.new_empty(0) if frozen else torch.empty_like(weight, dtype=dtype)


def _save(ctx, inputs, output) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)


def _backward(ctx, grad, *_):
    """Both gradients times grad [], the weight's rounded once to its dtype, which is that of x."""
    grad_x, grad_weight = ctx.saved_tensors
    # Not in place: this takes less memory than a chunk's logits, which are gone by now.
    if grad_weight.dtype == grad_x.dtype:
        return grad_x * grad, grad_weight * grad
    return grad_x * grad, torch.mul(grad_weight, grad, out=torch.empty_like(grad_weight, dtype=grad_x.dtype))


@operator("linear_cross_entropy", fake=_fake, save=_save, backward=_backward)
def linear_cross_entropy_op(
    x: Tensor, weight: Tensor, targets: Tensor, rows: int, ignore_index: int, z_loss: float, softcap: float,
    chunk: int | None, form: str, differentiate: bool, frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`loss_and_gradients` of a whole vocabulary: one node for torch.compile, however many chunks."""
    terms = Terms(FullVocabulary(rows), ignore_index, z_loss, softcap)
    return loss_and_gradients(x, weight, targets, terms, chunk, form, differentiate, frozen)


@register_flop_formula(torch.ops.ingot.linear_cross_entropy)
def _(x_shape, weight_shape, *arguments: Any, **_: Any) -> int:
    differentiate, frozen = arguments[-2:]
    return (2 + 2 * differentiate + 2 * (differentiate and not frozen)) * x_shape[0] * x_shape[1] * weight_shape[0]


class DividedLinearCrossEntropy(torch.autograd.Function):
    """`loss_and_gradients` of a vocabulary that ranks share: the chunks' ranks talk to each other in the forward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, *gradients = loss_and_gradients(*inputs)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grad), *(None,) * 6


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float = 0.0, ignore_index: int = IGNORED,
    softcap: float = 0.0, vocabulary: Vocabulary | None = None, chunk: int | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The sum of the cross-entropies of logits x weight^T: fp32 []; the equations are kernels/cross_entropy/rows.py's.

    x [..., C], weight [V, C] in one dtype; targets int64 [...], token ids, which are not checked; a target that is
    `ignore_index` counts nothing. vocabulary: the columns of this rank, all of them if None; with others, x's gradient
    is this rank's summand. chunk: tokens whose logits exist at once, by `chunk_tokens` unless given.

    Differentiable once, with respect to x and weight. impl: see kernels/dispatch.py; triton
    keeps logits in x's dtype, torch in fp32, and reference makes all logits at once. Raises KernelError on wrong
    shapes or a form that cannot run.
    """
    rows, flat = x.reshape(-1, x.shape[-1]), targets.flatten()
    vocabulary = vocabulary or FullVocabulary(len(weight))
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        found = f"weight {weight.dtype} {tuple(weight.shape)}"
        raise KernelError(f"linear_cross_entropy: found {found}, expected {x.dtype} (V, {x.shape[-1]}), as x has it")
    if chunk is not None and chunk < 1:
        raise KernelError(f"linear_cross_entropy: found chunk = {chunk}, expected at least 1")
    check("linear_cross_entropy", rows.shape[0], weight.shape[0], flat, vocabulary)
    form = choose(impl, "linear_cross_entropy", device=x.device, dtype=x.dtype)
    terms = Terms(vocabulary, ignore_index, z_loss, softcap)
    if form == "reference":
        return reference.linear_cross_entropy(rows, weight, flat, **terms._asdict())
    # The torch form has three fp32 tensors of a chunk's logits at once.
    size = chunk or chunk_tokens(x.device, len(weight) * (x.itemsize if form == "triton" else 12))
    chunks = None if form == "triton" and 0 < rows.shape[0] <= size else size
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad), not weight.requires_grad
    if isinstance(vocabulary, FullVocabulary):
        return linear_cross_entropy_op(rows, weight, flat, vocabulary.rows, *terms[1:], chunks, form, *needed)[0]
    return DividedLinearCrossEntropy.apply(rows, weight, flat, terms, chunks, form, *needed)  # pyright: ignore[reportReturnType]
