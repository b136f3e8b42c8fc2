"""Decoding on a CPU: what GPT.forward computes of one more token a row with a cache, at less cost.

Of a small model's step on a CPU, the checks and choices of the general path take the most; of a large one's, the
products of a few rows with the weights, for which oneDNN has a faster order of a weight than the parameter's.

Shapes: B rows, C model width, K key/value heads, R query heads for each, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rope import angles_of
from llm.model.cache import KVCache
from llm.model.gpt import GPT, Block
from llm.model.layers import CausalAttention, Embedding, LanguageModelHead, Linear, Norm

Product: TypeAlias = Callable[[Tensor], Tensor]
PACKED_FROM = 1 << 20  # elements of a weight; below, a call of oneDNN's costs more than its product saves


def fits(model: nn.Module) -> TypeGuard[GPT]:
    """Whether `Decoder` computes what the model does: a GPT of plain layers in fp32 on a CPU, in evaluation."""
    if not isinstance(model, GPT) or model.training:
        return False
    plain = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    plain &= type(model.head) is LanguageModelHead and type(model.embedding) is Embedding
    for block in cast("Iterable[Block]", model.blocks.values()):
        linears = block.qkv, block.attention_output, block.up, block.down
        attention = cast(CausalAttention, block.attention)
        plain &= all(type(linear) is Linear for linear in linears) and attention.sparse is None
        plain &= attention.softcap == 0 and attention.forms.attention in ("auto", "torch")
    return plain


def product(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """[rows, in] -> [rows, out]; weight [out, in]. For several rows a large weight is copied, into oneDNN's order."""
    if rows == 1 or weight.numel() < PACKED_FROM or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def normalised(norm: Norm) -> Product:
    """[..., C] -> [..., C] by the weights of a norm."""
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if norm.kind == "rmsnorm":
        return lambda x: F.rms_norm(x, weight.shape, weight, eps)
    return lambda x: F.layer_norm(x, weight.shape, weight, bias, eps)


def store_by_columns(model: GPT) -> None:
    """Let the weights [out, in] of linears lie in memory by columns: on a CPU one row is multiplied faster."""
    for module in model.modules():
        if type(module) is Linear:
            module.weight.data = module.weight.data.t().contiguous().t()


class Decoder:
    """Steps of one token a row, over a cache that GPT.forward has begun. The model is one that `fits`.

    For several rows its large weights are held twice, for as long as this object lives.
    """

    def __init__(self, model: GPT, cache: KVCache, rows: int) -> None:
        config = model.config
        self.cache, self.rows = cache, rows
        self.embedding = cast(Embedding, model.embedding).weight
        self.table = cast(Tensor, model.position_table.weight) if config.position == "learned" else None
        if self.table is None:
            like = self.embedding.new_empty(1, 1, config.head_dim)
            cos, sin = angles_of(like, torch.arange(cache.capacity), config.rope_theta)  # [capacity, D / 2]
            self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        self.blocks = [self._block(block) for block in cast("Iterable[Block]", model.blocks.values())]
        self.norm = normalised(cast(Norm, model.norm))
        self.head = product(cast(Tensor, model.head.weight), None, rows)

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        """Logits fp32 [B, V] after `tokens` int64 [B], which stand at `position`; their keys go into the cache."""
        x = F.embedding(tokens, self.embedding)
        if self.table is not None:
            x = x + self.table[position]
        for block in self.blocks:
            x = block(x, position)
        return self.head(self.norm(x))

    def _block(self, block: Block) -> Callable[[Tensor, int], Tensor]:
        config, cache, window = block.config, self.cache, block.attention.window
        K, D, R = config.kv_heads, config.head_dim, config.n_head // config.kv_heads
        linears = cast("list[Linear]", [block.qkv, block.attention_output, block.up, block.down])
        qkv, attention_output, up, down = (product(x.weight, x.bias, self.rows) for x in linears)
        norm_1, norm_2 = normalised(cast(Norm, block.norm_1)), normalised(cast(Norm, block.norm_2))

        def step(x: Tensor, position: int) -> Tensor:
            heads = qkv(norm_1(x)).view(-1, K, R + 2, D)
            if self.table is None:
                turned = heads[:, :, : R + 1]
                other = turned.roll(D // 2, -1)
                turned.mul_(self.cos[position]).addcmul_(other, self.sin[position])
            k, v = cache.append(block.index, heads[:, None, :, R], heads[:, None, :, R + 1], window)
            # The queries of a key/value head stand where positions do: all see every key.
            o = F.scaled_dot_product_attention(heads[:, :, :R], k.transpose(1, 2), v.transpose(1, 2))
            x = x + attention_output(o.reshape(x.shape[0], -1))
            return x + down(block.activation(up(norm_2(x)), impl=block.forms.activation))

        return step
