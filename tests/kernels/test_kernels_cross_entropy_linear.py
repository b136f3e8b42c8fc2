"""The last layer with its loss: values and gradients against the reference in float64, chunks, memory, operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from chosen import slow_but
from kernels.cross_entropy import linear as module
from kernels.cross_entropy import reference
from kernels.cross_entropy.linear import (
    add_product,
    chunk_tokens,
    linear_cross_entropy,
    linear_cross_entropy_op,
    loss_and_gradients,
)
from kernels.cross_entropy.vocabulary import FullVocabulary, Terms
from kernels.dispatch import KernelError

C, V = 12, 37
FORMS = ["triton", "torch"]
close = torch.testing.assert_close


def example(N: int, dtype: torch.dtype = torch.float32, rows: int = V) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, targets = torch.randn(N, C), torch.randn(V, C), torch.randint(0, rows, (N,))
    targets[::5] = -100
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def run(function: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor, **options) -> list[Tensor]:
    """Three times the loss, and its gradients."""
    loss = 3 * function(x, weight, targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def truth(x: Tensor, weight: Tensor, targets: Tensor, **options) -> list[Tensor]:
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    return run(reference.linear_cross_entropy, *wide, targets, **options)


@pytest.mark.parametrize("impl", [*FORMS, "reference"])
@pytest.mark.parametrize(("z_loss", "softcap", "rows"), [(0.0, 0.0, V), (0.3, 0.0, 30), (0.3, 4.0, V)])
@pytest.mark.parametrize("N", [0, 1, 16, 17, 50])
def test_value_and_gradients(N: int, z_loss: float, softcap: float, rows: int, impl: str) -> None:
    tensors = example(N, rows=rows)
    options = dict(z_loss=z_loss, softcap=softcap, vocabulary=FullVocabulary(rows))
    for mine, exact in zip(
        run(linear_cross_entropy, *tensors, chunk=16, impl=impl, **options), truth(*tensors, **options), strict=True
    ):
        close(mine.double(), exact, rtol=1e-5, atol=1e-4)


def test_the_reference_is_torchs_own() -> None:
    x, weight, targets = example(9, torch.float64)
    loss = 3 * F.cross_entropy(F.linear(x, weight), targets, reduction="sum")
    for mine, theirs in zip(truth(x, weight, targets), [loss, *torch.autograd.grad(loss, (x, weight))], strict=True):
        close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", FORMS)
def test_leading_dimensions_strides_and_frozen_tensors(impl: str) -> None:
    x, weight, targets = example(12)
    plain = run(linear_cross_entropy, x, weight, targets, impl=impl, chunk=5)
    strided = x.detach().view(3, 4, C).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    turned = weight.detach().t().contiguous().t().requires_grad_()
    loss, grad_x, grad_weight = run(linear_cross_entropy, strided, turned, targets.view(3, 4), impl=impl, chunk=5)
    for mine, theirs in zip([loss, grad_x.flatten(0, 1), grad_weight], plain, strict=True):
        close(mine, theirs, rtol=1e-6, atol=1e-5)
    for frozen in (0, 1):
        tensors = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, weight))]
        (3 * linear_cross_entropy(*tensors, targets, impl=impl)).backward()
        assert tensors[frozen].grad is None
        close(tensors[1 - frozen].grad, plain[2 - frozen], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_sum_the_weight_gradient_in_fp32(dtype: torch.dtype, impl: str) -> None:
    """Many chunks are no worse than one: in 16 bits a sum of 64 products would lose the small ones."""
    x, weight, targets = example(64 if impl == "triton" else 1024, dtype)
    exact = truth(x, weight, targets)
    errors = []
    for tokens in (1024, len(x) // 64):
        ours = run(linear_cross_entropy, x, weight, targets, chunk=tokens, impl=impl)
        assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)])
    assert max(errors[0] + errors[1]) < 4 * torch.finfo(dtype).eps
    assert errors[1][2] < 2 * errors[0][2]


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_is_counted(impl: str) -> None:
    x, weight, targets = example(8)
    loss, *gradients = run(linear_cross_entropy, x, weight, targets.fill_(-100), z_loss=1e-4, impl=impl)
    assert loss.item() == 0.0 and not any(g.any() for g in gradients)


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("differentiate", [True, False])
def test_the_logits_of_the_batch_never_exist(differentiate: bool, form: str) -> None:
    x, weight, targets = example(100)
    terms = Terms(FullVocabulary(V), -100, 0.0, 0.0)
    # The body of the operator: nothing sees inside the operator itself.
    with Largest() as largest, torch.no_grad():
        loss_and_gradients(x, weight, targets, terms, 16, form, differentiate, False)
    assert largest.numel < 100 * V / 2
    with Largest() as largest:
        reference.linear_cross_entropy(x, weight, targets)
    assert largest.numel >= 100 * V, "the measure sees whole logits"


@pytest.mark.parametrize("impl", [*FORMS, "reference"])
@pytest.mark.parametrize("chunk", [16, 100])
def test_three_products_and_no_more(chunk: int, impl: str) -> None:
    x, weight, targets = example(50)
    with FlopCounterMode(display=False) as counted:
        linear_cross_entropy(x, weight, targets, chunk=chunk, impl=impl).backward()
    assert counted.get_total_flops() == 6 * 50 * C * V
    with FlopCounterMode(display=False) as counted:
        linear_cross_entropy(x, weight.detach(), targets, chunk=chunk, impl=impl).backward()
    assert counted.get_total_flops() == 4 * 50 * C * V, "a weight that is not trained has no gradient"
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        linear_cross_entropy(x, weight, targets, chunk=chunk, impl=impl)
    assert counted.get_total_flops() == 2 * 50 * C * V


class Part:
    """Columns `start` to `start + rows`; the other columns of each chunk are those of `logits`, a chunk at a time."""

    def __init__(self, start: int, rows: int, logits: Tensor, targets: Tensor, chunk: int) -> None:
        self.start, self.rows = start, rows
        self.chunks: Iterator = zip(logits.split(chunk), targets.split(chunk), strict=True)

    def join(self, log_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        logits, targets = next(self.chunks)
        here = slice(self.start, self.start + self.rows)
        close(log_sum[targets != -100], logits[:, here].logsumexp(-1)[targets != -100])
        one_hot = targets.unsqueeze(-1) == torch.arange(V)
        return logits.logsumexp(-1), torch.where(one_hot, logits, 0.0).sum(-1)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("chunk", [16, 100])
def test_parts_of_the_vocabulary(chunk: int, impl: str) -> None:
    """Two ranks of 20 columns, 3 of the second padding: the sum of their x gradients is the whole one's."""
    x, weight, targets = example(50)
    loss, grad_x, grad_weight = run(linear_cross_entropy, x, weight, targets, z_loss=0.2, impl=impl)
    logits, total = F.linear(x, weight).detach(), torch.zeros_like(grad_x)
    for start, rows in ((0, 20), (20, V - 20)):
        own = F.pad(weight.detach()[start : start + rows], (0, 0, 0, 20 - rows)).requires_grad_()
        part = Part(start, rows, logits, targets, chunk)
        options = dict(z_loss=0.2, vocabulary=part, chunk=chunk, impl=impl)
        mine, from_here, own_grad = run(linear_cross_entropy, x, own, targets, **options)
        total += from_here
        close(mine, loss)
        close(own_grad, F.pad(grad_weight[start : start + rows], (0, 0, 0, 20 - rows)), rtol=1e-5, atol=1e-5)
    close(total, grad_x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", slow_but(["torch"], FORMS))
@pytest.mark.parametrize("chunk", slow_but([16], [16, 100]))
def test_compiles_whole_and_recomputes(chunk: int, impl: str) -> None:
    torch._dynamo.reset()
    x, weight, targets = example(40)

    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x.tanh(), weight, targets, z_loss=0.1, chunk=chunk, impl=impl) / 7

    eager = run(loss, x, weight, targets)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda *a: checkpoint(loss, *a, use_reentrant=False)):
        others = run(function, x, weight, targets)
        assert all(torch.equal(a, b) for a, b in zip(others, eager, strict=True))
    for N in (39, 38):  # sizes that are now unknown when it compiles
        cut = (x[:N], weight, targets[:N])
        others = torch.autograd.grad(compiled(*cut), (x, weight))
        eager_cut = torch.autograd.grad(loss(*cut), (x, weight))
        assert all(torch.equal(a, b) for a, b in zip(others, eager_cut, strict=True))
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    (3 * checkpoint(loss, *leaves, targets, use_reentrant=True)).backward()
    assert all(torch.equal(a.grad, b) for a, b in zip(leaves, eager[1:], strict=True))


