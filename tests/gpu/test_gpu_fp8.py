"""The GPU's FP8 product beside the one that a CPU computes of the same operands."""

from __future__ import annotations

import pytest
import torch

from llm.model.fp8 import E4M3, E5M2, Quantised, largest, product, quantise

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("left", [E4M3, E5M2])
@pytest.mark.parametrize("rowwise", [False, True])
def test_a_product_is_the_cpu_s(rowwise: bool, left: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8")
    torch.manual_seed(0)
    a, b = torch.randn(80, 256) * 10.0 ** torch.arange(-4, 4).repeat(10)[:, None], torch.randn(48, 256)
    dims = (1,) if rowwise else ()
    operands = quantise(a, left, largest(a, dims)), quantise(b, E4M3, largest(b, dims))
    on_gpu = [Quantised(x.values.cuda(), x.scale.cuda()) for x in operands]
    for theirs, x in zip(on_gpu, (a, b), strict=True):  # quantised there, they have the same bits
        again = quantise(x.cuda(), theirs.values.dtype, largest(x.cuda(), dims))
        assert torch.equal(again.values.view(torch.uint8), theirs.values.view(torch.uint8))
        assert torch.equal(again.scale, theirs.scale)
    expected = product(*operands, torch.bfloat16).float()
    found = product(*on_gpu, torch.bfloat16).float().cpu()
    sizes = expected.abs().amax(1, keepdim=True)
    assert ((found - expected).abs() <= 2**-8 * expected.abs() + 2**-16 * sizes).all()
