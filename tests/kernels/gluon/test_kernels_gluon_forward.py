"""Attention's forward pass in Gluon: its numbers and its synchronisation in the emulator, and who may ask for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_cases import KEY, SAMPLES, Case
from emulated import emulated as on_a_cpu
from torch import Tensor
from torch._subclasses import FakeTensorMode

import emulator
from kernels.attention import Strided, attention, attention_packed, attention_with_lse, document_bounds
from kernels.attention.gluon import launch as gluon
from kernels.attention.gluon.launch import Launch, described, forward_launch, layout_of
from kernels.attention.options import Options
from kernels.dispatch import KernelError, choose
from kernels.norm import layer_norm

N = gluon.N
BF16, FP16 = torch.bfloat16, torch.float16


def bounds_of(case: Case) -> Tensor | None:
    """document_bounds, in PyTorch."""
    cuts = case.options().get("cu_seqlens")
    if cuts is None:
        return None
    tokens = torch.arange(case.B * case.Tk, dtype=torch.int32)
    document, row = torch.searchsorted(cuts, tokens, right=True), tokens // case.Tk * case.Tk
    return torch.stack([cuts[document - 1] - row, cuts[document] - 1 - row]).view(2, case.B, case.Tk)


def emulated(
    q: Tensor, k: Tensor, v: Tensor, options: Options, bounds: Tensor | None, seeds: int = 1, **other: Any
) -> tuple[Tensor, Tensor]:
    """What `forward` returns, by the emulator, which finds nothing; other: arguments in place of the launch's own."""
    o = torch.full(q.shape, math.nan, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.nan)
    launch = forward_launch(q, k, v, o, lse, options, bounds)
    for seed in range(seeds):
        report = emulator.run(launch._replace(arguments=launch.arguments | other), seed)
        assert not report.findings, report
    return o, lse


def check(case: Case, dtype: torch.dtype, tensors: list[Tensor] | None = None, seeds: int = 1, **other: Any) -> None:
    q, k, v = tensors or case.inputs(dtype)[0]
    o, lse = emulated(q, k, v, Options(window=case.window), bounds_of(case), seeds, **other)
    options = case.options()
    true, true_lse = attention_with_lse(*(x.double() for x in (q, k, v)), impl="reference", **options)
    plain, _ = attention_with_lse(q, k, v, impl="reference", **options)
    # The rule of FlashAttention's tests: twice the error of one rounding, and the weights are rounded as well.
    allowed = 2 * (plain.double() - true).abs().max() + 2 * torch.finfo(dtype).eps * v.double().abs().max()
    assert (o.double() - true).abs().max() <= allowed
    torch.testing.assert_close(lse.double() * math.log(2), true_lse, rtol=1e-6, atol=2e-6)


def descriptor(x: Tensor, rows: int) -> Any:
    shape, strides, block, kind = layout_of(x.shape, x.stride(), x.dtype, rows)
    return kind(x, list(shape), list(strides), list(block))


