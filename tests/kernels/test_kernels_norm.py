"""Normalisation, alone and fused with the addition before it: the Triton kernels and the stock operators against the
reference in float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import philox
from kernels.dispatch import KernelError
from kernels.norm import add_layer_norm, add_rms_norm, backward, layer_norm, rms_norm, tiles
from kernels.norm.forward import norm_reference
from kernels.norm.op import norm_op
from kernels.norm.tiles import backward_tile, chunks_of, forward_tile
from kernels.philox import DropoutKey

IMPLS = ["triton", "torch", "reference"]
# Rows: one, fewer than a tile, a ragged last tile. Widths: odd, one chunk, several.
SHAPES = [(1, 1, 2), (1, 7, 40), (2, 35, 33), (2, 1, 520)]
# Sample numbers above 2^32, positions that do not begin at 0.
KEY = DropoutKey(0.3, seed=2**31 + 7, site=9)


def drop(shape: Sequence[int]) -> dict[str, Any]:
    samples = torch.arange(shape[0]) * 2**33 + 5
    return dict(dropout=KEY, samples=samples, positions=torch.arange(shape[1]) + 3)


def inputs(shape: Sequence[int], dtype: torch.dtype = torch.float32, *, bias: bool = True) -> list[Any]:
    """x, residual, dy, dstream, weight, bias."""
    torch.manual_seed(0)
    rows = [torch.randn(*shape, dtype=torch.float64) * 2 + 1 for _ in range(4)]
    weights = [torch.rand(shape[-1]) + 0.5, torch.randn(shape[-1]) if bias else None]
    return [None if t is None else t.to(dtype) for t in (*rows, *weights)]


Given = Sequence[Any]


def run(
    function: Callable[..., Any], tensors: Given, gradients: Given, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """What `function` gives, and the gradient of each tensor by what of `gradients` is not None."""
    copies = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outs = function(*copies)
    outs = outs if isinstance(outs, tuple) else (outs,)
    used = [(out, g.to(out.dtype)) for out, g in zip(outs, gradients, strict=True) if g is not None]
    given = [c for c in copies if c is not None]
    found = torch.autograd.grad([o for o, _ in used], given, [g for _, g in used], allow_unused=True)
    return [*outs, *found]


def assert_close(ours: Given, theirs: Given, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine.double(), other.double(), rtol=rtol, atol=atol)


def check(
    op: str,
    tensors: Given,
    gradients: Given,
    impl: str = "triton",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **drops: Any,
) -> None:
    """`op` of the package against that of the reference in float64."""
    ours = run(lambda *a: FORMS[op](*a, impl=impl, **drops), tensors, gradients)
    true = run(lambda *a: FORMS[op](*a, impl="reference", **drops), tensors, gradients, torch.float64)
    assert_close(ours, true, rtol, atol)


FORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm, "rms_norm": rms_norm, "add_layer_norm": add_layer_norm, "add_rms_norm": add_rms_norm,
}  # fmt: skip
ADDS = ["add_layer_norm", "add_rms_norm"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("op", "bias"), [("layer_norm", True), ("layer_norm", False), ("rms_norm", False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], op: str, bias: bool, impl: str) -> None:
    x, _, dy, _, *weights = inputs(shape, bias=bias)
    check(op, [x, *(weights if op == "layer_norm" else weights[:1])], [dy], impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ADDS)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 3, 270)], ids=str)
def test_added_against_float64(shape: tuple[int, ...], dropped: bool, op: str, impl: str) -> None:
    x, residual, dy, dstream, *weights = inputs(shape)
    tensors = [x, residual, *(weights if op == "add_layer_norm" else weights[:1])]
    drops = drop(shape) if dropped else {}
    for gradients in ([dy, dstream], [dy, None], [None, dstream]):
        check(op, tensors, gradients, impl, **drops)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward reads rows of more than 64 columns twice, the second time by blocks."""
    for module, name in (
        (backward, "MEAN_COLS"), (tiles, "BACKWARD_WIDTH"), (tiles, "DROPOUT_BACKWARD_WIDTH"), (tiles, "BLOCK_COLS"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 64)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("C", [65, 200])
def test_wide_rows(C: int) -> None:
    x, residual, dy, dstream, weight, bias = inputs((2, 2, C))
    check("layer_norm", [x, weight, bias], [dy])
    check("add_layer_norm", [x, residual, weight, bias], [dy, dstream], **drop(x.shape))
    check("add_rms_norm", [x, residual, weight], [dy, None])


@pytest.mark.usefixtures("narrow")
def test_wide_statistics_do_not_cancel() -> None:
    x, _, dy, _, weight, bias = inputs((1, 2, 200))
    drifting = x + torch.linspace(-1000, 1000, 200)
    check("layer_norm", [drifting, weight, bias], [dy], rtol=1e-4)
    check("layer_norm", [x + 1000, weight, bias], [dy], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("C", [768, 1600, 5120, 8193, 16384])
def test_real_widths(C: int) -> None:
    x, residual, dy, dstream, weight, bias = inputs((1, 3, C))
    check("layer_norm", [x, weight, bias], [dy])
    check("add_rms_norm", [x, residual, weight], [dy, dstream], **drop(x.shape))


def test_many_rows_in_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "PROGRAMS", 3)
    monkeypatch.setattr(backward, "SUM_ROWS", 2)
    x, residual, dy, dstream, weight, bias = inputs((2, 60, 20))
    check("add_layer_norm", [x, residual, weight, bias], [dy, dstream], **drop(x.shape))


@pytest.mark.parametrize("C", range(1, 20000, 613))
def test_tiles_cover_rows_with_little_padding(C: int) -> None:
    cols, chunks = chunks_of(C)
    assert C <= cols * chunks <= max(16, 1.5 * C if C > 256 else 2 * C)
    for dropout in (False, True):
        for tile in (forward_tile(C, dropout), backward_tile(C, dropout)):
            assert C <= tile.cols * tile.chunks == cols * chunks


@pytest.mark.parametrize("C", [768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288])
def test_usual_widths_are_not_padded(C: int) -> None:
    assert chunks_of(C)[0] * chunks_of(C)[1] == C


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_round_only_the_results(dtype: torch.dtype) -> None:
    x, residual, dy, dstream, weight, bias = inputs((1, 9, 40), dtype)
    half_ulp = 0.51 * torch.finfo(dtype).eps
    check("layer_norm", [x, weight, bias], [dy], rtol=half_ulp)
    check("rms_norm", [x, weight], [dy], rtol=half_ulp)
    # The interpreter has no bfloat16: there the norm reads the stream before it is rounded.
    fused = [t.half() for t in (x, residual, weight, dy, dstream)]
    y, stream, dx, dresidual, dweight = run(
        lambda *a: add_rms_norm(*a, impl="triton", **drop(x.shape)), fused[:3], fused[3:]
    )
    rounded = add_rms_norm(*fused[:3], impl="reference", **drop(x.shape))
    assert torch.equal(stream, rounded[1])
    torch.testing.assert_close(y, rounded[0], rtol=1e-3, atol=1e-5)
    assert y.dtype == dx.dtype == dresidual.dtype == dweight.dtype == torch.float16


def test_weights_of_another_dtype() -> None:
    (x, residual, dy, dstream, _, _), (*_, weight, bias) = inputs((1, 4, 16), torch.bfloat16), inputs((1, 4, 16))
    for op, tensors in (
        ("layer_norm", [x, weight, bias]),
        ("rms_norm", [x, weight]),
        ("add_layer_norm", [x, residual.float(), weight, bias]),
    ):
        gradients = [dy, dstream] if "add" in op else [dy]
        outs = [run(lambda *a, i=i, f=FORMS[op]: f(*a, impl=i), tensors, gradients) for i in IMPLS[::2]]
        for mine, theirs in zip(*outs, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-5)
        assert FORMS[op](*tensors, impl="torch")[0].dtype == outs[0][0].dtype


def test_the_stream_has_the_bits_of_the_unfused_sum() -> None:
    x, residual, _, _, weight, bias = inputs((3, 5, 40))
    what = drop(x.shape)
    key, samples, positions = what.values()
    plain = residual + philox.dropout(x, key, samples, positions)
    for impl in IMPLS:
        y, stream = add_layer_norm(x, residual, weight, bias, **what, impl=impl)
        assert torch.equal(stream, plain)
        assert torch.equal(y, layer_norm(plain, weight, bias, impl=impl))
    x, residual = x.half(), residual.half()
    y, stream = add_layer_norm(x, residual, weight, bias, **what, impl="triton")
    assert torch.equal(y, layer_norm(stream, weight, bias, impl="triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_forms_are_the_stock_operators(dtype: torch.dtype) -> None:
    x, residual, _, _, weight, bias = inputs((3, 5, 40), dtype)
    what = drop(x.shape)
    stream = residual + philox.dropout(x, *what.values())
    ours = add_layer_norm(x, residual, weight, bias, **what) + add_rms_norm(x, residual, weight, **what)
    rms = F.rms_norm(stream.float(), weight.shape, weight.float(), 1e-5).to(dtype)
    stock = (F.layer_norm(stream, weight.shape, weight, bias), stream, rms, stream)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, stock, strict=True))
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, weight.shape, weight, bias))
    weight = torch.rand(40) + 0.5
    rms = F.rms_norm(x.float(), weight.shape, weight, 1e-5).to(dtype)
    assert torch.equal(rms_norm(x, weight), rms) and rms_norm(x, weight).dtype == dtype


