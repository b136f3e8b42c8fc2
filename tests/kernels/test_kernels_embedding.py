"""Table look-up: the sorted gradient and the stock operator against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.dispatch import KernelError
from kernels.embedding import CHUNK, embedding, embedding_op

# (N, V, C): one token; every length around a chunk and its border; one row that takes many chunks; two tiles of columns
SIZES = [
    (1, 1, 1), (5, 3, 7), (CHUNK, 4, 16), (CHUNK + 1, 1, 16), (2 * CHUNK + 1, 2, 3), (6 * CHUNK, 1, 5),
    (400, 3, 40), (90, 1000, 1030), (0, 5, 4),
]  # fmt: skip


def inputs(N: int, V: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, table, dy; few tokens are frequent, most are rare, as in a text."""
    torch.manual_seed(N + V + C)
    tokens = (torch.rand(N) ** 3 * V).long()
    return tokens, torch.randn(V, C).to(dtype).requires_grad_(), torch.randn(N, C).to(dtype)


def gradient(tokens: Tensor, weight: Tensor, dy: Tensor, impl: str, **options: bool) -> Tensor:
    return torch.autograd.grad(embedding(tokens, weight, impl=impl, **options), weight, dy)[0]


def true_gradient(tokens: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """In float64, token by token; those outside of the table have none."""
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for token, row in zip(tokens.flatten().tolist(), dy.reshape(-1, dy.shape[-1]), strict=True):
        if 0 <= token < len(weight):
            total[token] += row
    return total


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size: tuple[int, int, int], impl: str) -> None:
    tokens, weight, dy = inputs(*size)
    assert torch.equal(embedding(tokens, weight, impl=impl), weight[tokens])
    ours = gradient(tokens, weight, dy, impl)
    torch.testing.assert_close(ours.double(), true_gradient(tokens, weight, dy), rtol=1e-5, atol=1e-5)


def test_random_cases() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        N, V, C = (int(torch.randint(1, most, (), generator=generator)) for most in (5 * CHUNK, 40, 50))
        tokens, weight, dy = inputs(N, V, C)
        tokens = tokens + torch.randint(-V, V, (N,), generator=generator)  # half outside of the table
        ours = gradient(tokens, weight, dy, "triton", zero_outside=True)
        torch.testing.assert_close(ours.double(), true_gradient(tokens, weight, dy), rtol=1e-5, atol=1e-5)


def test_the_sum_has_one_order_whatever_else_is_in_the_batch() -> None:
    """A row's bits depend on where its tokens lie among the sorted, not on V, the others' gradients or the grid."""
    tokens, weight, dy = inputs(300, 3, 8)
    ours = gradient(tokens, weight, dy, "triton")
    wider = torch.randn(900, 8).requires_grad_()
    assert torch.equal(gradient(tokens, wider, dy, "triton")[:3], ours)
    others = torch.where((tokens == 1).unsqueeze(-1), dy, torch.randn(300, 8))
    assert torch.equal(gradient(tokens, weight, others, "triton")[1], ours[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_sums_are_rounded_once(dtype: torch.dtype) -> None:
    tokens, weight, dy = inputs(5 * CHUNK, 3, 40, dtype)
    ours = gradient(tokens, weight, dy, "triton")
    assert ours.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(ours.double(), true_gradient(tokens, weight, dy), rtol=1.02 * half_ulp, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_tokens_outside_of_the_table(impl: str) -> None:
    _, weight, dy = inputs(7, 4, 6)
    tokens = torch.tensor([0, -1, 3, 4, 2**40, -(2**40), 3])
    y = embedding(tokens, weight, zero_outside=True, impl=impl)
    assert torch.equal(y[[0, 2, 6]], weight[[0, 3, 3]])
    assert y[[1, 3, 4, 5]].count_nonzero() == 0
    ours = gradient(tokens, weight, dy, impl, zero_outside=True)
    torch.testing.assert_close(ours.double(), true_gradient(tokens, weight, dy), rtol=1e-5, atol=1e-5)
    with pytest.raises(IndexError):
        embedding(torch.tensor([4]), weight, impl=impl)


def test_the_torch_form_is_the_vocabulary_parallel_layer_s() -> None:
    """Bit for bit what a rank with rows 10 to 19 computes by masks."""
    _, weight, dy = inputs(30, 10, 6)
    tokens = torch.arange(30)
    elsewhere = (tokens < 10) | (tokens >= 20)
    masked = F.embedding((tokens - 10).masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
    ours = embedding(tokens - 10, weight, zero_outside=True, impl="torch")
    assert torch.equal(ours, masked)
    assert torch.equal(*(torch.autograd.grad(y, weight, dy)[0] for y in (ours, masked)))


def test_strided_and_expanded_tensors() -> None:
    tokens, weight, _ = inputs(24, 5, 8)
    tokens = tokens.view(4, 6)
    base = torch.randn(6, 4, 16)
    grads = [
        base.transpose(0, 1)[..., :8], base.transpose(0, 1)[..., ::2], torch.tensor(0.5).expand(4, 6, 8),
        torch.randn(8).expand(4, 6, 8), torch.randn(4, 6, 1).expand(4, 6, 8),
    ]  # fmt: skip
    for dy in grads:
        ours = gradient(tokens, weight, dy, "triton")
        torch.testing.assert_close(ours.double(), true_gradient(tokens, weight, dy), rtol=1e-5, atol=1e-5)
    strided = torch.stack([tokens, tokens], -1)[..., 0]
    assert torch.equal(gradient(strided, weight, grads[0], "triton"), gradient(tokens, weight, grads[0], "triton"))
    rows = torch.randn(5, 16)[:, ::2].requires_grad_()
    assert torch.equal(embedding(tokens.int(), rows, impl="triton"), rows[tokens])


def test_gradcheck() -> None:
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[2, 0], [2, 5]])
    for impl in ("torch", "reference"):
        assert torch.autograd.gradcheck(lambda w, i=impl: embedding(tokens, w, zero_outside=True, impl=i), weight)


def test_opcheck() -> None:
    tokens, weight, _ = inputs(9, 4, 6)
    torch.library.opcheck(embedding_op, (tokens, weight, False))
    torch.library.opcheck(embedding_op, (tokens.view(3, 3) - 1, weight, True))


def test_compiles_whole_and_recomputes() -> None:
    tokens, weight, dy = inputs(70, 4, 6)

    def twice(table: Tensor) -> Tensor:
        return embedding(tokens, table, impl="triton") + embedding(tokens - 1, table, zero_outside=True, impl="triton")

    eager = twice(weight)
    expected = torch.autograd.grad(eager, weight, dy)[0]
    others = {
        "compiled": torch.compile(twice, fullgraph=True, backend="aot_eager"),
        "recomputed": lambda table: checkpoint(twice, table, use_reentrant=False),
        "recomputed, reentrant": lambda table: checkpoint(twice, table, use_reentrant=True),
    }
    for name, function in others.items():
        copy = weight.detach().requires_grad_()
        y = function(copy)
        y.backward(dy)
        assert torch.equal(y, eager), name
        assert torch.equal(copy.grad, expected), name


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(KernelError, match=r"expected int64 or int32 tokens"):
        embedding(torch.zeros(3), torch.zeros(2, 2))
    with pytest.raises(KernelError, match=r"weight of shape \(2,\)"):
        embedding(torch.zeros(3, dtype=torch.int64), torch.zeros(2))
    with pytest.raises(KernelError, match="float64, expected float32"):
        embedding(torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2).double(), impl="triton")
