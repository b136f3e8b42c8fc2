"""Cross-entropy of logits: the Triton kernels and the stock form against the reference in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import reference
from kernels.cross_entropy.rows import (
    cross_entropy,
    cross_entropy_backward_op,
    cross_entropy_forward_op,
    scale_rows_op,
    tile_of,
)
from kernels.cross_entropy.vocabulary import FullVocabulary
from kernels.dispatch import KernelError

# Columns and those of them that are token ids: less than a tile, a ragged tile, several, and padding of whole tiles.
WIDTHS = [(1, 1), (3, 3), (37, 37), (40, 33), (256, 256), (700, 600), (1100, 1100), (1500, 5), (9000, 8291)]
Losses = Callable[..., tuple[Tensor, Tensor]]


def example(N: int, V: int, rows: int, dtype: torch.dtype = torch.float32, ignored: int = -100) -> tuple[Tensor, ...]:
    """Logits with a gradient, targets of which every fifth does not count, and what comes from above, one of it 1."""
    torch.manual_seed(0)
    logits, targets, grad = 3 * torch.randn(N, V), torch.randint(0, rows, (N,)), torch.randn(N)
    targets[::5], grad[-1] = ignored, 1.0
    return logits.to(dtype).requires_grad_(), targets, grad


def run(function: Losses, logits: Tensor, targets: Tensor, grad: Tensor, dtype=None, **options) -> list[Tensor]:
    """Losses, log-sum-exps, and the gradient of the logits; a copy of these is what inplace consumes."""
    leaf = logits.detach().to(dtype or logits.dtype).requires_grad_()
    losses, log_sum = function(leaf * 1, targets, **options)
    return [losses, log_sum, *torch.autograd.grad(losses, leaf, grad.to(losses.dtype))]


def close(ours: Sequence[Tensor], true: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for mine, exact in zip(ours, true, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, 0.0), (0.3, 4.0)])
@pytest.mark.parametrize(("V", "rows"), WIDTHS, ids=str)
def test_against_float64(V: int, rows: int, z_loss: float, softcap: float, inplace: bool, impl: str) -> None:
    options = dict(z_loss=z_loss, softcap=softcap, vocabulary=FullVocabulary(rows))
    tensors = example(7, V, rows)
    true = run(reference.cross_entropy, *tensors, torch.float64, **options)
    close(run(cross_entropy, *tensors, inplace=inplace, impl=impl, **options), true)


def test_the_reference_is_torchs_own_in_float64() -> None:
    logits, targets, grad = example(9, 20, 20, torch.float64)
    losses, _, gradient = run(reference.cross_entropy, logits, targets, grad)
    stock = F.cross_entropy(logits, targets, reduction="none")
    close([losses, gradient], [stock, *torch.autograd.grad(stock, logits, grad)], 1e-12)
    squares = run(reference.cross_entropy, logits, targets, grad, z_loss=0.5)[0] - losses
    close([squares], [0.5 * logits.logsumexp(-1).square() * (targets != -100)], 1e-12)
    leaf = logits.detach()[:, :6].requires_grad_()
    function = lambda z: reference.cross_entropy(z, targets % 6, z_loss=0.1, softcap=2.0)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, leaf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_16_bit_logits_round_only_the_gradient(inplace: bool, dtype: torch.dtype) -> None:
    logits, targets, grad = example(9, 300, 300, dtype)
    grad = torch.ones_like(grad)  # in place anything else rounds twice
    losses, log_sum, gradient = run(cross_entropy, logits, targets, grad, inplace=inplace, impl="triton")
    true = run(reference.cross_entropy, logits, targets, grad, torch.float64)
    assert losses.dtype == log_sum.dtype == torch.float32 and gradient.dtype == dtype
    close([losses, log_sum], true[:2])
    torch.testing.assert_close(gradient.double(), true[2], rtol=1.02 * torch.finfo(dtype).eps / 2, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True])
def test_strides_change_nothing(inplace: bool) -> None:
    """Of the logits, of what comes from above, and of the targets."""
    logits, targets, grad = example(6, 40, 40)
    wide = torch.stack([logits.detach(), logits.detach()], -1)
    layouts = {
        "transposed": logits.detach().t().contiguous().t(),
        "last dimension strided": wide.flatten(-2)[:, ::2],
        "rows of a wider tensor": torch.cat([logits.detach()] * 2, -1)[:, :40],
    }
    plain = run(cross_entropy, logits, targets, grad, impl="triton", inplace=inplace)
    for name, strided in layouts.items():
        leaf = strided.requires_grad_()
        losses, log_sum = cross_entropy(leaf, targets.repeat_interleave(2)[::2], impl="triton", inplace=inplace)
        gradient = torch.autograd.grad(losses, leaf, grad.repeat_interleave(3)[::3])[0]
        assert all(torch.equal(a, b) for a, b in zip([losses, log_sum, gradient], plain, strict=True)), name
        assert inplace == bool((leaf == gradient).all()), "the logits are consumed if and only if asked for"


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("inplace", [False, True])
def test_expanded_and_missing_gradients(inplace: bool, impl: str) -> None:
    logits, targets, _ = example(6, 40, 40)
    for scale in (1.0, 0.25):
        leaf = logits.detach().clone().requires_grad_()
        given = leaf * 1
        (cross_entropy(given, targets, inplace=inplace, impl=impl)[0].sum() * scale).backward()
        assert torch.equal(given, leaf) != inplace
        exact = run(reference.cross_entropy, logits, targets, torch.full((6,), scale), torch.float64)[2]
        close([leaf.grad], [exact])
    _, log_sum = cross_entropy(logits, targets, impl=impl)
    assert not log_sum.requires_grad
    empty = cross_entropy(logits[:0], targets[:0], impl=impl, inplace=inplace)[0]
    assert empty.shape == (0,)
    assert torch.autograd.grad(empty.sum(), logits)[0].abs().sum() == 0


def test_what_is_not_counted_is_not_read() -> None:
    """Neither an ignored row nor padding: not even a NaN there is seen, and their gradients are 0."""
    logits, targets, grad = example(7, 300, 290, ignored=7)
    options = dict(ignore_index=7, vocabulary=FullVocabulary(290))
    dirty = logits.detach().clone()
    dirty[targets == 7], dirty[:, 290:] = float("nan"), float("nan")
    for inplace in (False, True):
        ours = run(cross_entropy, dirty, targets, grad, impl="triton", inplace=inplace, **options)
        close(ours, run(reference.cross_entropy, logits, targets, grad, torch.float64, **options))
        assert not ours[2][:, 290:].any() and not ours[0][targets == 7].any()


def test_extreme_logits() -> None:
    logits = torch.tensor([[1000.0, *[0.0] * 7]] * 2 + [[0.0] * 8, [-3e4] * 8])
    targets = torch.tensor([0, 3, 5, 1])
    for impl in ("triton", "torch"):
        losses = cross_entropy(logits, targets, impl=impl)[0]
        assert losses[:2].tolist() == [0.0, 1000.0]
        assert losses[2:].tolist() == pytest.approx([2.0794415] * 2, rel=1e-3)


def test_consumed_logits_cannot_be_needed_by_others() -> None:
    """Autograd refuses to use them, instead of giving gradients of what stands there now; so it does a second pass."""
    logits, targets, _ = example(6, 40, 40)
    squares = logits.exp()
    losses, _ = cross_entropy(squares, targets, inplace=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
    losses, _ = cross_entropy(logits * 1, targets, inplace=True, impl="triton")
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
    with torch.no_grad():
        before = logits.clone()
        cross_entropy(logits, targets, inplace=True, impl="triton")
    assert torch.equal(before, logits), "no gradient, nothing to put there"


class Recorded:
    """A vocabulary of which this rank has `rows` columns from `start` on; `others` hold the rest of each row."""

    def __init__(self, start: int, rows: int, others: Tensor, targets: Tensor) -> None:
        self.start, self.rows = start, rows
        self.sums = others.double().logsumexp(-1)
        self.logits = others.double().gather(-1, targets.clamp(0, others.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
        self.elsewhere = (targets < start) | (targets >= start + rows)

    def join(self, log_sum: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.logaddexp(log_sum.double(), self.sums).to(log_sum.dtype)
        return whole, torch.where(self.elsewhere, self.logits.to(log_sum.dtype), target_logit)


@pytest.mark.filterwarnings("ignore:divide by zero")  # the log-sum-exp of no columns is -inf
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("start", "rows"), [(0, 20), (20, 30), (50, 0)], ids=str)
def test_a_part_of_the_vocabulary(start: int, rows: int, inplace: bool, impl: str) -> None:
    """Of 50 columns; the last rank of three may hold padding alone."""
    whole, targets, grad = example(12, 50, 50)
    others = whole.detach().clone()
    others[:, start : start + rows] = float("-inf")
    part = torch.cat([whole.detach()[:, start : start + rows], torch.full((12, 3), 9.0)], -1)
    vocabulary = Recorded(start, rows, others, targets)
    options = dict(z_loss=0.2)
    ours = run(cross_entropy, part, targets, grad, inplace=inplace, impl=impl, vocabulary=vocabulary, **options)
    losses, log_sum, gradient = run(reference.cross_entropy, whole, targets, grad, torch.float64, **options)
    close(ours, [losses, log_sum, F.pad(gradient[:, start : start + rows], (0, 3))])


def test_opcheck() -> None:
    logits, targets, grad = example(5, 40, 33)
    logits = logits.detach()
    terms, value = (33, 0, -100, 0.1, 2.0), torch.rand(5)
    torch.library.opcheck(cross_entropy_forward_op, (logits, targets, None, *terms, True))
    torch.library.opcheck(cross_entropy_forward_op, (logits, targets, logits.clone(), *terms, True))
    for factor in (grad, None):
        torch.library.opcheck(cross_entropy_backward_op, (factor, logits, targets, value, logits.clone(), *terms))
    torch.library.opcheck(scale_rows_op, (logits.clone(), grad))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole_and_recomputes(inplace: bool) -> None:
    torch._dynamo.reset()
    logits, targets, grad = example(6, 40, 40)

    def losses(z: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(z * 2, targets, z_loss=0.1, inplace=inplace, impl="triton")[0]

    eager = torch.autograd.grad(losses(logits, targets), logits, grad)[0]
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda *a: checkpoint(losses, *a, use_reentrant=False)):
        assert torch.equal(torch.autograd.grad(function(logits, targets), logits, grad)[0], eager)
    cut = logits.detach()[:5].requires_grad_()  # N is now unknown when it compiles
    assert torch.equal(torch.autograd.grad(compiled(cut, targets[:5]), cut, grad[:5])[0], eager[:5])
    leaf = logits.detach().requires_grad_()
    checkpoint(losses, leaf, targets, use_reentrant=True).backward(grad)
    assert torch.equal(leaf.grad, eager)


def fuzzed(seed: int) -> None:
    """Shapes, strides, terms and dtype at random."""
    draw = random.Random(seed)
    N, rows = draw.randint(1, 9), draw.choice([draw.randint(1, 50), draw.randint(1, 3000), 256 * draw.randint(1, 5)])
    V = rows + draw.choice([0, 0, draw.randint(1, 64)])
    options = dict(
        z_loss=draw.choice([0.0, 0.01]), softcap=draw.choice([0.0, 15.0]), vocabulary=FullVocabulary(rows),
        ignore_index=draw.choice([-100, rows - 1]),
    )  # fmt: skip
    dtype = draw.choice([torch.float32, torch.float32, torch.float16])
    logits, targets, grad = example(N, V + draw.randint(0, 7), rows, dtype, ignored=options["ignore_index"])
    logits = logits[:, :V].detach()
    ours = run(cross_entropy, logits, targets, grad, inplace=draw.random() < 0.5, impl="triton", **options)
    true = run(reference.cross_entropy, logits, targets, grad, torch.float64, **options)
    close(ours, true, 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed: int) -> None:
    fuzzed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 300))
def test_fuzz_longer(seed: int) -> None:
    fuzzed(seed)


def test_tiles_cover_rows() -> None:
    for V in (1, 255, 1024, 1025, 5000, 20000, 50257, 128256, 262144):
        lanes, warps = tile_of(V)
        assert lanes & (lanes - 1) == 0 and warps & (warps - 1) == 0 and 32 <= lanes <= 64 * warps


def test_wrong_arguments_are_named() -> None:
    logits, targets = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KernelError, match=r"found logits of shape \(2, 2, 2\)"):
        cross_entropy(logits.view(2, 2, 2), targets)
    with pytest.raises(KernelError, match=r"targets torch.int64 of shape \(1,\), expected torch.int64 of \(2,\)"):
        cross_entropy(logits, targets[:1])
    with pytest.raises(KernelError, match=r"found targets torch\.int32"):
        cross_entropy(logits, targets.int())
    with pytest.raises(KernelError, match="found 4 columns of logits, expected at least the vocabulary's 5"):
        cross_entropy(logits, targets, vocabulary=FullVocabulary(5))
    with pytest.raises(KernelError, match="float64, expected float32"):
        cross_entropy(logits.double(), targets, impl="triton")
    shared = torch.zeros(1, 4, requires_grad=True).expand(2, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        cross_entropy(shared, targets, impl="triton", inplace=True)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:divide by zero")
def test_the_log_sum_of_extreme_logits() -> None:
    """Rows of which all logits are far below 0, or that hold an infinity or a NaN, in the first tile or the second."""
    for V in (5, 700):
        z = torch.randn(7, V)
        z[0], z[1], z[2] = -2e38, 3.4e38, -3.4e38
        z[3, 1], z[4, V - 1], z[5, 2], z[6] = float("inf"), float("inf"), float("nan"), float("-inf")
        z[2, V - 2] = 3.4e38
        _, log_sum = cross_entropy(z, torch.zeros(7, dtype=torch.int64), impl="triton")
        torch.testing.assert_close(log_sum, z.double().logsumexp(-1).float(), equal_nan=True)


@pytest.mark.parametrize("softcap", [3.0, 30.0, 1e3, 1e6, 1e20])
def test_softcap_keeps_the_digits_of_logits_far_below_it(softcap: float) -> None:
    logits, targets, grad = example(7, 300, 300)
    true = run(reference.cross_entropy, logits, targets, grad, torch.float64, softcap=softcap)
    close(run(cross_entropy, logits, targets, grad, impl="triton", softcap=softcap), true, 2e-6)
