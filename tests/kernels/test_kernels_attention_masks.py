"""What a query may see: windows, documents, block-sparse patterns, softcap and dropout, alone and together, in the
kernels against the reference in float64, forward, log-sum and backward.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import SAMPLES, Case, assert_close, drawn, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chosen import slow_but
from kernels import plan
from kernels.attention import (
    Strided,
    attention,
    attention_with_lse,
    problem,
    tiles,
)
from kernels.attention.documents import document_bounds_op
from kernels.attention.op import attention_op
from kernels.attention.reference import visible
from kernels.philox import DropoutKey


def check(case: Case) -> None:
    tensors, gradients = case.inputs()
    true = run(case, "reference", tensors, gradients, torch.float64)
    assert_close(run(case, "triton", tensors, gradients), true)


# Tiles are 16 to 128 wide: lengths, windows and documents end on them, beside them and far from them.
CASES = {
    "odd": Case(1, 131, 131, 1, 1, 40),
    "one token": Case(2, 1, 1, 3, 1, 80),
    "decode one": Case(1, 1, 77, 4, 2, 96),
    "decode some": Case(1, 35, 130, 1, 1, 16),
    "width 256": Case(1, 37, 37, 1, 1, 256),
    "window 1": Case(1, 70, 70, 1, 1, 16, window=1),
    "window 2": Case(1, 66, 66, 1, 1, 40, window=2),
    "window on a tile": Case(1, 140, 140, 2, 1, 32, window=64),
    "window beside a tile": Case(1, 140, 140, 1, 1, 16, window=65),
    "window short of a tile": Case(1, 140, 140, 1, 1, 16, window=125),
    "window over all": Case(1, 70, 70, 1, 1, 24, window=1000),
    "window, decode one": Case(2, 1, 150, 2, 1, 16, window=40),
    "window, decode some": Case(1, 70, 150, 1, 1, 16, window=33),
    "documents": Case(1, 170, 170, 1, 1, 16, cuts=(1, 1, 1, 2, 64, 100, 129, 169)),
    "documents over rows": Case(3, 40, 40, 2, 1, 40, cuts=(20, 60, 60, 119)),
    "one document": Case(2, 65, 65, 1, 1, 16, cuts=()),
    "every token a document": Case(1, 67, 67, 1, 1, 16, cuts=tuple(range(1, 67))),
    "empty documents at the ends": Case(1, 40, 40, 1, 1, 16, cuts=(0, 0, 17, 40, 40)),
    "softcap": Case(1, 70, 70, 1, 1, 40, softcap=2.0),
    "softcap, sharp": Case(1, 40, 40, 1, 1, 16, softcap=0.3),
    "softcap, wide": Case(1, 40, 40, 1, 1, 64, softcap=50.0),
    "softcap, decode one": Case(1, 1, 70, 4, 2, 16, softcap=2.0),
    "strided": Case(1, 330, 330, 1, 1, 16, sparse=Strided(64, 1, 3)),
    "strided, local": Case(1, 270, 270, 1, 1, 16, sparse=Strided(64, 2, 4)),
    "strided, dense": Case(1, 140, 140, 1, 1, 16, sparse=Strided(64, 1, 1)),
    "strided, blocks alone": Case(1, 140, 140, 1, 1, 16, sparse=Strided(64, 1, 100)),
    "strided, wide blocks": Case(1, 290, 290, 1, 1, 16, sparse=Strided(128, 1, 2)),
    "strided, odd blocks": Case(1, 390, 390, 1, 1, 16, sparse=Strided(192, 1, 2)),
    "strided, decode some": Case(1, 70, 280, 2, 1, 16, sparse=Strided(64, 1, 2)),
    "strided, decode one": Case(1, 1, 270, 1, 1, 16, sparse=Strided(64, 1, 3)),
    "atomic": Case(1, 100, 100, 2, 1, 16, deterministic=False),
    "atomic, window, softcap": Case(1, 100, 100, 1, 1, 40, window=30, softcap=2.0, deterministic=False),
    "atomic, documents, dropout": Case(2, 40, 40, 1, 1, 16, cuts=(20, 45), dropout=True, deterministic=False),
    "atomic, strided": Case(1, 200, 200, 1, 1, 16, sparse=Strided(64, 1, 2), deterministic=False),
    "atomic, decode some": Case(1, 35, 100, 1, 1, 16, deterministic=False),
    "window, documents": Case(2, 75, 75, 1, 1, 16, window=20, cuts=(30, 70, 82)),
    "window, softcap, dropout": Case(1, 75, 75, 2, 1, 16, window=40, softcap=3.0, dropout=True),
    "strided, softcap, dropout": Case(1, 200, 200, 1, 1, 16, sparse=Strided(64, 1, 2), softcap=2.0, dropout=True),
    "all": Case(2, 70, 70, 2, 1, 40, window=33, cuts=(1, 60, 90), softcap=5.0, dropout=True),
    "all, decode some": Case(1, 40, 100, 1, 1, 16, window=70, softcap=5.0, dropout=True),
}
# One of each feature, for what does not depend on the sizes.
FEATURES = {
    "plain": Case(1, 40, 40, 2, 1, 16),
    "window": Case(1, 40, 40, 2, 1, 16, window=20),
    "documents": Case(2, 30, 30, 2, 1, 16, cuts=(20, 35, 35, 36)),
    "strided": Case(1, 140, 140, 1, 1, 16, sparse=Strided(64, 1, 2)),
    "softcap": Case(1, 40, 40, 2, 1, 16, softcap=2.0),
    "decode": Case(1, 20, 40, 2, 1, 16, window=25),
    "all": Case(2, 30, 30, 2, 1, 16, window=20, cuts=(20, 35, 35, 36), softcap=2.0, dropout=True),
}
each_feature = pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES)
some_features = pytest.mark.parametrize("case", [FEATURES["decode"], FEATURES["all"]], ids=["decode", "all"])
WALKS = ["documents", "strided", "decode", "all"]  # whose tiles are found in different ways
each_walk = pytest.mark.parametrize("case", [FEATURES[name] for name in WALKS], ids=WALKS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_against_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("seed", range(1, 5))
def test_drawn_cases(seed: int) -> None:
    check(drawn(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 400))
def test_many_drawn_cases(seed: int) -> None:
    check(drawn(seed))


@each_feature
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_forms_of_pytorch_against_float64(impl: str, case: Case) -> None:
    tensors, gradients = case.inputs()
    true = run(case, "reference", tensors, gradients, torch.float64)
    assert_close(run(case, impl, tensors, gradients), true)
    copies = [t.requires_grad_() for t in tensors]
    o = attention(*copies, impl=impl, **case.options())
    torch.testing.assert_close(o.double(), true[0], rtol=2e-5, atol=2e-5)


@some_features
def test_attention_is_the_first_of_the_pair(case: Case) -> None:
    tensors, (do, dlse) = case.inputs()
    pair = run(case, "triton", tensors, (do, torch.zeros_like(dlse)))
    copies = [t.requires_grad_() for t in tensors]
    o = attention(*copies, impl="triton", **case.options())
    for mine, theirs in zip((o, *torch.autograd.grad(o, copies, do)), (pair[0], *pair[2:]), strict=True):
        assert torch.equal(mine, theirs)


@each_walk
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_gradient_of_the_log_sum_alone(deterministic: bool, case: Case) -> None:
    tensors, (_, dlse) = case.inputs()
    found = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        copies = [t.to(dtype).requires_grad_() for t in tensors]
        lse = attention_with_lse(*copies, impl=impl, deterministic=deterministic, **case.options())[1]
        gradients = torch.autograd.grad(lse, copies, dlse.to(dtype), materialize_grads=True)
        found.append([lse, lse, *gradients])
    assert found[0][0].dtype == torch.float32
    assert not found[0][4].any()  # the values are not in it
    assert_close(*found)


@each_feature
def test_gradients_are_slopes_of_the_reference(case: Case) -> None:
    """Central differences in float64 along random directions, which know nothing of autograd."""
    tensors, gradients = case.inputs()
    ours = run(case, "triton", tensors, gradients)[2:]
    directions = [torch.randn_like(t) for t in tensors]

    def value(step: float) -> Tensor:
        moved = [t.double() + step * d for t, d in zip(tensors, directions, strict=True)]
        outputs = attention_with_lse(*moved, impl="reference", **case.options())
        return sum(((o * g).sum() for o, g in zip(outputs, gradients, strict=True)), torch.zeros(()))

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    expected = sum((g.double() * d).sum() for g, d in zip(ours, directions, strict=True))
    torch.testing.assert_close(expected, slope, rtol=1e-4, atol=1e-3)


TILES = [tiles.Tile(16, 64, 4, 1), tiles.Tile(64, 16, 4, 1), tiles.Tile(32, 64, 4, 1)]


@each_walk
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}")
def test_tiles_change_only_the_rounding(tile: tiles.Tile, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER", tile)
    plan.made.cache_clear()
    check(case)


@pytest.mark.parametrize(
    ("name", "deterministic"),
    slow_but([("all", True), ("decode", False)], [("strided", True), ("all", True), ("decode", False)], several=True),
)
def test_bulk_copies_change_nothing(name: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(FEATURES[name], deterministic=deterministic)
    tensors, gradients = case.inputs()
    plan.made.cache_clear()  # of tests with other tiles
    pointers = run(case, "triton", tensors, gradients)
    descriptors = []
    describe = plan.TensorDescriptor
    counted = partial(plan.Layout, kind=lambda *a: descriptors.append(a) or describe(*a))
    monkeypatch.setattr(problem, "Layout", counted)
    monkeypatch.setattr(tiles, "INTERPRETER", replace(tiles.INTERPRETER, tma=True))
    plan.made.cache_clear()
    bulk = run(case, "triton", tensors, gradients)
    assert len(descriptors) == (11 if deterministic else 7)  # three in the forward pass, four in each of the backward's
    for mine, theirs in zip(bulk, pointers, strict=True):
        assert torch.equal(mine, theirs)


def run_as_they_lie(case: Case, views: list[Tensor], gradients: tuple[Tensor, Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in views]
    outputs = attention_with_lse(*leaves, impl="triton", deterministic=case.deterministic, **case.options())
    return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


def plain(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """Attention with every step in the dtype of q: what rounding alone costs."""
    k, v = (t.repeat_interleave(case.H // case.K, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / case.D**0.5
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    seen = visible(case.B, case.Tq, case.Tk, case.window, case.sparse, case.options().get("cu_seqlens"), q.device)
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize(("dtype", "deterministic"), [(torch.bfloat16, True), (torch.float16, False)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 70, 70, 1, 1, 40, window=30, softcap=3.0),
        Case(2, 40, 40, 1, 1, 16, cuts=(20, 55)),
        Case(1, 140, 140, 1, 1, 16, sparse=Strided(64, 1, 2)),
    ],
    ids=["window, softcap", "documents", "strided"],
)
def test_16_bit(case: Case, deterministic: bool, dtype: torch.dtype) -> None:
    """Within twice the error of plain PyTorch in the same dtype (the rule of FlashAttention's tests)."""
    case = replace(case, deterministic=deterministic)
    tensors, (do, dlse) = case.inputs(dtype)
    silent = (do, torch.zeros_like(dlse))
    true = run(case, "reference", tensors, silent, torch.float64)
    ours = run(case, "triton", tensors, silent)
    assert ours[1].dtype == torch.float32
    torch.testing.assert_close(ours[1].double(), true[1], rtol=1e-5, atol=1e-5)
    copies = [t.requires_grad_() for t in tensors]
    o = plain(*copies, case)
    stock = [o, *torch.autograd.grad(o, copies, do)]
    for mine, theirs, exact in zip([ours[0], *ours[2:]], stock, [true[0], *true[2:]], strict=True):
        assert mine.dtype == dtype
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


@some_features
def test_strides_change_nothing(case: Case) -> None:
    tensors, (do, dlse) = case.inputs()
    true = run(case, "triton", tensors, (do, dlse))
    q, k, v = tensors
    wide = [torch.cat([t, t], 2)[:, :, : t.shape[2]] for t in (q, k, v)]  # heads beside others
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    views = [wide, heads_first]
    if case.Tq == case.Tk:
        views.append(list(torch.cat([q, k, v], 2).split([case.H, case.K, case.K], 2)))  # one projection
    late = (do.transpose(0, 3).contiguous().transpose(0, 3), dlse.transpose(1, 2).contiguous().transpose(1, 2))
    for view in views:
        leaves = [t.detach().requires_grad_() for t in view]
        assert not leaves[0].is_contiguous() or case.Tq == 1
        for mine, theirs in zip(run_as_they_lie(case, leaves, late), true, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("deterministic", [True, False])
def test_expanded_gradients(deterministic: bool) -> None:
    case = Case(2, 20, 20, 2, 1, 16, window=9, deterministic=deterministic)
    tensors, _ = case.inputs()
    for do, dlse in (
        (torch.tensor(0.5).expand(2, 20, 2, 16), torch.tensor(2.0).expand(2, 2, 20)),
        (torch.randn(2, 1, 2, 16).expand(2, 20, 2, 16), torch.randn(2, 1, 20).expand(2, 2, 20)),
    ):
        true = run(case, "reference", tensors, (do, dlse), torch.float64)
        assert_close(run(case, "triton", tensors, (do, dlse)), true)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of masked scores
def test_documents_do_not_touch_each_other() -> None:
    """Another document's tokens may hold anything: not a bit of this one's results moves."""
    case = Case(2, 75, 75, 1, 1, 16, cuts=(37, 70, 100))
    tensors, (do, dlse) = case.inputs()
    before = run(case, "triton", tensors, (do, dlse))
    flat = [t.reshape(150, -1).clone() for t in (*tensors, do)]
    for t in flat:
        t[37:70] = 1e4 * torch.randn(33, t.shape[1])
    moved = [t.view_as(x) for t, x in zip(flat, (*tensors, do), strict=True)]
    after = run(case, "triton", moved[:3], (moved[3], dlse))
    kept = torch.ones(150, dtype=torch.bool)
    kept[37:70] = False
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), before, after, strict=True):
        a, b = ((t.transpose(1, 2) if name == "lse" else t).reshape(150, -1)[kept] for t in (a, b))
        assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of masked scores
