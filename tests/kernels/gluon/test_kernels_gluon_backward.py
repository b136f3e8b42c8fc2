"""Attention's backward pass in Gluon: its numbers and its synchronisation in the emulator."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from attention_cases import Case, run
from emulated import emulated
from torch import Tensor

import emulator
from kernels.attention import document_bounds
from kernels.attention.backward import padded_length
from kernels.attention.gluon.backward import STAGES, TILE, backward, dkdv_launch, dq_launch
from kernels.attention.gluon.launch import Launch
from kernels.attention.options import LOG2_E, Options

BF16, FP16 = torch.bfloat16, torch.float16
DOCUMENTS = (0, 0, 1, 5, 130, 131, 131, 400, 500)  # empty ones, and some of length 1
CASES = {
    "one": Case(1, 1, 1, 1, 1, 64),
    "odd": Case(2, 37, 37, 2, 1, 128),
    "one-tile": Case(1, 64, 64, 1, 1, 128),
    "one-program": Case(1, 128, 128, 1, 1, 64),
    "groups": Case(1, 203, 203, 6, 2, 64),
    "more-than-all-stages": Case(1, (2 * STAGES + 2) * TILE - 1, (2 * STAGES + 2) * TILE - 1, 1, 1, 64),
    "wide": Case(1, 333, 333, 2, 1, 128),
    "documents": Case(2, 333, 333, 2, 1, 64, cuts=DOCUMENTS),
    "window-of-one": Case(1, 200, 200, 1, 1, 128, window=1),
    "window": Case(1, 700, 700, 1, 1, 64, window=150),
    "window-of-all": Case(1, 150, 150, 1, 1, 64, window=1000),
    "window-and-documents": Case(2, 400, 400, 2, 1, 128, window=70, cuts=(3, 200, 399, 401, 700)),
}


def found(
    case: Case, dtype: torch.dtype, strided: bool = False, packed: bool = False, dlse: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """(dq, dk, dv of `backward`, those of the reference in float64). strided: q, k, v lie in one tensor."""
    qkv, (do, gradient) = case.inputs(dtype)
    if not dlse:
        gradient.zero_()
    o, lse, *true = run(case, "reference", qkv, (do, gradient), torch.float64)
    options = case.options()
    bounds = None
    if case.cuts is not None:
        bounds = document_bounds(options["cu_seqlens"], case.B, case.Tk, impl="triton")
    q, k, v = torch.stack(qkv, 3).unbind(3) if strided else qkv
    saved = q, k, v, o.to(dtype), (lse * LOG2_E).float()
    results = backward(do, gradient / LOG2_E if dlse else None, *saved, Options(window=case.window), bounds, packed)
    return list(results[0].unbind(3)) if packed else results, true


def check(results: list[Tensor], true: list[Tensor]) -> None:
    """P, dS and the results are rounded once each, and so was o, from which delta comes."""
    for name, mine, exact in zip(("dq", "dk", "dv"), results, true, strict=True):
        error, allowed = (mine.double() - exact).abs().max(), torch.finfo(mine.dtype).eps * (0.5 + exact.abs().max())
        assert error <= allowed, f"{name}: off by {error:.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_float64(name: str) -> None:
    with emulated(seed=len(name)):
        check(*found(CASES[name], FP16 if name in ("odd", "window") else BF16, dlse=name != "wide"))


def test_no_schedule_changes_a_bit() -> None:
    case = Case(1, 250, 250, 2, 1, 64, window=240)
    first: list[Tensor] = []
    for seed in range(3):
        with emulated(seed):
            results, _ = found(case, BF16)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_packed_gradients_have_the_same_bits() -> None:
    case = Case(2, 70, 70, 2, 2, 64, cuts=(30, 100))
    with emulated():
        packed, apart, contiguous = (found(case, FP16, *form)[0] for form in ((True, True), (True, False), ()))
    assert packed[0].stride() == (70 * 2 * 3 * 64, 2 * 3 * 64, 3 * 64, 1) and apart[0].is_contiguous()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(packed, apart, contiguous, strict=True))


def launches(T: int, H: int, K: int, window: int | None = None) -> tuple[Launch, Launch]:
    """(of dkdv, of dq), on zeros."""
    q, k = (torch.zeros(1, T, heads, 64, dtype=BF16) for heads in (H, K))
    rows, given = torch.zeros(1, H, 2, padded_length(T)), (Options(window=window), None)
    dkdv = dkdv_launch(q, q, k, k, rows, k.clone(), k.clone(), *given)
    return dkdv, dq_launch(q, q, k, k, rows, q.clone(), *given)


@pytest.mark.parametrize(("kind", "stages"), [(0, 1), (0, 2), (0, 3), (1, 3)])
def test_a_ring_of_any_size_neither_races_nor_waits_for_ever(kind: int, stages: int) -> None:
    launch = launches(450, 2, 1, window=260)[kind]
    for seed in range(2):
        report = emulator.run(launch._replace(arguments=launch.arguments | {"STAGES": stages}), seed)
        assert not report.findings, report


def test_the_longest_start_first_and_leave_out_what_is_not_seen() -> None:
    """Products of each program's consumers: four of a tile of queries, three of a tile of keys."""
    expected = [[40, 32] * 2, [24, 16] * 2, [8, 0] * 2], [[15, 15] * 4, [9, 12] * 4, [3, 6] * 4]
    for launch, tiles in zip(launches(300, 4, 2), expected, strict=True):
        counts = [count for tile in tiles for count in tile]
        assert launch.grid == (len(counts) // 2,)
        done = Counter(event[:2] for event in emulator.run(launch, 0).trace if event.kind == "product")
        ctas = sorted({cta for cta, _ in done})
        assert [done[cta, f"consume {c} products"] for cta in ctas for c in range(2)] == counts
    assert launches(64, 6, 2)[1].arguments["section"] % 3 == 0  # heads that share keys run together
