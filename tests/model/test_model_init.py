"""A model built by hand: it has the initial weights of a run, drawn once, and never what lay in memory before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from drawn import sizes_drawn
from llm.config import ModelConfig, RunConfig
from llm.errors import InputError
from llm.model.cache import KVCache
from llm.model.gpt import GPT, Block
from llm.model.init import give_memory, initial_tensor
from llm.model.layers import DenseLayers
from llm.parallel.layers import TensorParallel, TensorParallelLayers

CONFIG = ModelConfig(n_layer=2, n_kv_head=2, d_model=32, vocab_size=51, max_seq_len=16, tie_embeddings=False)
PART = TensorParallel(rank=1, size=2, name="none")  # its vocabulary has a row of padding
FACTORIES = {"dense": DenseLayers(seed=7), "tensor-parallel": TensorParallelLayers(PART, seed=7)}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What is allocated and not filled is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def weight_sizes(model: nn.Module) -> list[int]:
    """Of the tensors that are drawn: the weights that are no vectors."""
    return sorted(p.numel() for p in model.parameters() if p.dim() == 2)


def test_a_model_on_one_line_has_the_weights_of_a_run() -> None:
    model = GPT(CONFIG)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_tensor(CONFIG, RunConfig().seed, name, tuple(parameter.shape))), name
    other = dict(GPT(CONFIG, DenseLayers(seed=7)).named_parameters())
    assert not torch.equal(model.embedding.weight, other["embedding.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_each_weight_is_drawn_once(tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    assert sizes_drawn(lambda: GPT(config)) == weight_sizes(GPT(config))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layers", FACTORIES.values(), ids=FACTORIES)
def test_nothing_is_what_lay_in_memory(layers: DenseLayers) -> None:
    """Of the layers on their own neither, which have no name to be drawn by."""
    alone = [layers.linear("qkv", 8, 8, bias=True), layers.linear("down", 8, 8, bias=True), layers.embedding(51, 8)]
    tables = [layers.position_table(8, 8), layers.lm_head(8, 51, None), Block(CONFIG, layers, 0)]
    for module in (*alone, *tables, GPT(CONFIG, layers)):
        for name, parameter in module.named_parameters():
            assert parameter.isfinite().all(), f"{name} of {module}"


def test_the_defaults_of_the_process_change_no_draw() -> None:
    expected = dict(GPT(CONFIG).named_parameters())
    torch.set_default_dtype(torch.float64)
    try:
        model = GPT(CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float64 and torch.equal(parameter, expected[name].double()), name


def test_on_the_meta_device_nothing_is_drawn_and_memory_can_be_given() -> None:
    def build() -> None:
        with torch.device("meta"):
            models.append(GPT(ModelConfig()))

    models: list[GPT] = []
    assert sizes_drawn(build) == []
    parameters = list(models[0].parameters())
    for parameter in parameters:
        assert parameter.is_meta
        give_memory(parameter, "cpu")
    assert all(given is parameter for given, parameter in zip(models[0].parameters(), parameters, strict=True))
    assert models[0].head.weight is models[0].embedding.weight
    assert all(not parameter.any() and parameter.slice.is_full for parameter in parameters)


def test_positions_and_samples_may_be_left_out() -> None:
    model, tokens = GPT(replace(CONFIG, dropout=0.1)), torch.arange(24).view(2, 12)
    with pytest.raises(InputError, match="dropout masks are keyed by samples"):
        model(tokens)
    dropped = model(tokens, samples=torch.arange(2))
    assert torch.equal(dropped, model(tokens, torch.arange(12), torch.arange(2)))
    model.eval()
    assert torch.equal(model(tokens), model(tokens, torch.arange(12), torch.arange(2)))
    with pytest.raises(InputError, match="give the positions of these tokens"):
        model(tokens, cache=KVCache(16))
