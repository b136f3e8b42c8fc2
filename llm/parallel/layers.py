"""Megatron's parallel layers (Shoeybi et al. 2019): each rank of a tensor-parallel group holds a slice of the weight.

Every layer computes what its `torch.nn` twin computes on the complete weight. With sequence parallelism (Korthikanti et
al. 2022) activations between the split layers, where norms, dropout and the residual sum act, are split by T:

                     without                     with sequence parallelism
    x between        [B, T, C] on every rank     [B, T / tp, C]
    into a column    f: nothing / all-reduce     all-gather / reduce-scatter     (forward / backward)
    out of a row     g: all-reduce / nothing     reduce-scatter / all-gather

`_tp` marks this rank's part. Shapes: B batch, T time (sequence), I input width, O output width, C model width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.embedding import embedding
from kernels.philox import DropoutKey
from llm.config import ModelConfig
from llm.model.forms import Forms
from llm.model.layers import CausalAttention, DenseLayers, Embedding, LanguageModelHead, LinearRole, replicated
from llm.parallel.collectives import (
    UNTIMED,
    Waits,
    all_gather,
    batch_first,
    f,
    g,
    gather_sequence,
    scatter_sequence,
    sequence_first,
    start_all_gather,
    start_all_reduce_,
    start_reduce_scatter,
    wait,
)
from llm.slices import Slice, mark, slice_of


@dataclass(frozen=True)
class TensorParallel:
    """A tensor-parallel group seen from one rank."""

    rank: int
    size: int
    name: str
    sequence_parallel: bool = False
    waits: Waits = UNTIMED
    """In which this rank waits for the others."""

    @staticmethod
    def of(group: dist.ProcessGroup, sequence_parallel: bool = False, waits: Waits = UNTIMED) -> TensorParallel:
        return TensorParallel(group.rank(), group.size(), group.group_name, sequence_parallel, waits)

    def slice(self, shape: tuple[int, ...], dim: int) -> Slice:
        """This rank's slice along `dim`: equal parts, of which the last are shorter where `dim` does not divide."""
        part = -(-shape[dim] // self.size)
        start = min(self.rank * part, shape[dim])
        return Slice(shape, dim, start, min(start + part, shape[dim]))

    def local_positions(self, positions: Tensor) -> Tensor:
        """[T] or [B, T] -> the positions of this rank's activations between the split layers."""
        return positions.chunk(self.size, dim=-1)[self.rank] if self.sequence_parallel else positions

    def enter(self, x: Tensor) -> Tensor:
        """The input [B, T, C] of a split layer, from an activation between the split layers."""
        if self.sequence_parallel:
            return gather_sequence(x, self.size, self.name, self.waits)
        return f(x, self.name, self.waits)

    def leave(self, partial: Tensor) -> Tensor:
        """The sum over ranks of [B, T, C], as activations are held between the split layers."""
        if self.sequence_parallel:
            return scatter_sequence(partial, self.size, self.name, self.waits)
        return g(partial, self.name, self.waits)

    def on_weight(self, weight: Tensor) -> Tensor:
        """A replicated weight, as a layer between the split ones applies it.

        With sequence parallelism each rank's gradient of it covers a part of the sequence: f sums it over ranks.
        """
        return f(weight, self.name, self.waits) if self.sequence_parallel else weight


def split(tensor: Tensor, held: Slice) -> nn.Parameter:
    """A parameter that is one slice of a global tensor, marked as DeepSpeed needs it for the gradient norm."""
    parameter = nn.Parameter(tensor)
    mark(parameter, held)
    parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


class ColumnLinear(torch.autograd.Function):
    """y_tp = x W_tp^T + b_tp for x as it is held between the split layers.

    Backward computes the input's gradient first and sends it to the other ranks while it computes the weight's. With
    sequence parallelism only this rank's part of x is kept; all of x is gathered again, while the input's gradient is
    computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp = tp
        if tp.sequence_parallel:
            x = batch_first(wait(start_all_gather(x, tp.size, tp.name), tp.waits), tp.size)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        tp, (needs_x, needs_weight, needs_bias, _) = ctx.tp, ctx.needs_input_grad
        gathered = start_all_gather(x, tp.size, tp.name) if tp.sequence_parallel and needs_weight else None
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            partial = grad @ weight
            if tp.sequence_parallel:
                grad_x = start_reduce_scatter(sequence_first(partial, tp.size), tp.size, tp.name)
            else:
                grad_x = start_all_reduce_(partial, tp.name)
        if needs_weight:
            whole_x = x if gathered is None else batch_first(wait(gathered, tp.waits), tp.size)
            grad_weight = grad.flatten(0, -2).t() @ whole_x.flatten(0, -2)
        if needs_bias:
            grad_bias = grad.flatten(0, -2).sum(dim=0)
        return None if grad_x is None else wait(grad_x, tp.waits), grad_weight, grad_bias, None


class ColumnParallelLinear(nn.Module):
    """y_tp = x W_tp^T + b_tp, with W [O, I] cut by rows: [B, T, I] ([B, T / tp, I]) -> [B, T, O / tp]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        held = tp.slice((out_features, in_features), 0)
        self.weight = split(torch.zeros(out_features // tp.size, in_features), held)
        self.bias = split(torch.zeros(out_features // tp.size), tp.slice((out_features,), 0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ColumnLinear.apply(x, self.weight, self.bias, self.tp)  # pyright: ignore[reportReturnType]


class RowParallelLinear(nn.Module):
    """y = (sum over ranks of x_tp W_tp^T) + b; W [O, I] cut by columns: [B, T, I/tp] -> [B, T, O] ([B, T/tp, O])."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        held = tp.slice((out_features, in_features), 1)
        self.weight = split(torch.zeros(out_features, in_features // tp.size), held)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))
            mark(self.bias, Slice.full((out_features,)))

    def forward(self, x_tp: Tensor) -> Tensor:
        y = self.tp.leave(F.linear(x_tp, self.weight))
        return y if self.bias is None else y + self.tp.on_weight(self.bias)


class VocabParallelEmbedding(nn.Module):
    """Rows of the table are spread over ranks; V is padded to a multiple of tp with rows that no token reaches."""

    def __init__(self, vocab_size: int, width: int, *, tp: TensorParallel, impl: str = "auto") -> None:
        super().__init__()
        self.tp = tp
        self.impl = impl
        held = tp.slice((vocab_size, width), 0)
        self.weight = split(torch.zeros(-(-vocab_size // tp.size), width), held)  # padding stays zero
        self.start = held.start

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T, C] ([B, T / tp, C])."""
        rows = embedding(tokens - self.start, self.weight, zero_outside=True, impl=self.impl)
        return self.tp.leave(rows)


class PositionTable(Embedding):
    """A learned table of positions that every rank holds whole."""

    def __init__(self, max_positions: int, width: int, *, tp: TensorParallel, impl: str) -> None:
        super().__init__(max_positions, width, impl=impl)
        self.tp = tp

    def forward(self, positions: Tensor) -> Tensor:
        """int64 [T] or [B, T] -> [..., T, C] ([..., T / tp, C])."""
        return embedding(self.tp.local_positions(positions), self.tp.on_weight(self.weight), impl=self.impl)


class VocabularyPart:
    """The columns of the logits that a rank's slice of the head gives; ranks are joined by two numbers per token."""

    def __init__(self, held: Slice, tp: TensorParallel) -> None:
        self.start = held.start
        self.rows = held.stop - held.start
        self.tp = tp

    def join(self, log_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([log_sum, target_logit])
        parts = all_gather(both, self.tp.size, self.tp.name, self.tp.waits)  # [tp, 2, n]
        return parts[:, 0].logsumexp(dim=0), parts[:, 1].sum(dim=0)


class VocabParallelHead(LanguageModelHead):
    """The output projection with its rows spread over ranks; the loss never gathers the logits."""

    def __init__(self, weight: nn.Parameter, *, z_loss: float, tp: TensorParallel, impl: str = "auto") -> None:
        super().__init__(weight, z_loss=z_loss, impl=impl)
        self.held = slice_of(weight)  # FSDP puts a gathered tensor without marks in the weight's place
        self.tp = tp

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.tp.enter(x)
        if targets is None:
            parts = all_gather(F.linear(x, self.weight).float(), self.tp.size, self.tp.name)  # [tp, ..., V / tp]
            return parts.movedim(0, -2).flatten(-2)[..., : self.held.global_shape[0]]
        return self.loss(x, targets, VocabularyPart(self.held, self.tp))


class TensorParallelLayers(DenseLayers):
    """The factory of the layers above. Widths must divide by the group's size, and T if sequence-parallel."""

    def __init__(self, tp: TensorParallel, *, seed: int, forms: Forms | None = None, z_loss: float = 0.0) -> None:
        super().__init__(seed=seed, forms=forms, z_loss=z_loss)
        self.tp = tp

    def on_weight(self, weight: Tensor) -> Tensor:
        return self.tp.on_weight(weight)

    def local_positions(self, positions: Tensor) -> Tensor:
        return self.tp.local_positions(positions)

    def linear(self, role: LinearRole, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        layer = ColumnParallelLinear if role in ("qkv", "up") else RowParallelLinear
        return layer(in_features, out_features, bias=bias, tp=self.tp)

    def embedding(self, vocab_size: int, width: int) -> nn.Module:
        return VocabParallelEmbedding(vocab_size, width, tp=self.tp, impl=self.forms.embedding)

    def position_table(self, max_positions: int, width: int) -> nn.Module:
        return replicated(PositionTable(max_positions, width, tp=self.tp, impl=self.forms.embedding))

    def lm_head(self, width: int, vocab_size: int, tied: nn.Module | None) -> LanguageModelHead:
        source = tied or self.embedding(vocab_size, width)
        weight = cast(nn.Parameter, source.weight)
        return VocabParallelHead(weight, z_loss=self.z_loss, tp=self.tp, impl=self.forms.loss)

    def attention(self, config: ModelConfig, block: int, site: int) -> CausalAttention:
        key, head_offset = DropoutKey(config.dropout, self.seed, site), self.tp.rank * (config.n_head // self.tp.size)
        return CausalAttention(config, block, key, forms=self.forms, head_offset=head_offset)
