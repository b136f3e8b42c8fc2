"""Operators registered by the package's helper: gradients, versions of what is written, dispatch modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.dispatch import KernelError
from kernels.registration import call, operator


def save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def backward(ctx, dy):
    x, y = ctx.saved_tensors
    return dy * y / x * 2


@operator("test_square", fake=lambda x: torch.empty_like(x), save=save, backward=backward)
def square(x: Tensor) -> Tensor:
    return x * x


@operator("test_fill_", fake=lambda *_: None, mutates=("x", "maybe"))
def fill_(x: Tensor, maybe: Tensor | None, value: float) -> None:
    for target in (x, maybe):
        if target is not None:
            target.detach().numpy().fill(value)  # as a kernel writes: unseen by autograd


def test_opcheck() -> None:
    torch.library.opcheck(square, (torch.rand(3, requires_grad=True),))
    torch.library.opcheck(square, (torch.rand(3),))


def test_gradients_are_recorded_only_where_wanted() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(square(x), x, torch.ones(2))
    assert torch.equal(gradient, 2 * x)
    with torch.no_grad():
        assert not square(x).requires_grad
    assert not square(x.detach()).requires_grad


def test_a_second_derivative_is_refused() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    with pytest.raises(KernelError, match=r"ingot.test_square.default: found create_graph=True"):
        torch.autograd.grad(square(x).sum(), x, create_graph=True)


@operator("test_double", fake=torch.empty_like)
def double(x: Tensor) -> Tensor:
    return x * 2


def test_a_call_records_what_the_operator_would() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(call(square, x), x, torch.ones(2))
    assert torch.equal(gradient, 2 * x)
    assert not call(double, x).requires_grad  # it has no backward pass; its function's own product would have one
    with torch.no_grad():
        assert not call(square, x).requires_grad
        assert not call(double, x).requires_grad


@pytest.mark.parametrize("second", [False, True])
def test_what_is_written_has_a_new_version(second: bool) -> None:
    x, maybe = torch.rand(3), torch.rand(3) if second else None
    saved = torch.rand(3, requires_grad=True) * (x if maybe is None else maybe)
    fill_(x, maybe, 2.0)
    assert x.tolist() == [2.0] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


class Record(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_one_operator() -> None:
    x = torch.rand(3, requires_grad=True)
    with Record() as record:
        square(x)
    assert record.names.count("ingot.test_square.default") == 1
    assert "aten.mul.Tensor" not in record.names


@operator("test_numpy_square", fake=torch.empty_like, backward=lambda ctx, dy: dy * ctx.saved_tensors[0] * 2)
def numpy_square(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() ** 2)  # as a kernel reads: tensors with memory alone


def test_tensors_without_memory_have_results_without_memory() -> None:
    x = torch.rand(3, device="meta", requires_grad=True)
    y = numpy_square(x)
    assert y.is_meta
    assert torch.autograd.grad(y.sum(), x)[0].is_meta


class Wrapped(Tensor):
    """A tensor that holds another, and names the operators that it is given to."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    names: list[str]
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)

    def __init__(self, inner: Tensor) -> None:
        self.inner, self.names = inner, []

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        found = next(x for x in args if isinstance(x, cls))
        found.names.append(str(function))
        return function(*[x.inner if isinstance(x, cls) else x for x in args])


def test_other_classes_of_tensors_see_the_operator() -> None:
    x = Wrapped(torch.tensor([2.0, 3.0]))
    assert numpy_square(x).tolist() == [4.0, 9.0]
    assert x.names == ["ingot.test_numpy_square.default"]


def test_transforms_of_functions_are_refused() -> None:
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: numpy_square(x).sum())(torch.rand(3))
