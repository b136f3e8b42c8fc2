"""Compiled AdamW on a GPU (`make test-gpu`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adamw import BLOCK, adamw_
from llm.config import OptimConfig
from llm.train.optim import adamw
from rounding import DTYPES, GPU_ONLY, assert_repeats, assert_within_rounding

pytestmark = GPU_ONLY
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def tensors(n: int, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    """Parameter, gradient and moments."""
    torch.manual_seed(0)
    p, g, m, v = (torch.randn(n, device=device) for _ in range(4))
    return [t.to(dtype) for t in (p, g, m * 0.1, v.abs() * 0.1)]


def updated(given: list[Tensor], impl: str, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """Parameter and moments after one update."""
    p, g, m, v = (t.to(dtype or t.dtype, copy=True) for t in given)
    adamw_(p, g, m, v, impl=impl, **{**OPTIONS, "step": 1, **options})  # pyright: ignore[reportCallIssue]
    return [p, m, v]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 10, 100_000])
@pytest.mark.parametrize("n", [1, 1023, 5 * BLOCK, 1_000_003])
def test_adamw(n: int, step: int, dtype: torch.dtype) -> None:
    given = tensors(n, dtype)
    true = updated(given, "reference", torch.float64, step=step)
    plain = updated(given, "torch", step=step)
    assert_within_rounding(updated(given, "triton", step=step), plain, true, dtype)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [None, 2**32 - 5])
def test_scaled_16_bit_gradient_and_copy(seed: int | None, low: torch.dtype) -> None:
    p, g, m, v = tensors(300_001, torch.float32)
    given = [p, g.to(low), m, v]
    results = []
    for impl, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        copy = torch.empty(len(p), dtype=low, device="cuda")
        options = {"low_precision": copy, "step": torch.full((), 5.0, device="cuda")}
        options["grad_scale"] = torch.full((), 0.3, device="cuda")
        results.append([*updated(given, impl, dtype, **options), copy])
    assert_within_rounding(results[0][:3], results[1][:3], results[2][:3], torch.float32)
    assert torch.equal(results[0][3], results[0][0].to(low))
    if seed is not None:
        copies = [torch.empty(len(p), dtype=low, device="cuda") for _ in range(2)]
        for copy, impl in zip(copies, ("triton", "reference"), strict=True):
            updated(given, impl, lr=0.0, low_precision=copy, seed=seed)
        assert torch.equal(*copies)


def test_adamw_gives_the_same_bits_every_time() -> None:
    given = tensors(100_003, torch.bfloat16)
    assert_repeats(lambda: updated(given, "triton", seed=3))


def test_more_than_2_31_elements() -> None:
    n = 2**31 + 5
    p, g, m, v = (torch.full((n,), x, dtype=torch.bfloat16, device="cuda") for x in (1.0, 0.5, 0.0, 0.0))
    adamw_(p, g, m, v, step=1, impl="triton", **{**OPTIONS, "lr": 0.25})  # pyright: ignore[reportCallIssue]
    for part in (slice(0, 9), slice(n - 9, n)):
        torch.testing.assert_close(p[part].float(), torch.full((9,), 0.7256, device="cuda"), rtol=1e-2, atol=0)
    assert bool((p == p[0]).all())


def test_the_optimizer_follows_torch_s_through_checkpoints() -> None:
    start = [torch.randn(n, device="cuda") for n in (5, 1024, 70_001)]
    config = OptimConfig(lr=1e-2, min_lr=0.0)
    runs = []
    for impls in (("auto", "auto"), ("triton", "auto"), ("auto", "triton")):
        parameters, state = [torch.nn.Parameter(t.clone()) for t in start], None
        for half, impl in enumerate(impls):
            optimizer = adamw([{"params": parameters, "weight_decay": 0.1}], config, impl)
            if state is not None:
                optimizer.load_state_dict(state)
            for t in range(10 * half, 10 * half + 10):
                for parameter in parameters:
                    parameter.grad = (parameter.detach() * (t + 1)).sin()
                optimizer.step()
            state = optimizer.state_dict()
        runs.append(parameters)
    for run in runs[1:]:
        for mine, theirs in zip(run, runs[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_compiles_whole_and_runs_in_a_graph() -> None:
    given = tensors(5000, torch.float32)
    step = torch.full((), 3.0, device="cuda")
    eager = updated(given, "triton", step=step)
    compiled = torch.compile(lambda *a: adamw_(*a, step=step, **OPTIONS), fullgraph=True)
    copies = [t.clone() for t in given]
    compiled(*copies)
    captured = [t.clone() for t in given]
    adamw_(*(t.clone() for t in given), step=step, **OPTIONS)  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_(*captured, step=step, **OPTIONS)
    graph.replay()
    for results in (copies, captured):
        for mine, theirs in zip([results[0], *results[2:]], eager, strict=True):
            assert torch.equal(mine, theirs)
