"""`python -m benchmarks.kernels.tune`: times attention's tiles on this GPU, prints lines for its table of tiles.

For each dtype, length and form it prints the fastest tiles and the present one, with the time of the complete forward
or backward pass, and then the line for the table. Candidates are compiled first: those that spill or do not fit are
dropped, and so are those whose results differ from the present tile's. Each width and kind takes minutes. The exit code
is 2 on a machine where the kernels run on no GPU.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from benchmarks.clock import Clock, clock_of
from benchmarks.kernels.aot import report_of
from benchmarks.kernels.attention import KEY, Shape, case, visible_pairs
from benchmarks.kernels.case import DTYPES, Case
from benchmarks.kernels.launches import recorded
from benchmarks.kernels.runner import TOLERANCE, comparison
from kernels.attention.backward import backward
from kernels.attention.forward import forward
from kernels.attention.options import Options, Strided
from kernels.attention.problem import Problem
from kernels.attention.tiles import KINDS, WIDTHS, Tile, tile_width
from kernels.dispatch import INTERPRETED, why_not_triton

# What is switched on.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": KEY},
    "softcap": {"softcap": 30.0},
    "window": {"window": 1024},
    "sparse": {"sparse": Strided(64, 2, 4)},
}
KERNELS = {kind: f"attention_{'dkdv' if kind == 'fused' else kind}_kernel" for kind in KINDS}
ARCHITECTURES = {9: 90, 10: 100}  # by major compute capability; the tiles of 80 serve all others
# The interpreter, for tests of this script: it proves nothing about speed.
INTERPRETED_TILES = [Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)]
TURNS = 5
SIDES = {2: [32, 64, 128], 4: [16, 32, 64]}  # of candidates, by bytes per element


@dataclass(frozen=True)
class Timing:
    """A tile's seconds in the pass, and what is wrong with its results, if anything is."""

    tile: Tile
    seconds: float
    wrong: str = ""


def grid(shape: Shape, dtype: torch.dtype, major: int) -> list[Tile]:
    """Every tile worth compiling."""
    sides = SIDES[dtype.itemsize]
    if shape.sparse is not None:
        sides = [side for side in sides if side <= 64]  # a tile lies in one block
    bulk = (False, True) if major >= 9 and tile_width(shape.D) == shape.D else (False,)
    return [Tile(*numbers) for numbers in itertools.product(sides, sides, (4, 8), (1, 2, 3), bulk)]


def fits(arch: int, kind: str, shape: Shape, dtype: torch.dtype, tile: Tile) -> bool:
    """Whether the kernel compiles with this tile, without spills and within the shared memory."""
    given = case(torch.device("cpu"), dtype, replace(shape, B=1))
    with recorded(arch) as launches:
        pass_of(kind, shape, given)(tile)
    (launch,) = [launch for launch in launches if launch.kernel == KERNELS[kind]]
    try:
        return report_of(launch).fits(given.may_spill)
    except (TritonError, RuntimeError, CalledProcessError):  # a pass of the compiler or the assembler gave up
        return False


def options_of(shape: Shape, kind: str) -> Options:
    return Options(shape.window, shape.sparse, shape.softcap, shape.dropout, deterministic=kind != "fused")


def pass_of(kind: str, shape: Shape, given: Case) -> Callable[[Tile], Sequence[Tensor]]:
    """The pass that `kind` belongs to as a function of its tile; the other kernels of the pass keep theirs."""
    (q, k, v), (do,) = given.tensors, given.gradients
    options = options_of(shape, kind)
    samples = None if shape.dropout is None else torch.arange(len(q), device=q.device)
    if kind == "forward":
        return lambda tile: forward(q, k, v, options, samples, None, tile)
    o, lse = forward(q, k, v, options, samples)
    dkdv, rows = (present(other, shape, q.dtype, q.device) for other in ("dkdv", "dq"))
    return lambda tile: backward(
        do, None, q, k, v, o, lse, options, samples, None, (dkdv, tile) if kind == "dq" else (tile, rows)
    )


