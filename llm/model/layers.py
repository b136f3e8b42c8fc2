"""The layers a GPT is made of, behind one factory.

`GPT` (llm/model/gpt.py) asks a factory for every layer. `DenseLayers` gives plain ones; `TensorParallelLayers`
(llm/parallel/layers.py) overrides those that ranks share, and keeps the names of the parameters.

Shapes: B batch, T time (sequence), C model width, H query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import Strided, attention, attention_packed
from kernels.cross_entropy import Vocabulary, linear_cross_entropy
from kernels.dropout import dropout
from kernels.embedding import embedding
from kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from kernels.philox import DropoutKey
from llm.config import ModelConfig, RunConfig
from llm.model.forms import BACKENDS, Forms, backend_attention
from llm.slices import Slice, mark

LinearRole = Literal["qkv", "attention_output", "up", "down"]
Module = TypeVar("Module", bound=nn.Module)
TensorFunction: TypeAlias = Callable[[Tensor], Tensor]
# A target of this value is not counted in the loss.
IGNORED_TARGET = -100


class Documents(NamedTuple):
    """Where the documents of a batch begin; the end of a row ends its last one."""

    position_ids: Tensor
    """int64 [B, T]: of each token in its document, from 0; these are encoded, in place of those in the row."""
    cu_seqlens: Tensor
    """int32 [documents + 1]: where documents begin in the B * T tokens, ascending from 0 to B * T."""
    bounds: Tensor | None = None
    """What the attention of all layers shares (kernels/attention/documents.py), where its form has it."""


def replicated(module: Module) -> Module:
    """Mark every parameter of `module` as the full global tensor."""
    for parameter in module.parameters():
        mark(parameter, Slice.full(tuple(parameter.shape)))
    return module


def recomputed(when: bool, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs); `when`: the backward pass computes its activations again from these (Chen et al. 2016)."""
    if not when:
        return function(*inputs)
    # No generator's state is kept: dropout masks are functions of counters.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore


class Linear(nn.Linear):
    """nn.Linear of zeros: what its model is filled with is drawn once, in llm/model/init.py."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Embedding(nn.Module):
    """A table of vectors: int64 [...] -> [..., width]."""

    def __init__(self, rows: int, width: int, *, impl: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.impl = impl

    def forward(self, numbers: Tensor) -> Tensor:
        return embedding(numbers, self.weight, impl=self.impl)


class LanguageModelHead(nn.Module):
    """Projection to the vocabulary, and its loss: both in `forward`, where ZeRO 3 gathers the weight."""

    def __init__(self, weight: nn.Parameter, *, z_loss: float, impl: str = "auto") -> None:
        super().__init__()
        self.weight = weight
        self.z_loss = z_loss
        self.impl = impl

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x [..., C] -> logits fp32 [..., V], or with targets int64 [...] the sum of their losses, fp32 [].

        A loss is -log p(target), 0 for IGNORED_TARGET; in training with z-loss (kernels/cross_entropy/linear.py).
        """
        return F.linear(x, self.weight).float() if targets is None else self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor, vocabulary: Vocabulary | None = None) -> Tensor:
        """The sum of the losses; `vocabulary`: which part of it `weight` has, padding included (None: all)."""
        z_loss = self.z_loss if self.training else 0.0
        return linear_cross_entropy(
            x, self.weight, targets, z_loss=z_loss, ignore_index=IGNORED_TARGET, vocabulary=vocabulary, impl=self.impl
        )


class Norm(nn.Module):
    """Layer norm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019).

    eps: added to the variance, or to the mean square.
    on_weight: applied to the weight and the bias in each forward pass (sequence parallelism sums their gradients so).
    """

    def __init__(self, kind: str, width: int, *, bias: bool, eps: float, impl: str, on_weight: TensorFunction) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias and kind == "layernorm" else None
        self.kind = kind
        self.eps = eps
        self.impl = impl
        self.on_weight = on_weight

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias as they are applied."""
        return self.on_weight(self.weight), None if self.bias is None else self.on_weight(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.affine()
        if self.kind == "rmsnorm":
            return rms_norm(x, weight, self.eps, impl=self.impl)
        return layer_norm(x, weight, bias, self.eps, impl=self.impl)


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, site, sample, position, channel): no layout changes it.

    local_positions: takes the positions of a sequence to those that this rank's activations have.
    """

    def __init__(self, key: DropoutKey, *, impl: str, local_positions: TensorFunction) -> None:
        super().__init__()
        self.key = key
        self.impl = impl
        self.local_positions = local_positions

    @property
    def active(self) -> DropoutKey | None:
        """The key of the mask; None where nothing is dropped."""
        return self.key if self.training and self.key.p > 0 else None

    def forward(self, x: Tensor, samples: Tensor, positions: Tensor, residual: Tensor | None = None) -> Tensor:
        """dropout(x) (+ residual): x, residual [B, T, C], global sample numbers int64 [B], positions int64 [T]."""
        if self.active is None:
            return x if residual is None else residual + x
        return dropout(x, self.key, samples, self.local_positions(positions), residual=residual, impl=self.impl)