@pytest.mark.parametrize("case", ["window", "strided"])
def test_unseen_keys_do_not_matter(case: str) -> None:
    """Keys that a query does not see may hold anything: not a bit of its results moves."""
    case_of = {"window": Case(1, 120, 120, 1, 1, 16, window=30), "strided": CASES["strided, local"]}[case]
    tensors, gradients = case_of.inputs()
    before = run(case_of, "triton", tensors, gradients)
    seen = visible(1, case_of.Tq, case_of.Tk, case_of.window, case_of.sparse, None, tensors[0].device)[0]
    query = 3 * case_of.Tq // 4
    q, k, v = (t.clone() for t in tensors)
    k[:, ~seen[query]] = 1e3
    v[:, ~seen[query]] = 1e3
    o, lse, dq, _, _ = run(case_of, "triton", [q, k, v], gradients)
    assert torch.equal(o[:, query], before[0][:, query])
    assert torch.equal(lse[..., query], before[1][..., query])
    assert torch.equal(dq[:, query], before[2][:, query])


def test_packed_documents_are_those_alone() -> None:
    case = Case(1, 110, 110, 1, 1, 16, window=40, cuts=(37, 37, 38, 101))
    tensors, gradients = case.inputs()
    packed = run(case, "triton", tensors, gradients)
    for low, high in pairwise((0, 37, 38, 101, 110)):
        alone = Case(1, high - low, high - low, 1, 1, 16, window=40)
        part = run(
            alone, "triton", [t[:, low:high] for t in tensors], (gradients[0][:, low:high], gradients[1][..., low:high])
        )
        parts = [t[..., low:high] if t.dim() == 3 else t[:, low:high] for t in packed]
        assert_close(part, parts, 1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of masked scores
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("far_below", [False, True])
def test_large_scores_stay_finite(far_below: bool, softcap: float) -> None:
    """Far below zero too, where a row's first tile may hold no key that it sees."""
    case = Case(1, 80, 80, 1, 1, 16, window=25, softcap=softcap)
    (q, k, v), gradients = case.inputs()
    tensors = [300 * q.abs(), -k.abs(), v] if far_below else [300 * q, k, v]
    true = run(case, "reference", tensors, gradients, torch.float64)
    assert_close(run(case, "triton", tensors, gradients), true, 2e-3)


def test_compiles_whole_and_recomputes() -> None:
    chosen = FEATURES["all"]
    tensors, gradients = chosen.inputs()
    options = chosen.options()

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_lse(q, k, v, impl="triton", **options)

    eager = run(chosen, "triton", tensors, gradients)
    for form in (
        torch.compile(function, fullgraph=True, backend="aot_eager"),
        lambda *a: checkpoint(function, *a, use_reentrant=False),
        lambda *a: checkpoint(function, *a, use_reentrant=True),
    ):
        copies = [t.detach().requires_grad_() for t in tensors]
        outputs: Any = form(*copies)
        torch.autograd.backward(outputs, gradients)
        for mine, theirs in zip((*outputs, *(c.grad for c in copies)), eager, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("name", "deterministic"), slow_but([("strided", False)], [("all", True), ("strided", False)], several=True)
)
def test_opcheck(name: str, deterministic: bool) -> None:
    tensors, _ = FEATURES[name].inputs()
    leaves = [t[:, :20].detach().requires_grad_() for t in tensors]
    cu_seqlens = torch.tensor([0, 15, 15, 40], dtype=torch.int32)
    torch.library.opcheck(document_bounds_op, (cu_seqlens, 2, 20))
    given: dict[str, tuple[Any, ...]] = {
        "all": (SAMPLES[:2], document_bounds_op(cu_seqlens, 2, 20), 9, [], 2.0, 0.3, 1, 2, 3),
        "strided": (None, None, 0, [64, 1, 2], 0.0, 0.0, 0, 0, 0),
    }
    torch.library.opcheck(attention_op, (*leaves, *given[name], deterministic))
    qkv = leaves[0].detach()[:, :, :, None].repeat(1, 1, 1, 3, 1).requires_grad_()
    torch.library.opcheck(attention_op, (qkv, None, None, *given[name], deterministic))


OTHER_NUMBERS: dict[str, list[dict[str, Any]]] = {
    "window": [{"window": n} for n in (3, 4, 5)],
    "softcap": [{"softcap": c} for c in (3.0, 4.0, 5.0)],
    "strided": [{"sparse": Strided(64 * n, n, n)} for n in (1, 2, 3)],
    "documents": [{"cu_seqlens": torch.arange(0, 9, 8 // n, dtype=torch.int32)} for n in (1, 2, 4)],
    "dropout": [
        {"dropout": DropoutKey(n / 10, n, n), "samples": SAMPLES[:1], "head_offset": n} for n in (1, 2, 3)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_compiles_whole_for_other_numbers(name: str) -> None:
    """Layers of a model share their code but not their numbers, which a second compilation makes symbols."""
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for length, options in zip((8, 8, 9 if name == "window" else 8), OTHER_NUMBERS[name], strict=True):
        (q, k, v), _ = Case(1, length, length, 2, 1, 16).inputs()
        assert torch.equal(compiled(q, k, v, impl="triton", **options), attention(q, k, v, impl="triton", **options))
