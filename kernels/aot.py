"""`python -m kernels.aot`: compile every kernel for every architecture, without a GPU.

One line per kernel: registers per thread, bytes spilled, shared memory, and which matrix
instructions it uses. Exits 1 if a 16-bit kernel spills or needs more shared memory than its architecture
has.
"""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention import backward, forward
from kernels.attention.tiles import Tile, tile_for, tile_width
from kernels.dispatch import INTERPRETED, expect
from kernels.layer_norm import layer_norm_backward_kernel, layer_norm_forward_kernel, tile_of

# Shared memory that one block may ask for, in bytes (CUDA programming guide, compute capabilities).
# 8.0 tiles also serve 8.6, 8.9 and 12.0, which have the least.
SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
HEAD_WIDTHS = (16, 32, 40, 64, 80, 96, 128, 192, 256)
ROW_WIDTHS = (128, 768, 1600, 4096, 8192)
MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
# Pointers that are not of the tensors' own dtype.
POINTERS = {
    "lse_ptr": "*fp32", "delta_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
    "dweight_ptr": "*fp32", "dbias_ptr": "*fp32", "samples_ptr": "*i64",
}  # fmt: skip
FLOATS = ("scale", "keep_scale", "eps")


@dataclass(frozen=True)
class Case:
    """One kernel with its compile-time constants, and how it is launched."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case. spill: bytes per thread; shared: bytes per block."""

    case: Case
    arch: int
    registers: int
    spill: int
    shared: int
    matrix: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """fp32 kernels may spill: the assembler trades a few bytes for more blocks per SM there."""
        spill_is_fine = self.spill == 0 or self.case.dtype == "fp32"
        return spill_is_fine and self.shared <= SHARED_MEMORY[self.arch]

    def __str__(self) -> str:
        return (
            f"sm_{self.arch:<4} {self.case.name:<58} {self.registers:>4} registers "
            f"{self.spill:>6} B spilled {self.shared:>7} B shared  "
            f"{' '.join(self.matrix) or '-'}{'' if self.fits else '  DOES NOT FIT'}"
        )


def attention_case(kind: str, kernel: Any, dtype: str, D: int, tile: Tile, dropout: bool) -> Case:
    constants: dict[str, Any] = {
        "D": D,
        "WIDTH": tile_width(D),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    constants["DROPOUT"] = dropout
    if not dropout:
        constants["samples_ptr"] = None
    name = f"attention {kind} {dtype} D={D} {tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}"
    return Case(name + " dropout" * dropout, kernel, dtype, constants, tile.warps, tile.stages)


def attention_cases(arch: int, widths: tuple[int, ...] = HEAD_WIDTHS) -> Iterator[Case]:
    """Every attention kernel with the tile that it runs with on `arch`."""
    kernels = {
        "forward": forward.attention_forward_kernel,
        "dkdv": backward.attention_dkdv_kernel,
        "dq": backward.attention_dq_kernel,
    }
    for D in widths:
        for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            for kind, kernel in kernels.items():
                for dropout in (False, True):
                    tile = tile_for(kind, D, itemsize, arch // 10, dropout)
                    yield attention_case(kind, kernel, dtype, D, tile, dropout)
            constants = {"D": D, "WIDTH": tile_width(D), "BLOCK_M": backward.DELTA_ROWS}
            kernel = backward.attention_delta_kernel
            yield Case(f"attention delta {dtype} D={D}", kernel, dtype, constants, 4, 1)


def layer_norm_cases() -> Iterator[Case]:
    for C in ROW_WIDTHS:
        rows, width, warps = tile_of(C)
        for dtype in ("bf16", "fp16", "fp32"):
            for bias in (False, True):
                constants = {"C": C, "ROWS": rows, "WIDTH": width, "HAS_BIAS": bias}
                no_bias = {} if bias else {"bias_ptr": None}
                for kind, kernel in (
                    ("forward", layer_norm_forward_kernel),
                    ("backward", layer_norm_backward_kernel),
                ):
                    name = f"layer_norm {kind} {dtype} C={C}{' bias' * bias}"
                    extra = no_bias if kind == "forward" else {}
                    yield Case(name, kernel, dtype, constants | extra, warps, 1)


def source_of(case: Case) -> ASTSource:
    """The kernel with types for its arguments: aligned pointers, 32-bit numbers, as a contiguous
    call gives.
    """
    signature, aligned = {}, {}
    for index, name in enumerate(inspect.signature(case.kernel.fn).parameters):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, f"*{case.dtype}")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if signature[name] != "constexpr" and (name.endswith("_ptr") or name.startswith("stride_")):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, case.constants, aligned)


def compile_case(case: Case, arch: int) -> Report:
    """Compile for compute capability `arch` / 10 and read the assembler's account."""
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source_of(case), target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    tools = knobs.nvidia
    ptxas = (tools.ptxas_blackwell if arch >= 100 else tools.ptxas).path
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, "the PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        account = subprocess.run(
            [ptxas, "-v", f"-arch={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    registers = re.search(r"Used (\d+) registers", account)
    spill = re.findall(r"(\d+) bytes spill", account)
    assert registers, account
    assert spill, account
    return Report(
        case, arch, int(registers[1]), sum(map(int, spill)), compiled.metadata.shared,
        tuple(word for word in MATRIX_INSTRUCTIONS if word in ptx),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--only", default="", help="compile only the kernels whose name matches this expression")
    options = parser.parse_args(arguments)
    expect(
        not INTERPRETED,
        "found TRITON_INTERPRET=1, expected compiled kernels: unset it and run again",
    )
    failed = 0
    for arch in options.arch:
        for case in (*attention_cases(arch), *layer_norm_cases()):
            if re.search(options.only, case.name):
                report = compile_case(case, arch)
                print(report, flush=True)
                failed += not report.fits
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