@pytest.mark.parametrize(("form", "chunk"), [("torch", 2), ("triton", 2), ("triton", None)])
def test_opcheck(chunk: int | None, form: str) -> None:
    x, weight, targets = example(5)
    options = (targets, V, -100, 0.1, 2.0, chunk, form)
    torch.library.opcheck(linear_cross_entropy_op, (x, weight, *options, True, False))
    torch.library.opcheck(linear_cross_entropy_op, (x, weight.detach(), *options, True, True))
    torch.library.opcheck(linear_cross_entropy_op, (x.detach(), weight.detach(), *options, False, True))


@pytest.mark.parametrize("impl", FORMS)
def test_backward_passes_can_be_repeated(impl: str) -> None:
    x, weight, targets = example(5)
    loss = linear_cross_entropy(x, weight, targets, impl=impl)
    first, second = (torch.autograd.grad(loss, (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_products_are_added() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(6, 5).to(dtype), torch.randn(5, 4).to(dtype)
        total = torch.full((6, 4), torch.nan)
        add_product(total, a, b, True)
        add_product(total, a, b, False)
        close(total, 2 * (a @ b).float(), rtol=1e-6, atol=1e-6)
        torch.library.opcheck(add_product, (total, a, b, False))


def test_chunks_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunk_tokens(torch.device("cpu"), 100608) == 1024
    memory = {0: 140 << 30, 1: 24 << 30, 2: 1 << 30}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(total_memory=memory[d.index]))
    assert [chunk_tokens(torch.device("cuda", i), 100608) for i in memory] == [20480, 4096, 4096]
    sizes = []
    monkeypatch.setattr(module, "CPU_CHUNK", 16)
    stock = module.stock
    monkeypatch.setattr(module, "stock", lambda logits, *a: sizes.append(len(logits)) or stock(logits, *a))
    linear_cross_entropy(*example(40), impl="torch")
    assert sizes == [16, 16, 8]


def test_memory_that_nothing_wrote_is_not_read() -> None:
    """Rows of logits end in unused memory, here NaN, which a CPU's product of bf16 matrices reads."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 32).bfloat16().requires_grad_() for n in (128, 50))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        loss = linear_cross_entropy(x, weight, torch.arange(128) % 50, impl="triton")
        gradients = torch.autograd.grad(loss, (x, weight))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(g.isfinite().all() for g in gradients)


def test_wrong_arguments_are_named() -> None:
    x, weight, targets = example(4)
    with pytest.raises(KernelError, match=r"found weight torch.float32 \(37, 11\), expected torch.float32 \(V, 12\)"):
        linear_cross_entropy(x, weight[:, 1:], targets)
    with pytest.raises(KernelError, match=r"found weight torch.bfloat16 .* expected torch.float32"):
        linear_cross_entropy(x, weight.bfloat16(), targets)
    with pytest.raises(KernelError, match=r"targets torch.int64 of shape \(3,\), expected torch.int64 of \(4,\)"):
        linear_cross_entropy(x, weight, targets[1:])
    with pytest.raises(KernelError, match="found chunk = 0, expected at least 1"):
        linear_cross_entropy(x, weight, targets, chunk=0)
    with pytest.raises(KernelError, match="expected at least the vocabulary's 38"):
        linear_cross_entropy(x, weight, targets, vocabulary=FullVocabulary(38))
