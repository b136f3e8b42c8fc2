"""A GPT in plain PyTorch, for comparison: no DeepSpeed, no parallel layers, no Ingot.

One process, PyTorch's own layers, attention and fused AdamW; rotary positions from a table made once. As GPT-2 (learned
positions, layer norm, GELU, biases) or as Llama (rotary positions, RMS norm, SwiGLU).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    width: int
    feed_forward: int
    vocabulary: int
    length: int
    """T, the longest sequence."""
    llama: bool


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D]; cos, sin [T, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        C, bias, self.shape = shape.width, not shape.llama, shape
        self.norm_1, self.norm_2 = norm(shape), norm(shape)
        self.qkv, self.output = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.up = nn.Linear(C, shape.feed_forward * (2 if shape.llama else 1), bias=bias)
        self.down = nn.Linear(shape.feed_forward, C, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.shape.heads, -1))  # [B, T, 3, H, D]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if self.shape.llama:
            q, k = rotary(q, cos, sin).to(v.dtype), rotary(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        up = self.up(self.norm_2(x))
        if not self.shape.llama:
            return x + self.down(F.gelu(up, approximate="tanh"))
        gate, up = up.chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def norm(shape: Shape) -> nn.Module:
    return (nn.RMSNorm if shape.llama else nn.LayerNorm)(shape.width, eps=1e-5)


class PlainGPT(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = None if shape.llama else nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = norm(shape)
        half = shape.width // shape.heads // 2
        angles = torch.arange(shape.length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T + 1] -> mean loss."""
        T = tokens.shape[1] - 1
        x, cos, sin = self.embedding(tokens[:, :-1]), self.cos[:T], self.sin[:T]
        if self.positions is not None:
            x = x + self.positions.weight[:T]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def trainer(model: nn.Module, loss_of: Callable[[Tensor], Tensor], precision: str) -> Callable[[Tensor], Tensor]:
    """A function of int64 [B, T + 1] that makes a step and returns its loss, which may be still under way.

    precision: fp32, or bf16 by autocast, with fp32 weights.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
