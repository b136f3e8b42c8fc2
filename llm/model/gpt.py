"""GPT, as in Radford et al. 2019 (GPT-2): a decoder-only transformer with pre-layer-norm.

    x   = embedding[tokens] (+ position table)
    x   = x + attention(norm(x))          for every block
    x   = x + feed_forward(norm(x))
    out = norm(x) @ head^T                head = embedding when tied

- positions: a learned table, or rotary (Su et al. 2021)
- feed-forward: GELU, or SwiGLU (Shazeer 2020) whose gate and up rows alternate, so that any even cut is a shard
- grouped-query attention (Ainslie et al. 2023): rows of qkv are grouped by key/value head,
  [q_1 ... q_R, k, v] for each, so that a cut between groups is a shard
- attention sees all earlier tokens, a window of them, or a sparse pattern, as each block's options say
- with document masks, a token attends to its own document alone, whose positions count from 0
- no rank, no group, no device: the factory `layers` decides what a linear is (llm/model/layers.py)

Shapes: B batch, T time (sequence), C model width, H query heads, K key/value heads, R = H / K, D head width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from kernels.attention import document_bounds
from kernels.gelu import gelu
from kernels.rope import rope_qkv
from kernels.swiglu import swiglu
from llm.config import ModelConfig
from llm.errors import require
from llm.model.cache import KVCache
from llm.model.init import init_weights
from llm.model.layers import DenseLayers, Documents, recomputed

Recompute: TypeAlias = Literal["none", "full", "selective"]
# Dropout sites: the embedding's, then three per block.
EMBEDDING_SITE = 0
SITES_PER_BLOCK = 3


class Block(nn.Module):
    """One transformer block: attention and feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig, layers: DenseLayers, index: int, recompute: Recompute = "none") -> None:
        super().__init__()
        C, D, bias, eps = config.d_model, config.head_dim, config.bias, config.norm_eps
        site = EMBEDDING_SITE + 1 + SITES_PER_BLOCK * index
        qkv_rows = (config.n_head + 2 * config.kv_heads) * D
        gated = config.activation == "swiglu"
        self.config = config
        self.index = index
        self.forms = layers.forms
        self.recompute = recompute
        self.norm_1 = layers.norm(config.norm, C, bias=bias, eps=eps)
        self.qkv = layers.linear("qkv", C, qkv_rows, bias=bias)
        self.attention = layers.attention(config, index, site)
        self.attention_output = layers.linear("attention_output", config.n_head * D, C, bias=bias)
        self.norm_2 = layers.add_norm(config.norm, C, bias=bias, eps=eps, p=config.dropout, site=site + 1)
        self.up = layers.linear("up", C, config.ff_dim * (2 if gated else 1), bias=bias)
        self.activation = swiglu if gated else gelu
        self.down = layers.linear("down", config.ff_dim, C, bias=bias)
        self.down_dropout = layers.dropout(config.dropout, site + 2)

    def forward(
        self, x: Tensor, positions: Tensor, samples: Tensor, documents: Documents | None, cache: KVCache | None = None
    ) -> Tensor:
        """x [B, T, C], positions int64 [T] in the row, global sample numbers int64 [B] -> [B, T, C]."""
        selective = self.recompute == "selective" and self.training
        heads = recomputed(
            selective, self.core_attention, self.qkv(self.norm_1(x)), positions, samples, documents, cache
        )
        attended = self.attention_output(heads)
        x, normed = self.norm_2(x, attended, samples, positions)  # x = x + dropout(attended), and its norm
        transformed = self.down(self.activation(self.up(normed), impl=self.forms.activation))
        return self.down_dropout(transformed, samples, positions, residual=x)  # x + dropout(transformed)

    def core_attention(
        self, qkv: Tensor, positions: Tensor, samples: Tensor, documents: Documents | None, cache: KVCache | None = None
    ) -> Tensor:
        """softmax(q k^T) v, between the two projections: qkv [B, T, (R + 2) K D] -> [B, T, H D]."""
        H, K, D = self.config.n_head, self.config.kv_heads, self.config.head_dim
        if cache is None and H == K and self.config.position == "learned":
            # Unsplit: attention writes its gradient in one piece too.
            return self.attention(qkv.unflatten(-1, (-1, 3, D)), samples, documents).flatten(-2)
        q, k, v = self.heads(qkv, positions if documents is None else documents.position_ids)
        if cache is not None:
            k, v = cache.append(self.index, k, v, self.attention.window)
        return self.attention((q, k, v), samples, documents).flatten(-2)

    def heads(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [B, T, (R + 2) K D], positions int64 [T] or [B, T] -> q [B, T, H, D], k and v [B, T, K, D].

        H and K count the heads of this rank.
        """
        R, D = self.config.n_head // self.config.kv_heads, self.config.head_dim
        K = qkv.shape[-1] // ((R + 2) * D)
        if self.config.position == "rope":
            theta = self.config.rope_theta
            return rope_qkv(qkv, positions, n_kv_head=K, head_dim=D, theta=theta, impl=self.forms.rope)
        q, k, v = qkv.unflatten(-1, (K, R + 2, D)).split((R, 1, 1), dim=3)
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)


class GPT(nn.Module):
    """The model, or a range of its blocks, with its initial weights; on the meta device with none.

    layers: the factory of its layers, whose seed is that of the weights too (by default plain layers).
    blocks: the global numbers of the blocks that live here (all of them by default).
    recompute: what the backward pass of every `recompute_every`-th block computes again (activation checkpointing): the
    whole block, of which only the input is kept ("full", Chen et al. 2016), or attention between its two matrix
    products ("selective", Korthikanti et al. 2022, section 5).
    labels: rows of the head of a classifier, which stands in the place of the vocabulary's.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: DenseLayers | None = None,
        blocks: range | None = None,
        recompute: Recompute = "none",
        recompute_every: int = 1,
        labels: int | None = None,
    ) -> None:
        super().__init__()
        C, layers = config.d_model, layers or DenseLayers()
        self.config, self.forms = config, layers.forms
        self.embedding = layers.embedding(config.vocab_size, C)
        if config.position == "learned":
            self.position_table = layers.position_table(config.max_seq_len, C)
        self.embedding_dropout = layers.dropout(config.dropout, EMBEDDING_SITE)
        self.blocks = nn.ModuleDict()
        for i in blocks or range(config.n_layer):
            self.blocks[str(i)] = Block(config, layers, i, "none" if i % recompute_every else recompute)
        self.norm = layers.norm(config.norm, C, bias=config.bias, eps=config.norm_eps)
        tied = self.embedding if config.tie_embeddings and labels is None else None
        self.head = layers.lm_head(C, labels or config.vocab_size, tied)
        init_weights(self, config, layers.seed)

    def states(
        self, tokens: Tensor, positions: Tensor, samples: Tensor, documents: Documents | None, cache: KVCache | None
    ) -> Tensor:
        """What the head reads, [B, T, C]; the arguments are those of `forward`."""
        x = self.embedding(tokens)
        if self.config.position == "learned":
            x = x + self.position_table(positions if documents is None else documents.position_ids)
        x = self.embedding_dropout(x, samples, positions)
        if documents is not None:
            bounds = document_bounds(documents.cu_seqlens, *tokens.shape, impl=self.forms.attention_impl)
            documents = documents._replace(bounds=bounds)
        for block in cast("Iterable[Block]", self.blocks.values()):
            full = block.recompute == "full" and self.training
            x = recomputed(full, block, x, positions, samples, documents, cache)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        samples: Tensor | None = None,
        targets: Tensor | None = None,
        documents: Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits fp32 [B, T, V], or with `targets` the sum of their losses, fp32 [].

        tokens int64 [B, T]; positions int64 [T], in the row (None: from 0 on); samples int64 [B], global sample numbers
        that with the positions key the dropout masks (None: nothing is dropped); targets int64 [B, T], IGNORED_TARGET
        where not counted; documents: None where a row is one; cache: of the positions before these, not together with
        documents. Raises InputError where positions or samples are needed and not given.
        """
        if positions is None:
            require(cache is None, "a cache holds earlier positions; give the positions of these tokens, int64 [T]")
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        if samples is None:
            require(
                self.config.dropout == 0 or not self.training,
                "dropout masks are keyed by samples; give the rows' numbers in the training data, int64 [B]",
            )
            samples = torch.arange(len(tokens), device=tokens.device)
        return self.head(self.states(tokens, positions, samples, documents, cache), targets)
