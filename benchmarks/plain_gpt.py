"""The tiny config's model in plain PyTorch, one process, for comparison: no DeepSpeed, no parallel layers, no Ingot.

usage: python -m benchmarks.plain_gpt TOKENS.bin STEPS      prints the seconds of each step as JSON
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, HEADS, WIDTH, FEED_FORWARD, VOCABULARY, T, BATCH = 4, 4, 128, 352, 1024, 128, 32


def rotary(x: Tensor) -> Tensor:
    """x [B, H, T, D]."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * FEED_FORWARD, bias=False)
        self.down = nn.Linear(FEED_FORWARD, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1))  # [B, T, 3, H, D]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T + 1] -> mean loss."""
        x = self.norm(self.blocks(self.embedding(tokens[:, :-1])))
        logits = F.linear(x, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main(path: str, steps: int) -> list[float]:
    """Seconds of each step."""
    data, rng = np.memmap(path, dtype=np.uint16, mode="r"), np.random.default_rng(0)
    model = PlainGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        starts = rng.integers(0, len(data) - T, BATCH)
        tokens = torch.from_numpy(np.stack([data[i : i + T + 1] for i in starts]).astype(np.int64))
        loss = model(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
