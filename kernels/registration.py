"""Registers this package's operators with PyTorch.

torch.compile, activation checkpointing and dispatch modes then see an operator as one node. torch.library.custom_op
would do the same with more host time per call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from kernels.dispatch import KernelError

LIBRARY = torch.library.Library("ingot", "FRAGMENT")
# Of each operator, by its id (its hash is found in Python), its function and what records its backward pass, if it has
# one. Filled on import, as LIBRARY is.
FUNCTIONS: dict[int, tuple[Callable[..., Any], Callable[..., Any] | None]] = {}
PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list})


def operator(
    name: str,
    *,
    fake: Callable[..., Any],
    schema: str | None = None,
    mutates: Sequence[str] = (),
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] = lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorator that registers a function as ingot::name, for every device, and returns the operator.

    fake: returns empty results for the same arguments. schema: by default that of the function's annotations. mutates:
    names of the arguments that are written to. backward(ctx, *gradients) returns the gradients of the first inputs (the
    others have none) from those of the results, None where a result has none; it makes the operator differentiable
    once. save(ctx, inputs, output) keeps what it needs, as setup_context of a torch.autograd.Function does.
    """

    def register(function: Callable[..., Any]) -> OpOverload:
        signature = schema or torch.library.infer_schema(function, mutates_args=mutates)
        LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ingot::{name}", fake, lib=LIBRARY)
        op: OpOverload = getattr(torch.ops.ingot, name).default
        FUNCTIONS[id(op)] = function, None
        if mutates:
            LIBRARY.impl(name, version_kernel(op), "ADInplaceOrView")
        if backward is not None:
            # The class's method in C++: Python's only looks for torch.func's transforms, which nodes refuse.
            parent: Any = super(torch.autograd.Function, node_of(op, function, save, backward))
            FUNCTIONS[id(op)] = function, parent.apply
            LIBRARY.impl(name, node_of(op, partial(below_autograd, op), save, backward).apply, "Autograd")
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


def is_plain(inputs: Sequence[Any]) -> bool:
    """Whether nothing but the operator itself wants to see a call with `inputs`, of which the first is a tensor."""
    seen = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    if seen or torch._C._are_functorch_transforms_active() or inputs[0].is_meta:
        return False
    return PLAIN.issuperset(map(type, inputs))


def call(op: OpOverload, *inputs: Any) -> Any:
    """op(*inputs), for an operator that writes to no argument, and numbers of the types that its schema names.

    The ways through PyTorch's dispatcher cost more than the checks and the launch together, so they are taken only
    where something else wants to see the call.
    """
    if torch.compiler.is_compiling() or not is_plain(inputs):
        return op(*inputs)
    function, differentiable = FUNCTIONS[id(op)]
    if not torch.is_grad_enabled():  # then autograd records nothing, and need not be kept out
        return function(*inputs)
    return below_autograd(function, *inputs) if differentiable is None else differentiable(*inputs)


def below_autograd(function: Callable[..., Any], *inputs: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return function(*inputs)


def node_of(
    op: OpOverload, function: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> Any:
    """The torch.autograd.Function that runs `function`, without gradients as they all do, and records `backward`."""
    twice = f"{op}: found create_graph=True, but the operator is differentiable once"
    nothing = (None,) * len(op._schema.arguments)

    # Not with setup_context, for which torch binds the arguments to a signature on every call.
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function(*inputs)
        output = tuple(output) if isinstance(output, list) else output  # of a list torch records nothing
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)
        return output

    def checked_backward(ctx: Any, *gradients: Any) -> Any:
        # once_differentiable would detach a second derivative in silence where no gradient from above has one.
        if torch.is_grad_enabled():
            raise KernelError(twice)
        for gradient in gradients:
            if gradient is not None:
                found = backward(ctx, *gradients)
                found = found if isinstance(found, tuple) else (found,)
                return found + nothing[len(found) :]
        return nothing

    methods = {"forward": staticmethod(forward), "backward": staticmethod(checked_backward)}
    kind: Any = type(torch.autograd.Function)
    return kind(op._schema.name, (torch.autograd.Function,), methods)  # profilers show the name
