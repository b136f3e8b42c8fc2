"""The oracle of attention itself: against loops over single queries and keys, against PyTorch's operator with an
explicit mask, and against finite differences.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.options import Strided
from kernels.attention.reference import attention_with_lse, visible
from kernels.dispatch import KernelError
from kernels.philox import DropoutKey, keep_mask

KEY = DropoutKey(0.3, 2**32 - 5, 7)
SAMPLES = torch.tensor([2**33 + 5, 0])


def sees(t: int, s: int, b: int, Tk: int, window: int | None, sparse: Any, documents: list[int] | None) -> bool:
    """Whether the query at position t of row b sees the key at position s: one clause per feature."""
    if s > t:
        return False
    if window is not None and t - s >= window:
        return False
    if sparse is not None:
        apart = t // sparse.block - s // sparse.block
        if apart >= sparse.local and apart % sparse.stride != 0:
            return False
    if documents is not None:
        # No document begins after the key and at or before the query.
        return not any(b * Tk + s < start <= b * Tk + t for start in documents)
    return True


def inputs(B: int, Tq: int, Tk: int, H: int, K: int, D: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in ((B, Tq, H, D), (B, Tk, K, D), (B, Tk, K, D))]


class Pattern(NamedTuple):
    """Smaller blocks than the kernels take, so that loops stay short."""

    block: int
    local: int
    stride: int


# name: (lengths, options of the reference)
CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "causal": ((6, 6), {}),
    "decoding": ((2, 6), {}),
    "window 1": ((5, 5), {"window": 1}),
    "window": ((5, 7), {"window": 3}),
    "window over all": ((5, 5), {"window": 9}),
    "softcap": ((5, 6), {"softcap": 0.7}),
    "documents": ((6, 6), {"cu_seqlens": [0, 2, 2, 3, 8, 12]}),
    "documents and window": ((6, 6), {"cu_seqlens": [0, 5, 12], "window": 2}),
    "strided": ((12, 12), {"sparse": Pattern(2, 1, 3)}),
    "strided, local": ((12, 12), {"sparse": Pattern(2, 2, 4)}),
    "strided, decoding": ((5, 13), {"sparse": Pattern(3, 1, 2)}),
    "all": ((6, 6), {"cu_seqlens": [0, 5, 7, 12], "window": 3, "softcap": 2.0, "dropout": KEY}),
    "strided, softcap, dropout": ((4, 9), {"sparse": Pattern(2, 1, 2), "softcap": 2.0, "dropout": KEY}),
}


@pytest.mark.parametrize("case", CASES)
def test_against_loops(case: str) -> None:
    (Tq, Tk), options = CASES[case]
    B, H, K, D, offset = 2, 4, 2, 3, 6
    q, k, v = inputs(B, Tq, Tk, H, K, D)
    documents = options.get("cu_seqlens")
    out, lse = torch.zeros_like(q), torch.zeros(B, H, Tq, dtype=torch.float64)
    for b in range(B):
        for i in range(Tq):
            t = Tk - Tq + i
            keys = [s for s in range(Tk) if sees(t, s, b, Tk, options.get("window"), options.get("sparse"), documents)]
            assert t in keys
            for h in range(H):
                scores = [float(q[b, i, h] @ k[b, s, h // 2]) / math.sqrt(D) for s in keys]
                if cap := options.get("softcap"):
                    scores = [cap * math.tanh(score / cap) for score in scores]
                total = sum(math.exp(score) for score in scores)
                lse[b, h, i] = math.log(total)
                keep = keep_mask(KEY, SAMPLES[b : b + 1], torch.tensor([t]), Tk, torch.tensor([h + offset]))[0, 0, 0]
                for s, score in zip(keys, scores, strict=True):
                    factor = float(keep[s]) / (1 - KEY.p) if "dropout" in options else 1.0
                    out[b, i, h] += math.exp(score) / total * factor * v[b, s, h // 2]
    if documents is not None:
        options = options | {"cu_seqlens": torch.tensor(documents, dtype=torch.int32)}
    if "dropout" in options:
        options = options | {"samples": SAMPLES, "head_offset": offset}
    found = attention_with_lse(q, k, v, **options)
    torch.testing.assert_close(found, (out, lse))


@pytest.mark.parametrize("lengths", [(40, 40), (7, 40)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"sparse": Pattern(4, 2, 3)}], ids=str)
def test_against_the_stock_operator(lengths: tuple[int, int], options: dict[str, Any]) -> None:
    q, k, v = inputs(2, *lengths, 4, 2, 8)
    mask = visible(2, *lengths, options.get("window"), options.get("sparse"), None, q.device)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    stock = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(attention_with_lse(q, k, v, **options)[0], stock)


def test_documents_are_separate_sequences() -> None:
    (q, k, v), bounds = inputs(2, 9, 9, 2, 1, 4), [0, 3, 3, 9, 10, 18]
    packed, lse = attention_with_lse(q, k, v, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), window=4)
    flat = [t.reshape(1, 18, *t.shape[2:]) for t in (q, k, v)]
    for low, high in pairwise(bounds):
        if low < high:
            alone = attention_with_lse(*(t[:, low:high] for t in flat), window=4)
            torch.testing.assert_close(packed.reshape(1, 18, 2, 4)[:, low:high], alone[0])
            torch.testing.assert_close(lse.transpose(1, 2).reshape(18, 2)[low:high].T[None], alone[1])


@pytest.mark.parametrize("case", ["decoding", "documents and window", "all", "strided, softcap, dropout"])
def test_gradients_are_those_of_finite_differences(case: str) -> None:
    (Tq, Tk), options = CASES[case]
    if "cu_seqlens" in options:
        options = options | {"cu_seqlens": torch.tensor(options["cu_seqlens"], dtype=torch.int32)}
    if "dropout" in options:
        options = options | {"samples": SAMPLES}
    leaves = [t.requires_grad_() for t in inputs(2, Tq, Tk, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda *a: attention_with_lse(*a, **options), leaves)


def test_precision() -> None:
    q, k, v = (t.to(torch.bfloat16) for t in inputs(1, 4, 4, 2, 1, 8))
    out, lse = attention_with_lse(q, k, v)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    true = attention_with_lse(q.double(), k.double(), v.double())
    assert (true[0].dtype, true[1].dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(lse.double(), true[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block", [0, -64, 32, 96])
def test_wrong_blocks_are_named(block: int) -> None:
    with pytest.raises(KernelError, match=f"sparse: found block = {block}, expected a positive multiple of 64"):
        Strided(block, 1, 1)


@pytest.mark.parametrize("name", ["local", "stride"])
def test_wrong_numbers_of_blocks_are_named(name: str) -> None:
    with pytest.raises(KernelError, match=f"sparse: found {name} = 0, expected at least 1"):
        Strided(**({"block": 64, "local": 1, "stride": 1} | {name: 0}))


@pytest.mark.parametrize("name", ["block", "local", "stride"])
def test_patterns_beyond_32_bits_are_named(name: str) -> None:
    Strided(64, 2**23, 2**23)
    with pytest.raises(KernelError, match=r"sparse: found \w+ = \d+ blocks of \d+, expected at most 2\^29 positions"):
        Strided(**({"block": 64, "local": 1, "stride": 1} | {name: 2**31}))
