"""AdamW in one pass, against the reference in float64 and PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adamw import BLOCK, adamw_, adamw_op
from kernels.dispatch import KernelError

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def tensors(n: int, dtype: torch.dtype = FP32, gradient: torch.dtype | None = None) -> list[Tensor]:
    """Parameter, gradient and moments."""
    torch.manual_seed(n)
    p, g, m, v = torch.randn(n), torch.randn(n), torch.randn(n) * 0.1, torch.rand(n) * 0.1
    return [p.to(dtype), g.to(gradient or dtype), m.to(dtype), v.to(dtype)]


def updated(given: list[Tensor], impl: str, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """Copies of `given` after one update."""
    copies = [t.to(dtype or t.dtype, copy=True) for t in given]
    adamw_(*copies, impl=impl, **{**OPTIONS, "step": 1, **options})  # pyright: ignore[reportCallIssue]
    return copies


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("step", [1, 2, 60, 1000, 100_000])
@pytest.mark.parametrize("n", [1, 7, BLOCK, 3 * BLOCK + 5])
def test_against_float64(n: int, step: int, impl: str) -> None:
    given = tensors(n)
    oracle = updated(given, "reference", torch.float64, step=step)
    for mine, theirs in zip(updated(given, impl, step=step), oracle, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)


def test_random_cases() -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for _ in range(25):
        given = tensors(int(draw(1, 3000)))
        options = {
            "lr": 10 ** draw(-5, -1), "betas": (draw(0, 0.99), draw(0.5, 0.9999)), "eps": 10 ** draw(-10, -3),
            "weight_decay": draw(0, 1), "step": int(10 ** draw(0, 6)), "grad_scale": torch.tensor(draw(0.1, 4)),
        }  # fmt: skip
        oracle = updated(given, "reference", torch.float64, **options)
        for mine, theirs in zip(updated(given, "triton", **options), oracle, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=1e-6)


def test_betas_of_0_and_empty_tensors() -> None:
    given = tensors(9)
    oracle = updated(given, "reference", torch.float64, betas=(0.0, 0.0), step=3)
    for mine, theirs in zip(updated(given, "triton", betas=(0.0, 0.0), step=3), oracle, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)
    assert updated(tensors(0), "triton")[0].shape == (0,)


def test_the_torch_form_is_torch_s_fused_optimizer() -> None:
    given = tensors(100)
    parameter = torch.nn.Parameter(given[0].clone())
    optimizer = torch.optim.AdamW([parameter], fused=True, **OPTIONS)
    ours = [given[0].clone(), given[1], torch.zeros(100), torch.zeros(100)]
    for t in (1, 2, 3):
        parameter.grad = given[1] / t
        optimizer.step()
        adamw_(ours[0], given[1] / t, *ours[2:], step=t, impl="torch", **OPTIONS)
    assert torch.equal(ours[0], parameter.detach())


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_scalars_on_the_device_are_the_same_as_numbers(impl: str) -> None:
    given = tensors(50)
    on_device = updated(given, impl, step=torch.tensor(7.0), grad_scale=torch.tensor(0.25))
    scaled = [given[0], given[1] * 0.25, *given[2:]]  # a power of two: no rounding
    plain = updated(scaled, impl, step=7)
    for i in (0, 2, 3):
        assert torch.equal(on_device[i], plain[i])


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("n", [7, 2 * BLOCK])
def test_a_skipped_update_changes_nothing(impl: str, n: int) -> None:
    given = tensors(n)
    given[1][0] = float("nan")
    for mine, before in zip(updated(given, impl, skip=torch.tensor(1.0)), given, strict=True):
        torch.testing.assert_close(mine, before, rtol=0, atol=0, equal_nan=True)
    given[1][0] = 0.5
    for mine, theirs in zip(updated(given, impl, skip=torch.tensor(0.0)), updated(given, impl), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("low", [BF16, FP16])
def test_16_bit_parameters_round_only_the_results(low: torch.dtype) -> None:
    given = tensors(2 * BLOCK + 3, low)
    oracle = updated(given, "reference", torch.float64)
    for mine, theirs in zip(updated(given, "triton"), oracle, strict=True):
        assert mine.dtype == low
        torch.testing.assert_close(mine.double(), theirs, rtol=0.51 * torch.finfo(low).eps, atol=1e-6)


@pytest.mark.parametrize("low", [BF16, FP16])
def test_the_copy_is_the_rounded_parameter(low: torch.dtype) -> None:
    given = tensors(2 * BLOCK + 3, gradient=low)
    for impl in ("triton", "torch", "reference"):
        copy = torch.empty(len(given[0]), dtype=low)
        parameter = updated(given, impl, low_precision=copy)[0]
        assert torch.equal(copy, parameter.to(low)), impl


@pytest.mark.parametrize("low", [BF16, FP16])
@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_stochastic_rounding_has_the_bits_of_the_reference(seed: int, low: torch.dtype) -> None:
    given = tensors(2 * BLOCK + 3)
    # Subnormal in fp16, zeros, and what must survive the addition of random bits.
    given[0][:64] = torch.linspace(-7e-5, 7e-5, 64)
    given[0][64:68] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    given[0].view(torch.int32)[68] = 2**31 - 1  # the NaN that GPUs make
    copies = [torch.empty(len(given[0]), dtype=low) for _ in range(2)]
    for copy, impl in zip(copies, ("triton", "reference"), strict=True):
        # lr = 0: both round the same fp32 numbers.
        parameter = updated(given, impl, lr=0.0, step=torch.tensor(9.0), low_precision=copy, seed=seed)[0]
        torch.testing.assert_close(parameter, given[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(*copies, rtol=0, atol=0, equal_nan=True)
    nearest = given[0].to(low)
    assert not torch.equal(copies[0].nan_to_num(), nearest.nan_to_num())
    exact = nearest.float() == given[0]
    assert torch.equal(copies[0][exact], nearest[exact])


@pytest.mark.parametrize("low", [BF16, FP16])
@pytest.mark.parametrize("value", [1.0003, -3.1415, 3.001e-5])
def test_stochastic_rounding_is_right_on_average(value: float, low: torch.dtype) -> None:
    n = 10_000
    given = [torch.full((n,), value), torch.zeros(n), torch.zeros(n), torch.zeros(n)]
    draws = []
    for seed, step in ((1, 1), (2, 1), (1, 2)):
        copy = torch.empty(n, dtype=low)
        updated(given, "triton", lr=0.0, step=step, low_precision=copy, seed=seed)
        gap = float(copy.double().max() - copy.double().min())
        assert len(copy.unique()) == 2
        assert gap <= max(torch.finfo(low).eps * abs(value), 2.0**-24)
        # Five standard deviations of a coin with the widest spread.
        assert abs(float(copy.double().mean()) - given[0].double()[0]) < 5 * gap / 2 / n**0.5
        draws.append(copy)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_16_bit_parameter_with_a_seed_is_itself_rounded_stochastically() -> None:
    """Updates far below half a gap, which rounding to the nearest would lose, add up."""
    given = [torch.ones(4096, dtype=BF16), torch.ones(4096), torch.ones(4096), torch.ones(4096)]
    options = {"lr": 1e-4, "weight_decay": 0.0, "step": 10**6}
    assert torch.equal(updated(given, "triton", **options)[0], given[0])
    parameter, *rest = (t.clone() for t in given)
    for t in range(10):
        adamw_(parameter, *rest, impl="triton", seed=t, **{**OPTIONS, **options})  # pyright: ignore[reportCallIssue]
    assert abs(float(parameter.double().mean()) - (1 - 10 * 1e-4)) < 2e-4
    assert torch.equal(
        updated(given, "triton", seed=4, **options)[0], updated(given, "reference", seed=4, **options)[0]
    )


def test_gradients_of_any_stride_and_parts_of_a_flat_tensor() -> None:
    flat = [t[1:] for t in tensors(61)]  # an offset that no 16 bytes divide
    plain = updated([t.clone() for t in flat], "triton")
    strided = [t.view(6, 10) for t in flat]
    strided[1] = strided[1].t().contiguous().t()
    adamw_(*strided, impl="triton", step=1, **OPTIONS)
    for mine, theirs in zip(strided, plain, strict=True):
        assert torch.equal(mine.flatten(), theirs)


def test_opcheck_and_compile() -> None:
    p, g, m, v = tensors(20)
    copy = torch.empty(20, dtype=BF16)
    scalars = (0.0, 1e-2, 0.9, 0.999, 1e-8, 0.1)
    on_device = [torch.tensor(x) for x in (0.5, 3.0, 1.0)]
    torch.library.opcheck(adamw_op, (p, g, m, v, copy, *on_device, *scalars, 11))
    torch.library.opcheck(adamw_op, (p, g, m, v, None, None, None, None, 2.0, *scalars[1:], None))
    given = tensors(20)
    eager = updated(given, "triton", step=torch.tensor(5.0))
    compiled = torch.compile(
        lambda *a: adamw_(*a, impl="triton", **OPTIONS, step=torch.tensor(5.0)), fullgraph=True, backend="aot_eager"
    )
    copies = [t.clone() for t in given]
    compiled(*copies)
    for mine, theirs in zip(copies, eager, strict=True):
        assert torch.equal(mine, theirs)


def test_wrong_arguments_are_named() -> None:
    p, g, m, v = tensors(6)
    wrong = [
        ((p, g[:5], m, v), {}, r"gradient of shape \(5,\)"),
        ((p, g, m, v), {"grad_scale": torch.ones(1)}, r"grad_scale of shape \(1,\)"),
        ((p, g, m, v), {"low_precision": p.clone()}, "low_precision torch.float32, expected a wider"),
        ((p.half(), g, m, v), {"low_precision": p.half()}, "16-bit parameters need no copy"),
        ((p, g, m, v), {"seed": 3}, "leave out the seed"),
        ((p.half(), g, m, v), {"seed": -1}, "found seed -1"),
        ((p, g, m.double(), v), {"impl": "triton"}, "exp_avg torch.float64"),
        ((torch.stack([p, p], 1)[:, 0], g, m, v), {"impl": "triton"}, "expected it contiguous"),
        ((p.half(), g, m, v), {"impl": "torch"}, "expected one dtype of parameter and moments"),
        ((p.half(), g, m, v), {"impl": "torch", "seed": 1}, "asks for stochastic rounding"),
    ]
    for given, options, message in wrong:
        with pytest.raises(KernelError, match=message):
            adamw_(*given, step=1, **OPTIONS, **options)  # pyright: ignore[reportArgumentType]


def test_auto_on_a_cpu_takes_what_can_run() -> None:
    p, g, m, v = tensors(6)
    mixed = [p.half(), g, m, v]  # PyTorch's fused AdamW wants one dtype
    for mine, theirs in zip(updated(mixed, "auto"), updated(mixed, "reference"), strict=True):
        assert torch.equal(mine, theirs)
