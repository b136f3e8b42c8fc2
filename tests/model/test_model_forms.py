"""Attention by one backend of PyTorch's operator, on a CPU, which has the flash backend too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import attention
from llm.config import ModelConfig
from llm.model.forms import Forms, backend_attention
from llm.model.layers import DenseLayers, Documents


def inputs(kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 24, heads, 16, generator=generator).requires_grad_() for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_backend_computes_what_the_reference_does(kv_heads: int) -> None:
    qkv = inputs(kv_heads)
    ours, expected = backend_attention(*qkv, Forms("flash")), attention(*qkv, impl="reference")
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    gradients, wanted = (torch.autograd.grad(o, qkv, grad) for o in (ours, expected))
    torch.testing.assert_close(gradients, wanted)


def switches_during_backward(deterministic: bool) -> list[bool]:
    """Whether PyTorch's deterministic algorithms are on where the operator's backward pass reads what it has saved."""
    seen = list[bool]()

    def unpack(saved: Tensor) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return saved

    qkv = inputs(4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        o = backend_attention(*qkv, Forms("flash", deterministic=deterministic))
    o.sum().backward()
    return seen


def test_flash_sums_in_a_fixed_order_where_that_is_asked_for_and_nothing_else_does() -> None:
    on, off = switches_during_backward(True), switches_during_backward(False)
    assert on and all(on) and off and not any(off)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_switch_that_is_on_already_stays_on() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert all(switches_during_backward(True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_each_operation_has_a_form_of_its_own() -> None:
    forms = Forms(attention="flash", norm="reference", loss="torch", embedding="torch")
    layers, config = DenseLayers(forms=forms), ModelConfig()
    assert layers.norm("layernorm", 8, bias=True, eps=1e-5).impl == "reference"
    assert layers.add_norm("layernorm", 8, bias=True, eps=1e-5, p=0.0, site=0).impl == "reference"
    assert layers.lm_head(8, 9, None).impl == layers.embedding(9, 8).impl == "torch"
    qkv = inputs(4)
    module = layers.attention(config, 0, 0)
    assert torch.equal(module(qkv, torch.arange(2)), backend_attention(*qkv, forms))


def test_a_backend_without_the_options_of_the_call_is_refused() -> None:
    module, (q, k, v) = DenseLayers(forms=Forms(attention="flash")).attention(ModelConfig(), 0, 0), inputs(4)
    documents = Documents(torch.zeros(2, 24, dtype=torch.int64), torch.tensor([0, 5, 48], dtype=torch.int32))
    with pytest.raises(AssertionError, match="a backend has a causal mask alone"):
        module((q, k, v), torch.arange(2), documents)
    with pytest.raises(AssertionError, match="a backend has a causal mask alone"):
        module((q[:, -1:], k, v), torch.arange(2))
    dropping = DenseLayers(forms=Forms(attention="flash")).attention(replace(ModelConfig(), dropout=0.5), 0, 0)
    with pytest.raises(AssertionError, match="a backend has a causal mask alone"):
        dropping((q, k, v), torch.arange(2))


def test_one_form_for_every_operation() -> None:
    assert Forms.of("torch").adamw == Forms.of("torch").attention == "torch"
    assert Forms.of("auto") == Forms() and Forms.of("torch").deterministic is True
