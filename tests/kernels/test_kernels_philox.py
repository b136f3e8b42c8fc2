"""Masks: the published generator, the same bits in Triton and PyTorch, and independent of every
layout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kernels.dispatch import KernelError
from kernels.philox import DropoutKey, dropout, keep_mask, keep_tile, philox, signed

# Random123 (Salmon et al. 2011), kat_vectors, philox4x32 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@triton.jit
def philox_kernel(out_ptr, in_ptr):
    """in: key low, key high and the counter, i64 [6]; out: i64 [4]."""
    lane = tl.arange(0, 1)
    key = tl.load(in_ptr).to(tl.uint64) | (tl.load(in_ptr + 1).to(tl.uint64) << 32)
    c0 = tl.load(in_ptr + 2 + lane).to(tl.uint32)
    c1 = tl.load(in_ptr + 3 + lane).to(tl.uint32)
    c2 = tl.load(in_ptr + 4 + lane).to(tl.uint32)
    c3 = tl.load(in_ptr + 5 + lane).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out_ptr + lane, w0.to(tl.int64))
    tl.store(out_ptr + 1 + lane, w1.to(tl.int64))
    tl.store(out_ptr + 2 + lane, w2.to(tl.int64))
    tl.store(out_ptr + 3 + lane, w3.to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    blocks = [torch.tensor([word]) for word in words(counter)]
    ours = philox((blocks[0], blocks[1], blocks[2], blocks[3]), (words(key)[0], words(key)[1]))
    assert [int(w) for w in ours] == words(expected)
    out = torch.zeros(4, dtype=torch.int64)
    philox_kernel[(1,)](out, torch.tensor([*words(key), *words(counter)]))
    assert out.tolist() == words(expected)


@triton.jit
def mask_kernel(
    out_ptr, samples_ptr, seed, site, threshold, head_offset, first_row, T,
    H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One [ROWS, COLS] tile of the masks [B, H, T, T]."""
    b, h, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    col_tiles = tl.cdiv(T, COLS)
    rows = tile // col_tiles * ROWS + tl.arange(0, ROWS)
    first_col = tile % col_tiles * COLS
    cols = first_col + tl.arange(0, COLS)
    sample = tl.load(samples_ptr + b)
    keep = keep_tile(seed, site, threshold, sample, h + head_offset, rows + first_row, first_col, COLS)
    ptrs = out_ptr + ((b * H + h) * T + rows[:, None]) * T + cols[None, :]
    tl.store(ptrs, keep.to(tl.int8), (rows < T)[:, None] & (cols < T)[None, :])


SAMPLES = torch.tensor([0, 5, 2**32 + 5, 2**47 - 1])


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 8)])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_triton_draws_the_bits_of_pytorch(tile: tuple[int, int], seed: int) -> None:
    key, T, H = DropoutKey(0.6, seed, 2**32 - 7), 45, 2
    out = torch.full((len(SAMPLES), H, T, T), 2, dtype=torch.int8)
    bits = (signed(key.seed), signed(key.site), signed(key.threshold))
    grid = (len(SAMPLES), H, triton.cdiv(T, tile[0]) * triton.cdiv(T, tile[1]))
    kernel: Any = mask_kernel  # Triton's own types take no number for a constexpr
    kernel[grid](out, SAMPLES, *bits, 3, 100, T, H, *tile)
    expected = keep_mask(key, SAMPLES, torch.arange(100, 100 + T), T, torch.arange(3, 3 + H))
    assert torch.equal(out, expected.to(torch.int8))


def test_a_mask_depends_on_global_numbers_alone() -> None:
    key, rows, heads = DropoutKey(0.3, 7, 2), torch.arange(20), torch.arange(4)
    whole = keep_mask(key, SAMPLES, rows, 33, heads)
    assert torch.equal(keep_mask(key, SAMPLES[2:3], rows, 33, heads), whole[2:3])
    assert torch.equal(keep_mask(key, SAMPLES, rows[5:9], 33, heads), whole[:, :, 5:9])
    assert torch.equal(keep_mask(key, SAMPLES, rows, 33, heads[2:]), whole[:, 2:])
    assert torch.equal(keep_mask(key, SAMPLES, rows, 6, heads), whole[..., :6])
    assert torch.equal(keep_mask(key, SAMPLES, rows, 33), whole[:, 0])


def test_every_number_of_the_place_changes_the_mask() -> None:
    rows = torch.arange(64)
    masks = [
        keep_mask(key, torch.tensor([sample]), rows + row, 64, torch.tensor([head])).flatten()
        for key, sample, row, head in [
            (DropoutKey(0.5, 1, 1), 1, 0, 1),
            (DropoutKey(0.5, 2, 1), 1, 0, 1),
            (DropoutKey(0.5, 1, 2), 1, 0, 1),
            (DropoutKey(0.5, 1, 1), 2, 0, 1),
            (DropoutKey(0.5, 1, 1), 2**32 + 1, 0, 1),
            (DropoutKey(0.5, 1, 1), 1, 64, 1),
            (DropoutKey(0.5, 1, 1), 1, 0, 2),
        ]
    ]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            agreement = (first == second).float().mean().item()  # 4096 fair coins: sd 0.008
            assert 0.46 < agreement < 0.54


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_kept(p: float) -> None:
    keep = keep_mask(DropoutKey(p, 1234, 0), torch.arange(4), torch.arange(256), 256).float()
    n = keep.numel()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 5 * deviation
    per_column = keep.mean((0, 1))
    assert (per_column - (1 - p)).abs().max().item() < 6 * deviation * 256**0.5


def test_dropout_and_its_gradient() -> None:
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    key, samples, positions = DropoutKey(0.25, 3, 4), torch.tensor([9, 4]), torch.arange(5)
    keep = keep_mask(key, samples, positions, 7)
    y = dropout(x, key, samples, positions)
    torch.testing.assert_close(y, x * keep / 0.75)
    y.sum().backward()
    torch.testing.assert_close(x.grad, keep / 0.75, check_dtype=False)
    assert dropout(x, DropoutKey(0, 3, 4), samples, positions) is x
    half = x.detach().to(torch.bfloat16)
    assert dropout(half, key, samples, positions).dtype == torch.bfloat16


@pytest.mark.parametrize(("p", "seed", "site"), [(1.0, 0, 0), (-0.1, 0, 0), (0.1, 2**32, 0), (0.1, 0, -1)])
def test_a_key_out_of_range_is_refused(p: float, seed: int, site: int) -> None:
    with pytest.raises(KernelError, match="expected"):
        DropoutKey(p, seed, site)
