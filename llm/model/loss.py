"""The language-model loss, a chunk of tokens at a time: the logits of a whole batch never exist.

Shapes: N tokens, n those of a chunk, C model width, V vocabulary; V_tp is this rank's part of it, padding included.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# A target of this value is not counted in the loss.
IGNORED_TARGET = -100
CHUNK_TOKENS = 1024


class Vocabulary(Protocol):
    """Which columns of the logits are here, and how ranks with other columns are joined."""

    start: int
    """Token id of the first column."""
    rows: int
    """Columns that are token ids; those after them are padding."""

    def join(self, log_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        """log sum_j exp(z_j) and the target's logit (0 if elsewhere) of the columns here -> of all; fp32 [n] each."""
        ...


class WholeVocabulary:
    """Every column is here."""

    def __init__(self, rows: int) -> None:
        self.start = 0
        self.rows = rows

    def join(self, log_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        return log_sum, target_logit


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over counted tokens of log Z - z_target + z_loss (log Z)^2, with logits z = x W^T and Z = sum_j exp(z_j).

    The z-loss keeps log Z near 0 (Chowdhery et al. 2022, section 5). The gradient is computed along with the loss,
    while a chunk's logits exist (as in Liger Kernel, Hsu et al. 2024): with p = softmax(z),

        dL/dz = (1 + 2 z_loss log Z) p - onehot(target),  dL/dx = dL/dz W,  dL/dW = sum_chunks (dL/dz)^T x

    so no product is computed twice. dL/dW is summed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, vocabulary: Vocabulary, differentiate: bool
    ) -> Tensor:
        """x [N, C], weight [V_tp, C], targets int64 [N] -> fp32 []; differentiate: backward follows."""
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        if differentiate:
            ctx.grad_x = torch.empty_like(x)
            ctx.grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(x), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            loss, grad_logits = _chunk(x[chunk], weight, targets[chunk], z_loss, vocabulary, differentiate)
            total += loss
            if grad_logits is not None:
                torch.mm(grad_logits, weight, out=ctx.grad_x[chunk])
                _add_product(ctx.grad_weight, grad_logits, x[chunk])
        if differentiate:
            ctx.grad_weight = ctx.grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_weight = ctx.grad_x, ctx.grad_weight
        del ctx.grad_x, ctx.grad_weight  # scaled in place: they serve one backward pass
        return grad_x.mul_(grad), grad_weight.mul_(grad), None, None, None, None


def _chunk(
    x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, vocabulary: Vocabulary, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss fp32 [] of n tokens and its gradient [n, V_tp] with respect to their logits, in x's dtype."""
    logits = F.linear(x, weight).float()
    logits[:, vocabulary.rows :] = float("-inf")
    counted = targets != IGNORED_TARGET
    local = targets - vocabulary.start
    here = counted & (local >= 0) & (local < vocabulary.rows)
    column = local.masked_fill(~here, 0).unsqueeze(-1)
    target_logit = logits.gather(-1, column).squeeze(-1).masked_fill(~here, 0.0)
    log_sum, target_logit = vocabulary.join(logits.logsumexp(dim=-1), target_logit)
    losses = log_sum - target_logit + z_loss * log_sum.square()
    loss = losses.masked_fill(~counted, 0.0).sum()
    if not differentiate:
        return loss, None
    grad = logits.sub_(log_sum.unsqueeze(-1)).exp_()  # softmax, in the logits' memory
    grad *= ((1.0 + 2.0 * z_loss * log_sum) * counted).unsqueeze(-1)
    grad.scatter_add_(-1, column, -here.to(grad.dtype).unsqueeze(-1))
    return loss, grad.to(x.dtype)


def _add_product(total: Tensor, grad_logits: Tensor, x: Tensor) -> None:
    """total fp32 [V_tp, C] += grad_logits^T x."""
    if total.dtype == x.dtype:
        torch.addmm(total, grad_logits.t(), x, out=total)  # torch's FLOP counter does not know addmm_
    else:
        total += grad_logits.t() @ x


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, z_loss: float, vocabulary: Vocabulary) -> Tensor:
    """Sum of the losses of counted tokens: x [..., C], weight [V_tp, C], targets int64 [...] -> fp32 []."""
    return ChunkedCrossEntropy.apply(  # pyright: ignore[reportReturnType]
        x.reshape(-1, x.shape[-1]), weight, targets.flatten(), z_loss, vocabulary, torch.is_grad_enabled()
    )
