"""Compiled dropout on a GPU (`make test-gpu`)."""

from __future__ import annotations

import pytest
import torch

from kernels import philox
from kernels.dropout import dropout
from kernels.philox import DropoutKey
from rounding import DTYPES, GPU_ONLY, assert_repeats

pytestmark = GPU_ONLY
KEY = DropoutKey(0.3, 2**32 - 5, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "C"), [(1, 1), (5, 7), (199, 1600), (1024, 768)])
def test_one_rounding_of_the_masked_sum(T: int, C: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(2, T, C, device="cuda").to(dtype) for _ in range(2))
    samples, positions = torch.tensor([2**40, 3], device="cuda"), torch.arange(T, device="cuda") + 5
    ours = dropout(x, KEY, samples, positions, residual=residual, impl="triton")
    exact = residual.double() + philox.dropout(x.double(), KEY, samples, positions)
    torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert_repeats(lambda: [dropout(x, KEY, samples, positions, residual=residual, impl="triton")])


def test_past_two_to_the_31_elements() -> None:
    B, T, C = 2, 2**15, 2**15 + 64
    x = torch.ones(B, T, C, device="cuda", dtype=torch.bfloat16)
    samples, positions = torch.arange(B, device="cuda"), torch.arange(T, device="cuda")
    ours = dropout(x, KEY, samples, positions, impl="triton")
    last = philox.dropout(x[1:, -1:].clone(), KEY, samples[1:], positions[-1:])
    torch.testing.assert_close(ours[1:, -1:], last)
