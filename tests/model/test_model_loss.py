"""The model's loss against torch's cross entropy on whole logits: value, gradients, z-loss, ignored targets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import linear as linear_cross_entropy
from llm.config import ModelConfig
from llm.model.gpt import GPT
from llm.model.init import init_weights
from llm.model.layers import IGNORED_TARGET, DenseLayers, LanguageModelHead

C, V = 12, 37


def example(N: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Parameter, Tensor]:
    torch.manual_seed(0)
    x, weight, targets = torch.randn(N, C), torch.randn(V, C), torch.randint(0, V, (N,))
    targets[::5] = IGNORED_TARGET
    return x.to(dtype).requires_grad_(), nn.Parameter(weight.to(dtype)), targets


def reference(x: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    logits = F.linear(x, weight)
    z = logits.logsumexp(dim=-1)[targets != IGNORED_TARGET]
    summed = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED_TARGET)
    return summed + z_loss * z.square().sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("N", [1, 16, 17, 50])
def test_value_and_gradients(N: int, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CPU_CHUNK", 16)
    x, weight, targets = example(N)
    value = LanguageModelHead(weight, z_loss=z_loss)(x, targets)
    (value * 3).backward()
    a, b = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = reference(a, b, targets, z_loss)
    (expected * 3).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), a.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), b.grad, rtol=1e-5, atol=1e-4)


def test_low_precision_sums_the_weight_gradient_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks are no worse than one: in bf16 a sum of 64 products would lose the small ones."""
    x, weight, targets = example(1024, torch.bfloat16)
    exact = torch.autograd.grad(reference(x.double(), weight.double(), targets, 0.0), weight)[0].float()
    errors = []
    for tokens in (1024, 16):
        monkeypatch.setattr(linear_cross_entropy, "CPU_CHUNK", tokens)
        grad = torch.autograd.grad(LanguageModelHead(weight, z_loss=0.0)(x, targets), weight)[0]
        errors.append(float((grad.float() - exact).norm() / exact.norm()))
    assert errors[1] < 2 * errors[0] < 0.01


def test_nothing_is_counted() -> None:
    x, weight, targets = example(8)
    value = LanguageModelHead(weight, z_loss=1e-4)(x, torch.full_like(targets, IGNORED_TARGET))
    value.backward()
    assert value.item() == 0.0 and not x.grad.any() and not weight.grad.any()


def test_extreme_logits() -> None:
    x = torch.tensor([[1.0], [1.0], [0.0]])
    weight = torch.tensor([[1000.0], *[[0.0]] * 7])
    head = LanguageModelHead(nn.Parameter(weight), z_loss=0.0)
    losses = [head(x[i : i + 1], torch.tensor([t])).item() for i, t in enumerate((0, 3, 5))]
    assert losses == [0.0, 1000.0, pytest.approx(math.log(8))]


def test_z_loss_is_of_training_alone() -> None:
    config = ModelConfig(n_layer=1, d_model=32, vocab_size=64, max_seq_len=8)
    models = [GPT(config, DenseLayers(seed=0, z_loss=z)) for z in (0.0, 0.1)]
    tokens = torch.randint(0, 64, (2, 9))
    for model in models:
        init_weights(model, config, 0)
    training, validation = [], []
    for model in models:
        arguments = (tokens[:, :-1], torch.arange(8), torch.arange(2), tokens[:, 1:])
        training.append(float(model.train()(*arguments)))
        validation.append(float(model.eval()(*arguments)))
    assert validation[0] == validation[1]
    # log Z of an untrained model is ln V, to 1 %.
    assert training[1] - training[0] == pytest.approx(0.1 * 16 * math.log(64) ** 2, rel=0.02)
