"""Every combination of the model's options against the formulas, written once more: float64, no kernels, no layers."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chosen import slow_but
from llm.config import ModelConfig
from llm.model.gpt import GPT
from llm.model.layers import DenseLayers

L, H, C, V, T, B = 2, 4, 32, 61, 12, 2
OPTIONS = {
    "position": ("learned", "rope"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
    "n_kv_head": (4, 2, 1),
    "tie_embeddings": (True, False),
    "bias": (True, False),
}
CASES = [dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values())]


def formula(w: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of tokens [B, T], one head at a time; w: the weights by name, float64."""
    D, R = C // H, H // config.kv_heads

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name: str, x: Tensor) -> Tensor:
        if config.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def rotated(x: Tensor) -> Tensor:
        """x [B, T, D] as D / 2 complex numbers, each turned by its frequency times the position."""
        if config.position == "learned":
            return x
        frequencies = config.rope_theta ** (-torch.arange(D // 2, dtype=torch.float64) * 2 / D)
        angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attention(i: int, x: Tensor) -> Tensor:
        rows, heads = linear(f"blocks.{i}.qkv", x).split(D, dim=-1), []
        future = torch.ones(T, T).triu(1).bool()
        for h in range(H):
            group = h // R * (R + 2)  # where the rows of its key/value head begin
            q, k, v = rows[group + h % R], rows[group + R], rows[group + R + 1]
            scores = rotated(q) @ rotated(k).mT / math.sqrt(D)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
        return linear(f"blocks.{i}.attention_output", torch.cat(heads, dim=-1))

    def feed_forward(i: int, x: Tensor) -> Tensor:
        x = linear(f"blocks.{i}.up", x)
        if config.activation == "gelu":
            x = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        else:
            x = x[..., 0::2] * x[..., 0::2].sigmoid() * x[..., 1::2]
        return linear(f"blocks.{i}.down", x)

    x = w["embedding.weight"][tokens]
    if config.position == "learned":
        x = x + w["position_table.weight"][:T]
    for i in range(L):
        x = x + attention(i, norm(f"blocks.{i}.norm_1", x))
        x = x + feed_forward(i, norm(f"blocks.{i}.norm_2", x))
    return norm("norm", x) @ w["embedding.weight" if config.tie_embeddings else "head.weight"].T


@pytest.mark.parametrize("options", slow_but(CASES[::5], CASES), ids=lambda case: "-".join(map(str, case.values())))
def test_formulas(options: dict) -> None:
    config = ModelConfig(n_layer=L, n_head=H, d_model=C, vocab_size=V, max_seq_len=T + 3, rope_theta=300.0, **options)
    model = GPT(config, DenseLayers(seed=0))
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, V, (B, T + 1), generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "qkv" in name else 0.05
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, scale, generator=generator)
    w = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected = formula(w, config, inputs)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    arguments = (inputs, torch.arange(T), torch.arange(B))
    with torch.no_grad():
        torch.testing.assert_close(model(*arguments).double(), expected.detach(), atol=2e-6, rtol=1e-6)
    found = model(*arguments, targets)
    found.backward()
    torch.testing.assert_close(found.detach().double(), loss.detach(), atol=0, rtol=1e-6)
    for name, parameter in model.named_parameters():
        found, expected = parameter.grad, w[name].grad
        assert found is not None and expected is not None, name
        error, size = (found.double() - expected).norm(), expected.norm()
        assert size > 0 and float(error / size) <= 5e-6, f"{name}: {float(error / size):.1e}"
