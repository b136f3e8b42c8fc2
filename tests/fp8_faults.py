"""Faults of FP8 under tensor parallelism: contexts in which the linears of several ranks have one, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from llm.model.fp8 import E4M3, E5M2, Quantised
from llm.parallel import fp8
from llm.parallel.fp8 import Cut, FP8Product


@contextmanager
def in_linears_of_several_ranks(name: str, faulty: Callable[..., Any]) -> Iterator[None]:
    """Replace llm.parallel.fp8.<name> by `faulty`, which is given the honest one first, where ranks share a linear."""
    honest, within = getattr(fp8, name), [False]

    def entering(run: Callable[..., Any]) -> Callable[..., Any]:
        def entered(ctx: Any, *arguments: Any) -> Any:
            cut = arguments[3] if len(arguments) == 4 else ctx.cut  # of forward, or of backward
            within.append(cut.tp is not None)
            try:
                return run(ctx, *arguments)
            finally:
                within.pop()

        return entered

    with (
        patch.object(fp8, name, lambda *a: faulty(honest, *a) if within[-1] else honest(*a)),
        patch.object(FP8Product, "forward", staticmethod(entering(FP8Product.forward))),
        patch.object(FP8Product, "backward", staticmethod(entering(FP8Product.backward))),
    ):
        yield


def own_largest() -> AbstractContextManager:
    """The scale of a rank's part, not of the whole tensor."""
    honest = Cut.largest
    return patch.object(Cut, "largest", lambda self, *how, **parts: honest(replace(self, tp=None), *how, **parts))


def scale_of_the_wrong_tensor() -> AbstractContextManager:
    """The left operand's scale is the right one's, or those of its rows are of their neighbours."""

    def product(honest: Callable[..., Tensor], a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        return honest(Quantised(a.values, a.scale.roll(1, 0) if a.scale.dim() else b.scale), b, dtype)

    return in_linears_of_several_ranks("product", product)


def not_dequantised() -> AbstractContextManager:
    def product(honest: Callable[..., Tensor], a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
        return honest(Quantised(a.values, torch.ones_like(a.scale)), b, dtype)

    return in_linears_of_several_ranks("product", product)


def formats_swapped() -> AbstractContextManager:
    def quantise(honest: Callable[..., Quantised], x: Tensor, form: torch.dtype, largest: Tensor) -> Quantised:
        return honest(x, E5M2 if form == E4M3 else E4M3, largest)

    return in_linears_of_several_ranks("quantise", quantise)


def gradients_in_e4m3() -> AbstractContextManager:
    return in_linears_of_several_ranks("quantise", lambda honest, x, form, largest: honest(x, E4M3, largest))


def scale_of_the_wrong_rank() -> AbstractContextManager:
    """Bytes are gathered with the scales of rows of another rank, or all with this rank's own."""
    honest = Cut.gather

    def gather(self: Cut, x: Quantised) -> Quantised:
        found = honest(self, x)
        assert self.tp is not None
        if found.scale.dim() == 0:
            return Quantised(found.values, found.scale * 2.0 ** (self.tp.rank + 1))
        return Quantised(found.values, found.scale.roll(found.scale.shape[1] // self.tp.size, 1))

    return patch.object(Cut, "gather", gather)


def not_gathered_in_order() -> AbstractContextManager:
    """The parts of the sequence stand in the order of another rank."""
    honest = Cut.gathered

    def gathered(self: Cut, pending: Tensor, dtype: torch.dtype) -> Tensor:
        found = honest(self, pending, dtype)
        assert self.tp is not None
        return found.view(torch.uint8).roll(found.shape[1] // self.tp.size, 1).view(dtype)

    return patch.object(Cut, "gathered", gathered)


def partial_sums() -> AbstractContextManager:
    """What ranks hold is not summed."""
    return patch("llm.parallel.fp8.start_all_reduce_", lambda x, group: x)


FAULTS: dict[str, Callable[[], AbstractContextManager]] = {
    "own-largest": own_largest,
    "scale-of-the-wrong-tensor": scale_of_the_wrong_tensor,
    "not-dequantised": not_dequantised,
    "formats-swapped": formats_swapped,
    "gradients-in-e4m3": gradients_in_e4m3,
    "scale-of-the-wrong-rank": scale_of_the_wrong_rank,
    "not-gathered-in-order": not_gathered_in_order,
    "partial-sums": partial_sums,
}
