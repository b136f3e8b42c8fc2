"""Stages `gluon_speed`, `attention`, `kernels`, `tiles`: times beside those of others, of benchmarks.kernels' cases."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from benchmarks.clock import clock_of
from benchmarks.gpu_proof.stage import NO_HOPPER, Items
from benchmarks.kernels.attention import GLUON, SMALL, Shape, contests_of, on_hopper
from benchmarks.kernels.case import timed_dtype
from benchmarks.kernels.runner import Outcome, benchmark, failures_of, run_contest
from benchmarks.kernels.tune import cell, present, tune
from benchmarks.report import Record
from kernels.attention.tiles import Tile
from kernels.dispatch import why_not_triton

RIVALS = ("ingot", "ingot, atomics", "SDPA flash", "SDPA cuDNN")
# 16384 tokens and 2048 channels, as FlashAttention publishes; then the presets of 124M and 6.7B.
SHAPES = [
    *(Shape(16384 // T, T, 2048 // D, D) for T in (1024, 4096, 8192) for D in (64, 128)),
    Shape(16, 1024, 12, 64), Shape(4, 4096, 32, 128),
]  # fmt: skip
GLUON_SHAPES = [Shape(16384 // T, T, 2048 // D, D) for T in (4096, 16384, 8192, 2048) for D in (128, 64)]
# Family, kernel, and the part, group and shape to find.
KERNELS = [
    ("cross_entropy", "linear_cross_entropy", "step .*N=16384 C=768"),
    ("norm", "add_layer_norm", "presets M=16384 C=768"),
    ("adamw", "adamw", "bf16 gradient and copy 350M"),
    ("cross_entropy", "cross_entropy", "step .*N=8192 V=50304"),
    ("activations", "gelu", "N=16384 F=3072"),
    ("activations", "swiglu", "N=8192 F=11008"),
    ("rope", "rope", "B=16 T=1024 H=12"),
    ("norm", "layer_norm", "presets M=16384 C=768"),
    ("norm", "rms_norm", "presets M=8192 C=4096"),
    ("embedding", "embedding", "B=16 T=1024 C=768"),
]
# Tiles that need few instructions for a product and spill at most 128 bytes, by kind and width of the heads.
TILES = {
    ("dkdv", 128): "32x128x8x2 64x128x8x1 64x64x8x2 32x64x8x2",
    ("forward", 64): "128x128x8x2 128x64x4x3 128x64x8x3",
    ("forward", 128): "128x128x8x2 128x64x8x3 128x64x4x2",
    ("dkdv", 64): "64x128x8x2 128x128x8x1 64x64x4x2",
    ("dq", 128): "128x64x8x2 128x128x8x1 64x64x4x2",
    ("dq", 64): "128x64x8x2 128x128x8x2",
    ("fused", 64): "32x128x8x2 64x128x8x1",
    ("fused", 128): "32x128x8x1 32x64x8x2",
}
SMALL_TILES = {("forward", 16): "32x16x4x1"}


def contest(device: torch.device, shape: Shape, rivals: Sequence[str] = RIVALS) -> Record:
    contests = contests_of(device, timed_dtype(device.type == "cpu"), f"D={shape.D}", shape, rivals)
    return record_of(run_contest(contest, device, clock_of(device)) for contest in contests)


def attention(device: torch.device) -> Items:
    shapes = SMALL[""] if device.type == "cpu" else SHAPES
    return {str(shape): partial(contest, device, shape) for shape in shapes}


def gluon_speed(device: torch.device) -> Items:
    if not on_hopper(GLUON_SHAPES[0], device):
        return NO_HOPPER
    return {str(shape): partial(contest, device, shape, (GLUON, *RIVALS)) for shape in GLUON_SHAPES}


def kernels(device: torch.device) -> Items:
    def timed(family: str, kernel: str, shape: str) -> Record:
        only = f"^{kernel} " + f".*{shape}( |$)" * (device.type == "cuda")
        return record_of(benchmark(device, clock_of(device), only, [family]))

    return {" ".join(chosen[1:]): partial(timed, *chosen) for chosen in KERNELS}


def record_of(found: Iterable[Outcome]) -> Record:
    """The outcomes of an item, and what is wrong with our part of them."""
    outcomes = list(found)
    wrong = [failure for outcome in outcomes for failure in failures_of(outcome)]
    return {"outcomes": outcomes} | ({"wrong": "; ".join(wrong)} if wrong else {})


def candidates(device: torch.device, small: bool) -> list[tuple[str, Shape, Tile]]:
    """Kind, shape and tile, but for tiles that the tables hold."""
    found = [
        (
            kind,
            Shape(1, 16, 1, D) if small else Shape(4, 4096, 2048 // D, D),
            Tile(*map(int, text.split("x")), tma=not small),
        )
        for (kind, D), texts in (SMALL_TILES if small else TILES).items()
        for text in texts.split()
    ]
    return [(kind, shape, tile) for kind, shape, tile in found if tile != present(kind, shape, torch.bfloat16, device)]


def tiles(device: torch.device) -> Items:
    """ms of a pass with a tile, and in turns with the one of the tables."""

    def timed(kind: str, shape: Shape, tile: Tile) -> Record:
        now = present(kind, shape, torch.bfloat16, device)
        found = {x.tile: x for x in tune(kind, shape, torch.bfloat16, device, clock_of(device), [tile])}
        record: Record = {"ms": found[tile].seconds * 1e3, "present": cell(now), "present_ms": found[now].seconds * 1e3}
        return record | ({"wrong": found[tile].wrong} if found[tile].wrong else {})

    if why_not_triton(device, torch.bfloat16) is not None:
        return {}
    return {
        f"{kind} D={shape.D} T={shape.T} {cell(tile)}": partial(timed, kind, shape, tile)
        for kind, shape, tile in candidates(device, device.type == "cpu")
    }
