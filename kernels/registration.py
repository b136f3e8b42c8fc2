"""Registration of this package's operators with PyTorch.

torch.compile, activation checkpointing and dispatch modes see an operator as one node. torch.library.custom_op does the
same with more host time per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from kernels.dispatch import expect

LIBRARY = torch.library.Library("ingot", "FRAGMENT")


def operator(
    name: str,
    *,
    fake: Callable[..., Any],
    schema: str | None = None,
    mutates: Sequence[str] = (),
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorator that registers a function as ingot::name, for every device, and returns the operator.

    fake: returns empty results for the same arguments. schema: by default that of the function's annotations. mutates:
    names of the arguments that are written to. save(ctx, inputs, output) and backward(ctx, *gradients): setup_context
    and backward of a torch.autograd.Function, with which the operator is differentiable once.
    """

    def register(function: Callable[..., Any]) -> OpOverload:
        signature = schema or torch.library.infer_schema(function, mutates_args=mutates)
        LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ingot::{name}", fake, lib=LIBRARY)
        op: OpOverload = getattr(torch.ops.ingot, name).default
        if mutates:
            LIBRARY.impl(name, version_kernel(op), "ADInplaceOrView")
        if save is not None and backward is not None:
            LIBRARY.impl(name, autograd_kernel(op, save, backward), "Autograd")
        return op

    return register


def version_kernel(op: OpOverload) -> Callable[..., Any]:
    """Raises the version of what `op` writes to, by which autograd finds saved tensors that were overwritten."""
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def kernel(*inputs: Any) -> Any:
        torch.autograd.graph.increment_version([inputs[i] for i in written if inputs[i] is not None])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(*inputs)

    return kernel


def autograd_kernel(op: OpOverload, save: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `op` below autograd and records `backward`."""
    twice = f"{op}: found create_graph=True, but the operator is differentiable once"

    def below(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    class Node(torch.autograd.Function):
        # Not with setup_context, for which torch binds the arguments to a signature on every call.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = below(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            # once_differentiable would detach a second derivative in silence where no gradient from above has one.
            expect(not torch.is_grad_enabled(), twice)
            return backward(ctx, *gradients)

    return lambda *inputs: Node.apply(*inputs) if torch.is_grad_enabled() else below(*inputs)