def test_reference_gradients() -> None:
    tensors = [
        t.requires_grad_() for t in (t for i, t in enumerate(inputs((2, 2, 5), torch.float64)) if i not in (2, 3))
    ]
    what = drop((2, 2, 5))
    assert torch.autograd.gradcheck(lambda *a: add_layer_norm(*a, impl="reference", **what), tensors)
    assert torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, impl="reference", **what), tensors[:3])
    x, _, weight, bias = tensors
    stock = F.layer_norm(x, (5,), weight, bias), F.rms_norm(x, (5,), weight, 1e-5)
    ours = norm_reference(x, weight, bias, 1e-5, False), norm_reference(x, weight, None, 1e-5, True)
    assert_close(ours, stock, 1e-12, 1e-12)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to x with other strides."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension strided": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "rows of a wider tensor": torch.cat([x, x], -1)[..., : x.shape[-1]],
        "four dimensions": x.unsqueeze(1).expand(-1, 1, -1, -1),
    }


@pytest.mark.parametrize("which", layouts(torch.zeros(1, 1, 1)))
def test_strides_change_nothing(which: str) -> None:
    x, residual, dy, dstream, weight, bias = inputs((3, 5, 12))
    what = {} if which == "four dimensions" else drop(x.shape)

    def fused(*a: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(*a, weight, bias, impl="triton", **what)

    plain = run(fused, [x, residual], [dy, dstream])
    x, residual, dy, dstream = (layouts(t)[which] for t in (x, residual, dy, dstream))
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    outs = fused(*leaves)
    ours = [*outs, *torch.autograd.grad(outs, leaves, [dy, dstream])]
    assert all(torch.equal(mine.view(3, 5, 12), theirs) for mine, theirs in zip(ours, plain, strict=True))


def test_expanded_gradients() -> None:
    x, residual, _, _, weight, bias = inputs((3, 5, 12))
    for scale in (torch.tensor(0.5), torch.randn(12)):
        dy = scale.expand(3, 5, 12)
        check("add_layer_norm", [x, residual, weight, bias], [dy, dy])


def test_the_plain_sum_has_one_gradient() -> None:
    x, residual, dy, dstream, weight, _ = inputs((1, 3, 8))
    *_, dx, dresidual, _ = run(lambda *a: add_rms_norm(*a, impl="triton"), [x, residual, weight], [dy, dstream])
    assert dx.data_ptr() == dresidual.data_ptr()
    leaves = [t.requires_grad_() for t in (x, residual)]
    add_rms_norm(*leaves, weight, impl="triton")[0].sum().backward()
    assert torch.equal(x.grad, residual.grad)
    x.grad.zero_()
    assert residual.grad.any()


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, residual, dy, dstream, weight, bias = inputs(shape)
    found = run(lambda *a: add_layer_norm(*a, impl="triton"), [x, residual, weight, bias], [dy, dstream])
    assert [tuple(t.shape) for t in found] == [shape] * 4 + [(8,)] * 2
    assert not found[-1].any() and not found[-2].any()


@pytest.mark.parametrize("seed", range(6))
def test_drawn_cases(seed: int) -> None:
    draw = random.Random(seed)
    shape = (draw.randint(1, 3), draw.randint(1, 20), draw.choice([1, 3, 17, 100, 385, draw.randint(1, 600)]))
    x, residual, dy, dstream, weight, bias = inputs(shape, bias=draw.random() < 0.5)
    which = draw.choice([name for name in layouts(x) if name != "four dimensions"])
    x, residual, dy, dstream = (layouts(t)[which] if draw.random() < 0.5 else t for t in (x, residual, dy, dstream))
    gradients = draw.choice([[dy, dstream], [dy, None], [None, dstream]])
    check("add_layer_norm", [x, residual, weight, bias], gradients, **(drop(shape) if draw.random() < 0.5 else {}))


def test_opcheck() -> None:
    x, residual, _, _, weight, bias = (None if t is None else t.requires_grad_() for t in inputs((2, 3, 12)))
    _, samples, positions = drop((2, 3)).values()
    torch.library.opcheck(norm_op, (x, None, weight, bias, None, None, 1e-5, False, 0.0, 0, 0))
    torch.library.opcheck(norm_op, (x, residual, weight, None, samples, positions, 1e-5, True, 0.1, 1, 2))


def test_compiles_whole_and_recomputes() -> None:
    x, residual, dy, _, weight, bias = inputs((3, 5, 12))
    tensors = [x, residual, weight, bias]

    def twice(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, stream = add_layer_norm(x, residual, weight, bias, impl="triton", **drop(x.shape))
        y, stream = add_rms_norm(y, stream, weight, impl="triton")
        return layer_norm(stream, weight, bias, impl="triton") + rms_norm(y, weight, impl="triton")

    eager = run(twice, tensors, [dy])
    others = {
        "compiled": torch.compile(twice, fullgraph=True, backend="aot_eager"),
        "recomputed": lambda *a: checkpoint(twice, *a, use_reentrant=False),
    }
    for name, function in others.items():
        for mine, theirs in zip(run(function, tensors, [dy]), eager, strict=True):
            assert torch.equal(mine, theirs), name
    copies = [t.detach().requires_grad_() for t in tensors]
    checkpoint(twice, *copies, use_reentrant=True).backward(dy)
    for copy, theirs in zip(copies, eager[1:], strict=True):
        assert torch.equal(copy.grad, theirs)


def test_wide_rows_are_refused_by_the_kernels_alone() -> None:
    wide, weight = torch.randn(2, 16385), torch.ones(16385)
    for function in (rms_norm, lambda x, *a, **k: add_rms_norm(x, x, *a, **k)):
        with pytest.raises(KernelError, match="found rows of width 16385, expected at most 16384: use impl=torch"):
            function(wide, weight, impl="triton")
    torch.testing.assert_close(rms_norm(wide, weight), rms_norm(wide, weight, impl="reference"))


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.zeros(2, 3, 4), torch.zeros(4)
    with pytest.raises(KernelError, match=r"rms_norm: found weight .*expected \(4,\)"):
        rms_norm(x, torch.zeros(3))
    with pytest.raises(KernelError, match="float64, expected float32"):
        layer_norm(x.double(), weight, None, impl="triton")
    with pytest.raises(KernelError, match=r"found x \(2, 3, 4\) and residual \(2, 1, 4\), expected the same"):
        add_rms_norm(x, x[:, :1], weight)
    with pytest.raises(KernelError, match=r"samples and positions \[None, \(3,\)\], expected \[B, T, C\]"):
        add_layer_norm(x, x, weight, None, **(drop(x.shape) | {"samples": None}))
    with pytest.raises(KernelError, match="float64, expected float32"):
        add_rms_norm(x, x.double(), weight, impl="triton")
