"""Compiled cross-entropy on a GPU (`make test-gpu`), of logits and of the last layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import cross_entropy, reference
from kernels.cross_entropy.linear import GPU_CHUNK, accumulates, linear_cross_entropy
from kernels.cross_entropy.vocabulary import FullVocabulary
from rounding import DTYPES, GPU_ONLY, assert_repeats, assert_within_rounding, run

pytestmark = GPU_ONLY
DEVICE = "cuda"
TERMS = [(0.0, 0.0), (1e-2, 0.0), (1e-2, 15.0)]
VOCABULARIES = [3, 33, 1000, 4096, 5000, 32000, 50257, 65537, 128256]


def example(N: int, V: int, dtype: torch.dtype, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets of which every fifth does not count, and what comes from above."""
    torch.manual_seed(0)
    targets = torch.randint(0, rows or V, (N,), device=DEVICE)
    targets[::5] = -100
    return (3 * torch.randn(N, V, device=DEVICE)).to(dtype), targets, torch.randn(N, device=DEVICE)


def capped(z: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(z / softcap) if softcap else z


def plain_losses(logits: Tensor, targets: Tensor, z_loss: float, softcap: float) -> Tensor:
    """Every step in the dtype of the logits: what rounding alone costs."""
    z = capped(logits, softcap)
    losses = F.cross_entropy(z, targets, reduction="none") + z_loss * z.logsumexp(-1).square()
    return losses.masked_fill(targets == -100, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("z_loss", "softcap"), TERMS)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_cross_entropy(V: int, z_loss: float, softcap: float, inplace: bool, dtype: torch.dtype) -> None:
    logits, targets, grad = example(37, V, dtype)
    options = dict(z_loss=z_loss, softcap=softcap)
    true = run(lambda z: reference.cross_entropy(z, targets, **options)[0], [logits], grad, torch.float64)
    plain = run(lambda z: plain_losses(z, targets, z_loss, softcap), [logits], grad, dtype)
    ours = run(
        lambda z: cross_entropy(z * 1, targets, impl="triton", inplace=inplace, **options)[0], [logits], grad, dtype
    )  # fmt: skip
    assert_within_rounding(ours, plain, true, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_and_odd_strides(dtype: torch.dtype) -> None:
    logits, targets, grad = example(19, 5003, dtype, rows=4097)
    options = dict(vocabulary=FullVocabulary(4097))
    true = run(lambda z: reference.cross_entropy(z, targets, **options)[0], [logits], grad, torch.float64)
    plain = run(lambda z: plain_losses(z[:, :4097], targets, 0.0, 0.0), [logits], grad, dtype)
    for inplace in (False, True):
        ours = run(
            lambda z, inplace=inplace: cross_entropy(z * 1, targets, impl="triton", inplace=inplace, **options)[0],
            [logits], grad, dtype,
        )  # fmt: skip
        assert_within_rounding(ours, plain, true, dtype)
        assert not ours[1][:, 4097:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [64, 1000])
@pytest.mark.parametrize(("z_loss", "softcap"), TERMS)
@pytest.mark.parametrize(("C", "V"), [(64, 1000), (768, 50257), (256, 50304)])
def test_linear_cross_entropy(C: int, V: int, z_loss: float, softcap: float, chunk: int, dtype: torch.dtype) -> None:
    _, targets, _ = example(300, V, dtype)
    tensors = [torch.randn(300, C, device=DEVICE).to(dtype), (torch.randn(V, C, device=DEVICE) / C**0.5).to(dtype)]
    options = dict(z_loss=z_loss, softcap=softcap)
    one = torch.tensor(0.5, device=DEVICE)
    true = run(lambda x, w: reference.linear_cross_entropy(x, w, targets, **options), tensors, one, torch.float64)
    plain = run(lambda x, w: plain_losses(F.linear(x, w), targets, z_loss, softcap).sum(), tensors, one, dtype)
    ours = run(
        lambda x, w: linear_cross_entropy(x, w, targets, chunk=chunk, impl="triton", **options), tensors, one, dtype
    )  # fmt: skip
    assert_within_rounding(ours, plain, true, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_weights_gradient_is_summed_in_fp32(dtype: torch.dtype) -> None:
    """Many chunks are no worse than one, and no product is rounded before it is added."""
    assert accumulates(torch.device(DEVICE), dtype), "torch adds 16-bit products to fp32: without it dW costs one pass"
    _, targets, _ = example(2048, 1000, dtype)
    tensors = [torch.randn(2048, 64, device=DEVICE).to(dtype), torch.randn(1000, 64, device=DEVICE).to(dtype)]
    one = torch.ones((), device=DEVICE)
    true = run(lambda x, w: reference.linear_cross_entropy(x, w, targets), tensors, one, torch.float64)
    errors = []
    for chunk in (2048, 32):
        ours = run(lambda x, w, n=chunk: linear_cross_entropy(x, w, targets, chunk=n), tensors, one, dtype)
        errors.append(float((ours[2].double() - true[2]).norm() / true[2].norm()))
    assert errors[1] < 1.5 * errors[0]


def test_the_same_bits_every_time() -> None:
    logits, targets, grad = example(500, 50257, torch.bfloat16)
    for inplace in (False, True):
        assert_repeats(
            lambda inplace=inplace: run(
                lambda z: cross_entropy(z * 1, targets, inplace=inplace)[0], [logits], grad, torch.bfloat16
            )
        )
    tensors = [torch.randn(500, 64, device=DEVICE), torch.randn(5000, 64, device=DEVICE)]
    one = torch.ones((), device=DEVICE)
    assert_repeats(
        lambda: run(lambda x, w: linear_cross_entropy(x, w, targets % 5000, chunk=100), tensors, one, torch.bfloat16)
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_more_than_2_to_the_31_logits(inplace: bool) -> None:
    """The last rows lie past 2^31 elements; each is the first row once more."""
    N, V = 2**31 // 65536 + 8, 65536
    row, target, _ = example(1, V, torch.bfloat16)
    target.fill_(V - 3)
    logits = row.expand(N, V).contiguous().requires_grad_()
    losses, log_sum = cross_entropy(logits, target.expand(N), inplace=inplace)
    assert (losses == losses[0]).all() and (log_sum == log_sum[0]).all()
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    alone = row.requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(alone, target)[0].sum(), alone)
    for i in (0, 1, N // 2, N - 9, N - 8, N - 1):
        assert torch.equal(gradient[i : i + 1], expected)


def test_compiles_whole_with_inductor() -> None:
    logits, targets, grad = example(64, 1000, torch.bfloat16)
    for inplace in (False, True):
        function = lambda z, inplace=inplace: cross_entropy(z * 2, targets, inplace=inplace)[0]  # noqa: E731
        eager = run(function, [logits], grad, torch.bfloat16)
        compiled = run(torch.compile(function, fullgraph=True), [logits], grad, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    tensors = [torch.randn(64, 64, device=DEVICE), torch.randn(1000, 64, device=DEVICE)]
    one = torch.ones((), device=DEVICE)
    for chunk in (16, GPU_CHUNK):
        function = lambda x, w, n=chunk: linear_cross_entropy(x, w, targets, chunk=n)  # noqa: E731
        eager = run(function, tensors, one, torch.bfloat16)
        compiled = run(torch.compile(function, fullgraph=True), tensors, one, torch.bfloat16)
        for mine, theirs in zip(compiled, eager, strict=True):
            torch.testing.assert_close(mine, theirs)
