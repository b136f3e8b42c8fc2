"""What weight decay applies to, and AdamW against the paper's algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm.config import ModelConfig, OptimConfig, RunConfig
from llm.train.build import build_model
from llm.train.optim import adamw, decays, parameter_groups


def small_model(**model) -> nn.Module:
    return build_model(RunConfig(model=ModelConfig(n_layer=2, d_model=32, vocab_size=50, **model)), None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_matrices_decay_and_nothing_else(tied: bool, norm: str) -> None:
    model = small_model(tie_embeddings=tied, norm=norm, position="learned")
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    grouped = [id(p) for p in decayed["params"] + spared["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_the_decision_does_not_look_at_shapes() -> None:
    """Under ZeRO 3 every parameter is one-dimensional when the groups are made."""
    model = small_model(position="learned")
    before = [len(group["params"]) for group in parameter_groups(model, 0.1)]
    for parameter in model.parameters():
        parameter.data = torch.zeros(1)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == before


def test_groups_keep_the_model_s_order_and_leave_out_what_is_frozen_or_empty() -> None:
    model = small_model(bias=False)
    frozen = dict(model.named_parameters())["embedding.weight"].requires_grad_(False)
    named = {id(p): name for name, p in model.named_parameters()}
    decayed, _ = parameter_groups(model, 0.1)
    names = [named[id(p)] for p in decayed["params"]]
    assert names == [name for name in named.values() if decays(name) and name != "embedding.weight"]
    assert frozen is not None
    assert len(parameter_groups(nn.ModuleDict({"norm": nn.LayerNorm(3)}), 0.1)) == 1


def test_adamw_is_the_paper_s_algorithm_2() -> None:
    config = OptimConfig(lr=0.1, min_lr=0.0, betas=(0.8, 0.9), eps=1e-3)
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = adamw([{"params": [parameter], "weight_decay": 0.5}], config)
    x, m, v = start.clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for t in range(1, 6):
        grad = torch.sin(torch.arange(3) + t).double()
        parameter.grad = grad.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * grad
        v = 0.9 * v + 0.1 * grad**2
        step = m / (1 - 0.8**t) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        x = x - 0.1 * (step + 0.5 * x)
    torch.testing.assert_close(parameter.detach(), x, rtol=1e-12, atol=0)