class AddNorm(Norm):
    """Adds a branch, with dropout, to the stream and normalises the sum: one pass instead of three."""

    def __init__(self, kind: str, width: int, dropout: Dropout, **options: Any) -> None:
        super().__init__(kind, width, **options)
        self.dropout = dropout

    def forward(self, stream: Tensor, branch: Tensor, samples: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(stream + dropout(branch), its norm), all [B, T, C]; samples int64 [B], positions int64 [T] as in Dropout."""
        weight, bias = self.affine()
        key, positions = self.dropout.active, self.dropout.local_positions(positions)
        options: dict[str, Any] = dict(dropout=key, samples=samples, positions=positions, impl=self.impl)
        if self.kind == "rmsnorm":
            normed, stream = add_rms_norm(branch, stream, weight, self.eps, **options)
        else:
            normed, stream = add_layer_norm(branch, stream, weight, bias, self.eps, **options)
        return stream, normed


class CausalAttention(nn.Module):
    """softmax(cap(q k^T / sqrt(D)) + mask) v over this rank's heads (Vaswani et al. 2017).

    The mask is causal, and narrowed by the window or the sparse pattern that `config` gives block `block`.
    """

    def __init__(self, config: ModelConfig, block: int, key: DropoutKey, *, forms: Forms, head_offset: int = 0) -> None:
        super().__init__()
        sparse = config.layer_sparse(block)
        self.window = config.layer_window(block)
        self.sparse = None if sparse is None else Strided(sparse.block, sparse.local, sparse.stride)
        self.softcap = config.attention_softcap
        self.key = key
        self.forms = forms
        self.head_offset = head_offset

    def forward(
        self, heads: Tensor | tuple[Tensor, Tensor, Tensor], samples: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """heads: q [B, T, H, D] and k, v [B, S, K, D], the S >= T last ones, or all in one tensor [B, T, H, 3, D].

        samples int64 [B]; documents: if they do not attend to one another; then S = T. Returns [B, T, H, D].
        """
        key = self.key if self.training and self.key.p > 0 else None
        forms = self.forms
        options: dict[str, Any] = {"window": self.window, "sparse": self.sparse, "softcap": self.softcap}
        if forms.attention in BACKENDS:
            q, k, v = heads.unbind(3) if isinstance(heads, Tensor) else heads
            assert key is None and documents is None and q.shape[1] == k.shape[1], "a backend has a causal mask alone"
            return backend_attention(q, k, v, forms)
        if documents is not None:
            options |= {"cu_seqlens": documents.cu_seqlens, "bounds": documents.bounds}
        options |= {"dropout": key, "samples": samples, "head_offset": self.head_offset}
        options |= {"deterministic": forms.attention != "atomic", "impl": forms.attention_impl}
        return attention_packed(heads, **options) if isinstance(heads, Tensor) else attention(*heads, **options)


class DenseLayers:
    """The factory of layers on one device.

    seed: of the initial weights and the dropout masks. forms: of its operations. z_loss: its weight in the loss.
    p: probability of dropout. site: the number of a dropout in the network, which keys its masks.
    """

    def __init__(self, *, seed: int = RunConfig.seed, forms: Forms | None = None, z_loss: float = 0.0) -> None:
        self.seed = seed
        self.forms = forms or Forms()
        self.z_loss = z_loss

    def on_weight(self, weight: Tensor) -> Tensor:
        """What a norm applies to its weight and bias: nothing."""
        return weight

    def local_positions(self, positions: Tensor) -> Tensor:
        """The positions of a sequence that this rank's activations have: all."""
        return positions

    def linear(self, role: LinearRole, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """[..., in_features] -> [..., out_features]; `role`: the linear's place in the block."""
        return replicated(Linear(in_features, out_features, bias=bias))

    def embedding(self, vocab_size: int, width: int) -> nn.Module:
        """int [...] -> [..., width]; its table is `.weight`."""
        return replicated(Embedding(vocab_size, width, impl=self.forms.embedding))

    def position_table(self, max_positions: int, width: int) -> nn.Module:
        """int [T] or [B, T] -> [..., width], to be added to the token embeddings."""
        return replicated(Embedding(max_positions, width, impl=self.forms.embedding))

    def lm_head(self, width: int, vocab_size: int, tied: nn.Module | None) -> LanguageModelHead:
        """`tied`: the embedding whose table is the projection too."""
        weight = nn.Parameter(torch.zeros(vocab_size, width)) if tied is None else cast(nn.Parameter, tied.weight)
        return replicated(LanguageModelHead(weight, z_loss=self.z_loss, impl=self.forms.loss))

    def norm(self, kind: str, width: int, *, bias: bool, eps: float) -> nn.Module:
        """[..., width] -> [..., width]."""
        return replicated(Norm(kind, width, bias=bias, eps=eps, impl=self.forms.norm, on_weight=self.on_weight))

    def add_norm(self, kind: str, width: int, *, bias: bool, eps: float, p: float, site: int) -> nn.Module:
        """stream, branch -> (stream + dropout(branch), its norm)."""
        options: dict[str, Any] = dict(bias=bias, eps=eps, impl=self.forms.norm, on_weight=self.on_weight)
        return replicated(AddNorm(kind, width, self.dropout(p, site), **options))

    def dropout(self, p: float, site: int) -> Dropout:
        return Dropout(DropoutKey(p, self.seed, site), impl=self.forms.dropout, local_positions=self.local_positions)

    def attention(self, config: ModelConfig, block: int, site: int) -> CausalAttention:
        """Attention of block `block`, with dropout on its weights."""
        return CausalAttention(config, block, DropoutKey(config.dropout, self.seed, site), forms=self.forms)
