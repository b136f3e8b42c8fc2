"""Attention at its edges: soft-caps far from the scores, memory beyond the rows, and what calls share or pack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, assert_close, run

from chosen import slow_but
from kernels.attention import Strided, attention, attention_packed, document_bounds, op

FEATURES = {
    "documents": Case(2, 30, 30, 2, 1, 16, cuts=(20, 35, 35, 36)),
    "strided": Case(1, 140, 140, 1, 1, 16, sparse=Strided(64, 1, 2)),
    "decode": Case(1, 20, 40, 2, 1, 16, window=25),
    "all": Case(2, 30, 30, 2, 1, 16, window=20, cuts=(20, 35, 35, 36), softcap=2.0, dropout=True),
}
each_feature = pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("softcap", [0.05, 1.0, 1e3, 1e5, 1e30, 3e38])
def test_a_soft_cap_costs_no_digits(softcap: float, deterministic: bool) -> None:
    """Of scores far below it and far above: large caps leave them as they are, small ones their sign."""
    case = Case(1, 70, 70, 2, 1, 16, softcap=softcap, deterministic=deterministic)
    tensors, gradients = case.inputs()
    true = run(case, "reference", tensors, gradients, torch.float64)
    assert_close(run(case, "triton", tensors, gradients), true, 2e-6)


@each_feature
@pytest.mark.parametrize("deterministic", slow_but([False], [True, False]))
def test_memory_beyond_the_rows_is_never_read(deterministic: bool, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN until a kernel writes to it, the padding of rows too."""
    case = replace(case, deterministic=deterministic)
    tensors, gradients = case.inputs()
    before = run(case, "triton", tensors, gradients)
    empty = torch.empty
    nan = float("nan")
    monkeypatch.setattr(torch, "empty", lambda *a, **o: empty(*a, **o).fill_(nan if "float" in str(o["dtype"]) else -1))
    for mine, theirs in zip(run(case, "triton", tensors, gradients), before, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("case", [FEATURES["documents"], FEATURES["all"]], ids=["documents", "all"])
def test_calls_share_the_bounds_of_documents(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = case.inputs()
    options = case.options()
    alone = attention(*tensors, **options, impl="triton")
    bounds = document_bounds(options["cu_seqlens"], case.B, case.Tk, impl="triton")
    monkeypatch.setattr(op, "document_bounds_op", None)
    assert torch.equal(attention(*tensors, **options, bounds=bounds, impl="triton"), alone)
    assert document_bounds(options["cu_seqlens"], case.B, case.Tk) is None  # the other forms need none


@each_feature
@pytest.mark.parametrize("deterministic", slow_but([True], [True, False]))
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_one_tensor_of_heads_gives_the_same_bits(impl: str, deterministic: bool, case: Case) -> None:
    case = replace(case, K=case.H, Tq=case.Tk, deterministic=deterministic)
    tensors, (do, _) = case.inputs()
    options = case.options() | {"impl": impl, "deterministic": deterministic}
    leaves = [t.requires_grad_() for t in tensors]
    o = attention(*leaves, **options)
    split = torch.autograd.grad(o, leaves, do)
    qkv = torch.stack(tensors, 3).detach().requires_grad_()
    packed = attention_packed(qkv, **options)
    (dqkv,) = torch.autograd.grad(packed, qkv, do)
    assert torch.equal(packed, o)
    # Without an order of its sum dq may differ by chance.
    assert torch.equal(dqkv, torch.stack(split, 3)) or not deterministic
    torch.testing.assert_close(dqkv, torch.stack(split, 3))