def present(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile that the tables hold now."""
    q = torch.empty(1, shape.T, shape.H, shape.D, dtype=dtype, device=device)
    return Problem.of(options_of(shape, kind), False, q, q, q).tile(kind)


def tune(
    kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, clock: Clock, tiles: Sequence[Tile] | None = None
) -> list[Timing]:
    """The present tile and every candidate (by default those that fit), timed, fastest first."""
    if tiles is None:
        major, _ = torch.cuda.get_device_capability(device)
        candidates = grid(shape, dtype, major)
        fit = partial(fits, ARCHITECTURES.get(major, 80), kind, shape, dtype)
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
            tiles = list(itertools.compress(candidates, workers.map(fit, candidates)))
    now = present(kind, shape, dtype, device)
    run = pass_of(kind, shape, case(device, dtype, shape))
    standard = run(now)
    timings = []
    for tile in (now, *(tile for tile in tiles if tile != now)):
        found = comparison(run(tile), standard, TOLERANCE[dtype])
        samples = [sample.device for _ in range(TURNS) for sample in clock.turn(lambda tile=tile: run(tile))]
        timings.append(Timing(tile, statistics.median(samples), found.get("wrong", "")))
    return sorted(timings, key=lambda timing: timing.seconds)


def ranking(kind: str, shape: Shape, timings: Sequence[Timing], now: Tile, most: int) -> Iterator[str]:
    """What to know of the `most` fastest tiles and of the present one, and which tiles gave other results."""
    name = f"# {kind} D={shape.D}"
    operations = visible_pairs(shape) * shape.H * shape.D * (4 if kind == "forward" else 10)
    for timing in timings:
        if timing.wrong:
            yield f"{name} {cell(timing.tile)}: {timing.wrong}"
    for number, timing in enumerate(timing for timing in timings if not timing.wrong):
        if number < most or timing.tile == now:
            rate = operations / timing.seconds / 1e12
            loads = " TMA" * timing.tile.tma + ", the present one" * (timing.tile == now)
            yield f"{name} {cell(timing.tile)}: {timing.seconds * 1e6:.1f} us, {rate:.0f} TFLOP/s{loads}"


def line(
    kind: str, found: Sequence[tuple[Shape, Sequence[Timing]]], dtype: torch.dtype, device: torch.device
) -> str:  # fmt: skip
    """The line of `kind` for a table of kernels/attention/tiles.py, less the table's name: the fastest tile of each
    width in `found`, whose shapes differ in D alone, among those that load as the table's do; the present ones of the
    other widths.
    """
    known = {tile_width(shape.D): timings for shape, timings in found}
    cells = []
    for width in WIDTHS:
        now = present(kind, replace(found[0][0], D=width), dtype, device)
        right = [x.tile for x in known.get(width, ()) if not x.wrong and x.tile.tma == now.tma]
        cells.append(cell([*right, now][0]))
    return f"    {kind:<8}{' '.join(cells)}"


def cell(tile: Tile) -> str:
    """As the tables write it."""
    return f"{tile.block_m}x{tile.block_n}x{tile.warps}x{tile.stages}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="of a head")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="of a row")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["plain"], help="what is switched on")
    parser.add_argument("--best", type=int, default=5, help="tiles to print of each problem")
    parser.add_argument("--tokens", type=int, default=16384, help="rows times their length")
    parser.add_argument("--channels", type=int, default=2048, help="heads times their width")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_not_triton(device, torch.bfloat16)
    if reason is not None:
        print(f"error: benchmarks.kernels.tune: {reason}", file=sys.stderr)
        return 2
    name = "the interpreter" if INTERPRETED else torch.cuda.get_device_name(device)
    tiles = INTERPRETED_TILES if INTERPRETED else None
    clock = clock_of(device)
    for dtype, T, form in itertools.product(options.dtypes, options.lengths, options.forms):
        print(f"# {name}: {dtype}, {options.tokens} tokens in rows of {T}, {options.channels} channels, {form}")
        B, element = max(1, options.tokens // T), DTYPES[dtype]
        shapes = [Shape(B, T, max(1, options.channels // D), D, **FORMS[form]) for D in options.widths]
        for kind in options.kinds:
            found = [(shape, tune(kind, shape, element, device, clock, tiles)) for shape in shapes]
            for shape, timings in found:
                for text in ranking(kind, shape, timings, present(kind, shape, element, device), options.best):
                    print(text)
            print(line(kind, found, element, device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
