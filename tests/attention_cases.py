"""Calls of attention with every mask, for the tests that compare its forms."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.attention import Strided, attention_with_lse
from kernels.philox import DropoutKey

KEY = DropoutKey(0.3, 2**32 - 5, 7)
SAMPLES = torch.tensor([2**33 + 5, 0, 7])


@dataclass(frozen=True)
class Case:
    """Sizes and what is switched on. cuts: where documents begin among the B * T tokens."""

    B: int
    Tq: int
    Tk: int
    H: int
    K: int
    D: int
    window: int | None = None
    sparse: Strided | None = None
    cuts: tuple[int, ...] | None = None
    softcap: float = 0.0
    dropout: bool = False
    deterministic: bool = True

    def options(self, device: str = "cpu") -> dict[str, Any]:
        """What `attention` takes beyond q, k, v and impl."""
        options: dict[str, Any] = {"window": self.window, "sparse": self.sparse, "softcap": self.softcap}
        if self.cuts is not None:
            bounds = [0, *self.cuts, self.B * self.Tk]
            options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
        if self.dropout:
            options |= {"dropout": KEY, "samples": SAMPLES[: self.B].to(device), "head_offset": 3}
        return options

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """(q, k, v) and the gradients of (o, lse)."""
        torch.manual_seed(0)
        q, do = (torch.randn(self.B, self.Tq, self.H, self.D).to(dtype) for _ in range(2))
        k, v = (torch.randn(self.B, self.Tk, self.K, self.D).to(dtype) for _ in range(2))
        return [q, k, v], (do, torch.randn(self.B, self.H, self.Tq))


def run(
    case: Case, impl: str, tensors: list[Tensor], gradients: tuple[Tensor, Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """o, lse and the gradients of q, k, v."""
    copies = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = attention_with_lse(*copies, impl=impl, deterministic=case.deterministic, **case.options())
    given = [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, copies, given)]


def assert_close(ours: list[Tensor], true: list[Tensor], tolerance: float = 2e-5) -> None:
    for name, mine, exact in zip(("o", "lse", "dq", "dk", "dv"), ours, true, strict=True):
        torch.testing.assert_close(
            mine.double(), exact.double(), rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def drawn(seed: int) -> Case:
    """A case from everything that fits together."""
    chance = random.Random(seed)
    B, (H, K) = chance.choice([1, 2, 3]), chance.choice([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
    D = chance.choice([16, 16, 24, 32, 40, 64, 80, 96, 128, 200])
    Tk = chance.choice([chance.randint(1, 70), chance.randint(1, 200)])
    Tq = chance.choice([Tk, Tk, chance.randint(1, Tk)])
    window = sparse = cuts = None
    mask = chance.choice(["none", "window", "documents", "both", "strided"])
    if mask in ("window", "both"):
        window = chance.choice([1, chance.randint(1, Tk), chance.randint(1, 2 * Tk)])
    if mask in ("documents", "both"):
        Tq = Tk
        cuts = tuple(sorted(chance.randint(0, B * Tk) for _ in range(chance.randint(0, 8))))
    if mask == "strided":
        B, Tk = 1, Tk + 150
        Tq = chance.choice([Tk, chance.randint(1, Tk)])
        sparse = Strided(chance.choice([64, 64, 128]), chance.randint(1, 3), chance.randint(1, 4))
    return Case(
        B, Tq, Tk, H, K, D, window, sparse, cuts,
        softcap=chance.choice([0.0, 0.0, 0.5, 4.0, 30.0]),
        dropout=chance.random() < 0.3,
        deterministic=chance.random() < 0.7,
    )  # fmt: skip