DOCUMENTS = (0, 0, 1, 5, 130, 131, 131, 400, 500)  # empty ones, and some of length 1
CASES = {
    "one": Case(1, 1, 1, 1, 1, 64),
    "odd": Case(2, 37, 37, 2, 1, 128),
    "last-consumer-idle": Case(1, 140, 140, 1, 1, 64),
    "one-tile": Case(1, 128, 128, 1, 1, 64),
    "groups": Case(2, 333, 333, 6, 2, 64),
    "more-than-all-stages": Case(1, 10 * N - 1, 10 * N - 1, 1, 1, 64),
    "wide": Case(1, 6 * N + 65, 6 * N + 65, 2, 2, 128),
    "documents": Case(2, 333, 333, 2, 1, 64, cuts=DOCUMENTS),
    "window-of-one": Case(1, 200, 200, 1, 1, 128, window=1),
    "window": Case(1, 700, 700, 1, 1, 64, window=150),
    "window-of-all": Case(1, 150, 150, 1, 1, 64, window=1000),
    "window-and-documents": Case(2, 400, 400, 2, 1, 128, window=70, cuts=(3, 200, 399, 401, 700)),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_float64(name: str) -> None:
    check(CASES[name], FP16 if name in ("odd", "window") else BF16)


def test_no_schedule_changes_the_results() -> None:
    case = Case(1, 6 * N - 30, 6 * N - 30, 1, 1, 128)
    check(case, BF16, seeds=6)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_ring_of_any_size_neither_races_nor_waits_for_ever(stages: int) -> None:
    check(Case(1, 7 * N, 7 * N, 1, 1, 64, window=500), BF16, seeds=3, K_STAGES=stages, V_STAGES=stages)


@pytest.mark.parametrize("rows", [32, 64])
@pytest.mark.parametrize("cuts", [None, (77, 140)])
def test_rows_whose_first_tiles_are_hidden_get_no_nan(rows: int, cuts: tuple[int, ...] | None) -> None:
    """Tiles of keys that are shorter than a program's queries: the first ones hide all keys from the first consumer."""
    case = Case(1, 300, 300, 1, 1, 64, cuts=cuts)
    q, k, v = case.inputs(BF16)[0]
    check(case, BF16, [q, k, v], N=rows, k_desc=descriptor(k, rows), v_desc=descriptor(v, rows))


def test_large_scores() -> None:
    """Of which the lower ones lie far below the highest, and some are negative without any near zero."""
    case = Case(1, 300, 300, 1, 1, 64)
    q, k, v = case.inputs(BF16)[0]
    for scaled in (60 * q, -(q.abs() + 9) * 20):
        o, lse = emulated(scaled, k.abs(), v, Options(), None)
        assert o.isfinite().all() and lse.isfinite().all()
        check(case, BF16, [scaled, k.abs(), v])


def test_packed_and_strided_inputs_are_read_where_they_lie() -> None:
    case = Case(2, 150, 150, 2, 2, 64)
    qkv = torch.randn(2, 150, 2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    check(case, BF16, list(qkv.unbind(3)))
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs(BF16)[0]]
    assert all(described(x) is x for x in (*qkv.unbind(3), *transposed))
    check(case, BF16, transposed)


def test_what_tma_cannot_read_is_copied() -> None:
    x = torch.randn(2, 8, 3, 64).bfloat16()
    unaligned = torch.zeros(x.numel() + 1, dtype=BF16)[1:].view(x.shape).copy_(x)
    odd_rows = torch.zeros(2, 8, 3, 65, dtype=BF16)[..., :64].copy_(x)
    last_strided = torch.zeros(2, 8, 3, 128, dtype=BF16)[..., ::2].copy_(x)
    expanded = x[:, :, :1].expand(2, 8, 3, 64)
    for bad in (unaligned, odd_rows, last_strided, expanded):
        good = described(bad)
        assert good is not bad and torch.equal(good, bad) and good.is_contiguous() and good.data_ptr() % 16 == 0
    one = torch.zeros(2, 1, 1, 65, dtype=BF16).as_strided((2, 1, 1, 64), (64, 3, 5, 1))
    assert described(one) is one  # a stride of one step is never taken
    assert descriptor(one, 64).strides == [64, 64, 64, 1]


def test_longest_rows_start_first_and_heads_of_a_group_run_together() -> None:
    q, k = torch.zeros(1, 300, 4, 64, dtype=BF16), torch.zeros(1, 300, 2, 64, dtype=BF16)
    launch = forward_launch(q, k, k, q.clone(), torch.zeros(1, 4, 300), Options(), None)
    assert launch.grid == (3 * 4,) and launch.arguments["R"] == 2 and launch.arguments["section"] % 2 == 0
    trace = emulator.run(launch, 0).trace
    copies = Counter(event.cta for event in trace if event.lane == "copies" and event.label.startswith("stages"))
    assert [copies[cta] for cta in sorted(copies)] == [6] * 4 + [4] * 4 + [2] * 4  # of keys and of values


@pytest.fixture
def hopper() -> Iterator[None]:
    with on_a_cpu():
        yield


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], do: Tensor) -> list[Tensor]:
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


