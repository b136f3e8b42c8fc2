"""Compiled normalisation on a GPU (`make test-gpu`), forward and backward."""

from __future__ import annotations

import pytest
import torch

from kernels.layer_norm import layer_norm
from rounding import DTYPES, GPU_ONLY, assert_within_rounding, run

pytestmark = GPU_ONLY


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("C", [16, 192, 760, 1024, 4096, 8192])
@pytest.mark.parametrize("rows", [1, 199, 8192])
def test_layer_norm(rows: int, C: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(rows, C, device="cuda").to(dtype) for _ in range(2))
    tensors = [x, (torch.rand(C, device="cuda") + 0.5).to(dtype)]
    if bias:
        tensors.append(torch.randn(C, device="cuda").to(dtype))

    def form(impl: str):
        return lambda *a: layer_norm(a[0], a[1], a[2] if bias else None, impl=impl)

    true = run(form("reference"), tensors, dy, torch.float64)
    plain = run(form("torch"), tensors, dy, dtype)
    assert_within_rounding(run(form("triton"), tensors, dy, dtype), plain, true, dtype)
