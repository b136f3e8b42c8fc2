"""Megatron's parallel layers (Shoeybi et al. 2019): each rank of a tensor-parallel group holds a slice of the weight.

Every layer computes what its `torch.nn` twin computes on the whole weight. A suffix `_tp` means this rank's part.
Shapes: N tokens, I input width, O output width, C model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.philox import DropoutKey
from llm.model.layers import (
    IGNORED_TARGET,
    CausalAttention,
    DenseLayers,
    LanguageModelHead,
    LinearRole,
)
from llm.parallel.collectives import all_gather, all_reduce, f, g
from llm.slices import Slice, mark, slice_of


@dataclass(frozen=True)
class TensorParallel:
    """A tensor-parallel group seen from one rank."""

    rank: int
    size: int
    name: str

    @staticmethod
    def of(group: dist.ProcessGroup) -> TensorParallel:
        return TensorParallel(group.rank(), group.size(), group.group_name)

    def slice(self, shape: tuple[int, ...], dim: int) -> Slice:
        """This rank's slice along `dim`, in equal parts; the last ranks' are cut short where it does not divide."""
        part = -(-shape[dim] // self.size)
        start = min(self.rank * part, shape[dim])
        return Slice(shape, dim, start, min(start + part, shape[dim]))


def split(tensor: Tensor, held: Slice) -> nn.Parameter:
    """A parameter that is one slice of a global tensor, marked as DeepSpeed needs it for the gradient norm."""
    parameter = nn.Parameter(tensor)
    mark(parameter, held)
    parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


class ColumnParallelLinear(nn.Module):
    """y_tp = f(x) W_tp^T + b_tp, with W [O, I] cut by rows: [..., I] -> [..., O / tp]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        held = tp.slice((out_features, in_features), 0)
        self.weight = split(torch.empty(out_features // tp.size, in_features), held)
        self.bias = None
        if bias:
            self.bias = split(torch.zeros(out_features // tp.size), tp.slice((out_features,), 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(f(x, self.tp.name), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = g(x_tp W_tp^T) + b, with W [O, I] cut by columns: [..., I / tp] -> [..., O]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        held = tp.slice((out_features, in_features), 1)
        self.weight = split(torch.empty(out_features, in_features // tp.size), held)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))
            mark(self.bias, Slice.whole((out_features,)))

    def forward(self, x_tp: Tensor) -> Tensor:
        y = g(F.linear(x_tp, self.weight), self.tp.name)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows of the table are spread over ranks; V is padded to a multiple of tp with rows that no token reaches."""

    def __init__(self, vocab_size: int, width: int, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        held = tp.slice((vocab_size, width), 0)
        self.weight = split(torch.zeros(-(-vocab_size // tp.size), width), held)  # padding stays zero
        self.start, self.stop = held.start, held.stop

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., C]."""
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        rows = F.embedding((tokens - self.start).masked_fill(elsewhere, 0), self.weight)
        return g(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tp.name)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over tokens, from logits that stay spread over ranks.

    Per token each rank contributes a maximum, a sum of exponentials and perhaps the target's logit: three numbers
    travel, never a row of logits. Backward is softmax - onehot, on this rank's columns.
    """

    @staticmethod
    def forward(ctx: Any, logits_tp: Tensor, targets: Tensor, start: int, group: str) -> Tensor:
        """logits_tp fp32 [N, V / tp] (padding -inf), targets int64 [N] -> fp32 []."""
        counted = targets != IGNORED_TARGET
        maximum = all_reduce(logits_tp.amax(dim=-1), "max", group)
        exponentials = (logits_tp - maximum.unsqueeze(-1)).exp()
        local = targets - start
        here = counted & (local >= 0) & (local < logits_tp.shape[-1])
        column = local.masked_fill(~here, 0).unsqueeze(-1)
        target_logit = logits_tp.gather(-1, column).squeeze(-1).masked_fill(~here, 0.0)
        sums = all_reduce(torch.stack([exponentials.sum(dim=-1), target_logit]), "sum", group)
        losses = sums[0].log() + maximum - sums[1]
        probabilities = exponentials.div_(sums[0].unsqueeze(-1))
        ctx.save_for_backward(probabilities, column, here, counted)
        return losses.masked_fill(~counted, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, column, here, counted = ctx.saved_tensors
        grad_logits = probabilities.clone()
        grad_logits.scatter_add_(-1, column, -here.to(grad_logits.dtype).unsqueeze(-1))
        return grad_logits.mul_((grad * counted).unsqueeze(-1)), None, None, None


class VocabParallelHead(LanguageModelHead):
    """The output projection with its rows spread over ranks; the loss never gathers the logits."""

    def __init__(self, weight: nn.Parameter, *, tp: TensorParallel) -> None:
        super().__init__(weight)
        self.tp = tp

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        held = slice_of(self.weight)
        logits_tp = F.linear(f(x, self.tp.name), self.weight).float()
        rows = held.stop - held.start
        if rows < logits_tp.shape[-1]:
            padding = torch.arange(logits_tp.shape[-1], device=x.device) >= rows
            logits_tp = logits_tp.masked_fill(padding, float("-inf"))
        if targets is None:
            gathered = all_gather(logits_tp, self.tp.size, self.tp.name)  # [tp, ..., V / tp]
            return gathered.movedim(0, -2).flatten(-2)[..., : held.global_shape[0]]
        return VocabParallelCrossEntropy.apply(  # pyright: ignore[reportReturnType]
            logits_tp.flatten(0, -2), targets.flatten(), held.start, self.tp.name
        )


class TensorParallelLayers(DenseLayers):
    """The factory of the layers above; norms and dropout are replicated. Dimensions must divide by the group's size."""

    def __init__(self, tp: TensorParallel, *, seed: int, impl: str = "auto") -> None:
        super().__init__(seed=seed, impl=impl)
        self.tp = tp

    def linear(self, role: LinearRole, name: str, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        layer = ColumnParallelLinear if role in ("qkv", "up") else RowParallelLinear
        return layer(in_features, out_features, bias=bias, tp=self.tp)

    def embedding(self, name: str, vocab_size: int, width: int) -> nn.Module:
        return VocabParallelEmbedding(vocab_size, width, tp=self.tp)

    def lm_head(self, name: str, width: int, vocab_size: int, tied: nn.Module | None) -> LanguageModelHead:
        source = tied or VocabParallelEmbedding(vocab_size, width, tp=self.tp)
        return VocabParallelHead(cast(nn.Parameter, source.weight), tp=self.tp)

    def attention(self, p: float, site: int, n_head: int, n_kv_head: int) -> CausalAttention:
        head_offset = self.tp.rank * (n_head // self.tp.size)
        return CausalAttention(DropoutKey(p, self.seed, site), impl=self.impl, head_offset=head_offset)