@pytest.mark.usefixtures("hopper")
def test_autograd_and_compile() -> None:
    case = Case(1, 70, 70, 2, 1, 64, window=40, cuts=(30,))
    tensors, (do, _) = case.inputs(BF16)
    leaves = [x.requires_grad_() for x in tensors]
    options = case.options()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, impl="gluon", **options)

    found = gradients(ours, leaves, do)
    true = gradients(
        lambda *x: attention(*x, impl="reference", **options),
        [x.detach().double().requires_grad_() for x in leaves],
        do,
    )
    for mine, right in zip(found, true, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=2e-2, atol=2e-2)
    compiled = gradients(torch.compile(ours, fullgraph=True, backend="aot_eager"), leaves, do)
    assert all(torch.equal(a, b) for a, b in zip(found, compiled, strict=True))
    bounds = document_bounds(options["cu_seqlens"], 1, 70, impl="gluon")
    o, lse = attention_with_lse(*leaves, impl="gluon", bounds=bounds, **options)
    assert torch.equal(o, found[0]) and lse.shape == (1, 2, 70)


@pytest.mark.usefixtures("hopper")
def test_packed_tensors_give_the_same_bits() -> None:
    qkv = torch.randn(1, 40, 2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    do = torch.ones(1, 40, 2, 64)
    o, packed = gradients(lambda x: attention_packed(x, impl="gluon"), [qkv], do)
    other, *apart = gradients(
        lambda *x: attention(*x, impl="gluon"), [x.detach().requires_grad_() for x in qkv.unbind(3)], do
    )
    assert torch.equal(o, other) and torch.equal(packed, torch.stack(apart, 3))


def ask(device: str = "cuda", dtype: torch.dtype = BF16, D: int = 64, queries: int = 32, **options: Any) -> Tensor:
    with FakeTensorMode():
        q, k = (torch.empty(2, T, 4, D, dtype=dtype, device=device) for T in (queries, 32))
        return attention(q, k, k, impl="gluon", **options)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (dict(device="cpu"), "found tensors on 'cpu', expected them on a Hopper GPU: use impl=auto"),
        (dict(dtype=torch.float32), "found torch.float32, expected bfloat16 or float16: use impl=auto or triton"),
        (dict(D=80), "found heads of width 80, expected 64 or 128"),
        (dict(queries=31), "found fewer queries than keys, which the Gluon form does not take"),
        (dict(softcap=3.0), "found softcap, which"),
        (dict(sparse=Strided(64, 1, 2)), "found a block-sparse pattern, which"),
        (dict(dropout=KEY, samples=SAMPLES[:2]), "found dropout, which"),
    ],
    ids=lambda x: next(iter(x), "") if isinstance(x, dict) else "",
)
def test_what_the_form_does_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert ask().shape == (2, 32, 4, 64)
    with pytest.raises(KernelError) as caught:
        ask(**asked)
    assert str(caught.value).startswith(f"attention with impl=gluon: {found}")


def test_other_gpus_other_operations_and_a_triton_without_gluon_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    with pytest.raises(KernelError, match=r"capability 10\.0, expected 9\.0 \(Hopper\): use impl=auto or triton"):
        ask()
    monkeypatch.setattr("kernels.attention.gluon.INSTALLED", False)
    with pytest.raises(KernelError, match=r"a Triton without Gluon, expected 3\.6 or later: install one, or use"):
        ask()
    x = torch.zeros(2, 8)
    with pytest.raises(KernelError, match="layer_norm with impl=gluon: found an operation that has no Gluon form"):
        layer_norm(x, x[0], x[0], impl="gluon")
    device: dict[str, Any] = {"device": torch.device("cuda"), "dtype": BF16}
    assert choose("auto", "attention", no_gluon=None, **device) == "triton"


def test_a_launch_names_its_arguments() -> None:
    q = torch.zeros(1, 5, 2, 64, dtype=BF16)
    launch = forward_launch(q, q, q, q.clone(), torch.zeros(1, 2, 5), Options(window=3), None)
    assert isinstance(launch, Launch) and (launch.grid, launch.num_warps) == ((2,), 4)
    assert launch.arguments["T"] == 5 and launch.arguments["window"] == 3 and launch.arguments["BOUNDED"] is True
    assert launch.arguments["k_desc"].block_shape == [1, 1, N, 64] and launch.arguments["starts_ptr"] is None
