"""Dropout masks as a pure function of their coordinates: the same bits in PyTorch and in Triton.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a keyed bijection of
a 128-bit counter. Any element of any mask is drawn alone, in any order, on any rank, from

    key      seed, site
    counter  column // 4, row, sample mod 2^32, head * 2^16 + sample // 2^32
    output   number column % 4 of the four

and is kept if its 32 bits are at least p * 2^32. Sample, row, column and head are global numbers: no micro-batch, tile,
rank count or split of the heads changes a mask.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import expect
from kernels.registration import call, operator

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class DropoutKey:
    """The key of a dropout mask. Raises KernelError outside of the ranges.

    p: probability of dropping, 0 <= p < 1. seed: of the run, 32-bit. site: number of the layer and kind, 32-bit.
    """

    p: float
    seed: int
    site: int

    def __post_init__(self) -> None:
        expect(0 <= self.p < 1, f"dropout: found p = {self.p}, expected 0 <= p < 1")
        for name, value in (("seed", self.seed), ("site", self.site)):
            expect(0 <= value <= WORD, f"dropout: found {name} = {value}, expected 0 to 2^32 - 1")

    @property
    def threshold(self) -> int:
        """Elements whose 32 bits are under this number are dropped."""
        return min(round(self.p * 2**32), WORD)

    @property
    def numbers(self) -> tuple[float, int, int, int]:
        """(1 / (1 - p), seed, site, threshold) as the kernels take them."""
        return 1 / (1 - self.p), signed(self.seed), signed(self.site), signed(self.threshold)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors of 32-bit words, which broadcast together -> four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # Products wrap at 2^64: their low and high words are still right. c1 and c3 carry garbage above their word,
        # which the next round's & removes; c0 and c2 must be clean because they are multiplied.
        a, b = c0 * ROUND_A, c2 * ROUND_B
        c0 = ((b >> 32) ^ (c1 ^ k0)) & WORD
        c2 = ((a >> 32) ^ (c3 ^ k1)) & WORD
        c1, c3 = b, a
        k0, k1 = (k0 + WEYL_A) & WORD, (k1 + WEYL_B) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def keep_mask(key: DropoutKey, samples: Tensor, rows: Tensor, n_cols: int, heads: Tensor | None = None) -> Tensor:
    """True where an element is kept: bool [B, R, n_cols], or with `heads` [B, H, R, n_cols].

    samples int64 [B], global sample numbers under 2^48; rows int64 [R] under 2^32; heads int64 [H], global head numbers
    under 2^16 (head 0 if None); columns are 0 to n_cols - 1.
    """
    return call(keep_mask_op, samples, rows, heads, n_cols, key.p, key.seed, key.site)


def _fake(samples: Tensor, rows: Tensor, heads: Tensor | None, n_cols: int, *_: object) -> Tensor:
    middle = [] if heads is None else [len(heads)]
    return samples.new_empty([len(samples), *middle, len(rows), n_cols], dtype=torch.bool)


# An operator for what torch.compile makes of it on a CPU: C++ that shifts 64-bit words as floats (PyTorch 2.13).
@operator("keep_mask", fake=_fake)
def keep_mask_op(
    samples: Tensor, rows: Tensor, heads: Tensor | None, n_cols: int, p: float, seed: int, site: int
) -> Tensor:
    groups = torch.arange((n_cols + 3) // 4, device=samples.device)
    samples = samples[:, None, None]
    if heads is None:
        head_word = samples >> 32
    else:
        samples = samples[:, None]
        head_word = (heads[:, None, None] << 16) | (samples >> 32)
    counter = (groups, rows[:, None], samples & WORD, head_word)
    words, threshold = philox(counter, (seed, site)), DropoutKey(p, seed, site).threshold
    return torch.stack([w >= threshold for w in words], dim=-1).flatten(-2)[..., :n_cols].contiguous()


def dropout(x: Tensor, key: DropoutKey, samples: Tensor, positions: Tensor) -> Tensor:
    """x / (1 - p) where kept, else 0 (Srivastava et al. 2014).

    x [B, T, C]; samples int64 [B], global sample numbers; positions int64 [T]. Returns [B, T, C] in the dtype of x; x
    itself if p is 0. The mask is that of `keep_mask` with rows = positions, columns = channels.
    """
    if key.p == 0:
        return x
    keep = keep_mask(key, samples, positions, x.shape[-1])
    return torch.where(keep, x, 0.0) * (1 / (1 - key.p))


def signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits, so that Triton always types it as i32."""
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def keep_tile(seed, site, threshold, sample, head, rows, first_col, COLS: tl.constexpr):
    """The tile [len(rows), COLS] of the mask that begins at column `first_col`, a multiple of 4.

    seed, site, threshold: i32 bits. sample: i64. head: i32. rows: i32 block.
    """
    low = seed.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = site.to(tl.uint32, bitcast=True).to(tl.uint64)
    groups = first_col // 4 + tl.arange(0, COLS // 4)
    sample_low = (sample & 0xFFFFFFFF).to(tl.uint32)
    head_word = (head.to(tl.uint32) << 16) | (sample >> 32).to(tl.uint32)
    seeds = (high << 32) | low
    # Triton types a call from one kernel to another as if it were made from the host.
    w0, w1, w2, w3 = tl.philox(  # pyright: ignore[reportGeneralTypeIssues]
        seeds, groups[None, :], rows[:, None], sample_low, head_word
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= threshold.to(tl.uint32, bitcast=True)
