"""Documents told apart in a row: each as if it were alone, with the dropout masks of its place in the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chosen import slow_but
from kernels.dispatch import KernelError
from llm.config import ModelConfig
from llm.model.cache import KVCache
from llm.model.forms import Forms
from llm.model.gpt import GPT, Recompute
from llm.model.init import init_weights
from llm.model.layers import DenseLayers, Documents

# Of the documents in each row of 24 tokens: a whole row, one token, many. An empty document changes nothing.
LENGTHS = [[24], [1, 7, 16], [5, 1, 1, 0, 17], [12, 12]]
VARIANTS = {
    "learned": dict(position="learned"),
    "learned-untied": dict(position="learned", tie_embeddings=False, n_kv_head=1),
    "rope": dict(position="rope", activation="swiglu", norm="rmsnorm", bias=False, n_kv_head=2),
}


def build(recompute: Recompute = "none", impl: str = "auto", **fields) -> GPT:
    config = ModelConfig(**{"n_layer": 2, "d_model": 64, "vocab_size": 512, "max_seq_len": 24, **fields})
    model = GPT(config, DenseLayers(seed=7, forms=Forms.of(impl)), recompute=recompute)
    init_weights(model, config, 3)
    with torch.no_grad():  # so that attention is far from uniform, and a token that is seen is felt
        for block in model.blocks.values():
            block.qkv.weight.mul_(20)
    return model


def packed() -> tuple[Tensor, Tensor, Tensor, Tensor, Documents]:
    """The arguments of a forward pass over all rows."""
    rows, T = len(LENGTHS), sum(LENGTHS[0])
    tokens = torch.randint(0, 512, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    ends = torch.tensor([n for lengths in LENGTHS for n in lengths]).cumsum(0)
    cu_seqlens = torch.cat([torch.zeros(1), ends]).to(torch.int32)
    samples = torch.arange(100, 100 + rows)
    return tokens[:, :-1], torch.arange(T), samples, tokens[:, 1:], Documents(position_ids, cu_seqlens)


def alone() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The arguments of a forward pass over each document, in order, without document masks."""
    tokens, _, samples, targets, _ = packed()
    pieces = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for n in filter(None, lengths):
            cut = (slice(row, row + 1), slice(start, start + n))
            pieces.append((tokens[cut], torch.arange(n), samples[row : row + 1], targets[cut]))
            start += n
    return pieces


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CASES = [(name, impl) for name in VARIANTS for impl in ("torch", "reference", "triton")]
FAST = [case for case in CASES if case[1] != "triton"]


@torch.no_grad()
@pytest.mark.parametrize(("name", "impl"), slow_but(FAST, CASES, several=True))
def test_logits_are_those_of_each_document_alone(name: str, impl: str) -> None:
    model = build(impl=impl, **VARIANTS[name])
    tokens, positions, samples, _, documents = packed()
    together = model(tokens, positions, samples, documents=documents)
    apart = torch.cat([model(*arguments[:3])[0] for arguments in alone()])
    torch.testing.assert_close(together.flatten(0, 1), apart, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(together, model(tokens, positions, samples), atol=1e-2), "no document is masked"


@torch.no_grad()
def test_queries_and_keys_turn_by_the_place_in_the_document() -> None:
    """Attention sees only their distance: logits would not show that a row's positions were taken."""
    model = build(**VARIANTS["rope"])
    turned: list[tuple[Tensor, Tensor]] = []
    model.blocks["0"].attention.register_forward_pre_hook(lambda module, inputs: turned.append(inputs[0][:2]))
    tokens, positions, samples, _, documents = packed()
    for arguments in alone():
        model(*arguments[:3])
    apart = [torch.cat([x[0] for x in found]) for found in zip(*turned, strict=True)]
    turned.clear()
    model(tokens, positions, samples, documents=documents)
    for found, expected in zip(turned[0], apart, strict=True):
        torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_each_document_alone(name: str, recompute: Recompute) -> None:
    together, apart = build(recompute, **VARIANTS[name]), build(**VARIANTS[name])
    loss = together(*packed())
    loss.backward()
    total = torch.zeros(())
    for arguments in alone():
        part = apart(*arguments)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-6, atol=0)
    expected = gradients(apart)
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, found in gradients(together).items():
        assert (found - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7 * whole, name


def test_one_document_per_row_changes_nothing() -> None:
    for variant in VARIANTS.values():
        tokens, positions, samples, targets, _ = packed()
        B, T = tokens.shape
        rows = Documents(positions.expand(B, T).contiguous(), torch.arange(0, B * T + 1, T, dtype=torch.int32))
        models = build(dropout=0.2, **variant), build(dropout=0.2, **variant)
        for model, documents in zip(models, (None, rows), strict=True):
            model(tokens, positions, samples, targets, documents).backward()
        expected = gradients(models[0])
        for name, found in gradients(models[1]).items():
            torch.testing.assert_close(found, expected[name], msg=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_dropout_masks_go_by_the_place_in_the_row(name: str) -> None:
    """Documents change nowhere what of the stream is dropped."""
    model = build(dropout=0.3, **VARIANTS[name])
    tokens, positions, samples, _, documents = packed()
    dropped: list[Tensor] = []
    model.embedding_dropout.register_forward_hook(lambda module, inputs, y: dropped.append(y == 0))
    for block in model.blocks.values():
        block.down_dropout.register_forward_hook(
            lambda module, inputs, kwargs, y: dropped.append(y == kwargs["residual"]), with_kwargs=True
        )
    model(tokens, positions, samples)
    without, dropped[:] = list(dropped), []
    model(tokens, positions, samples, documents=documents)
    assert len(without) == 3
    for before, after in zip(without, dropped, strict=True):
        assert torch.equal(before, after)
        assert 0.2 < before.float().mean() < 0.4


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_with_dropout_changes_nothing(recompute: Recompute) -> None:
    kept, again = build(dropout=0.2), build(recompute, dropout=0.2)
    for model in (kept, again):
        model(*packed()).backward()
    for name, gradient in gradients(kept).items():
        assert torch.equal(gradient, gradients(again)[name]), name


def test_a_cache_knows_no_documents() -> None:
    tokens, positions, samples, _, documents = packed()
    model, cache = build(), KVCache(24)
    model(tokens[:, :12], positions[:12], samples, cache=cache)
    later = documents._replace(position_ids=documents.position_ids[:, 12:])
    with pytest.raises(KernelError, match="as many queries as keys"):
        model(tokens[:, 12:], positions[12:], samples, documents=later, cache=cache)
