"""`python -m benchmarks.kernels.aot`: compile every kernel for every architecture, without a GPU.

Prints a line per kernel: registers per thread, bytes spilled, shared memory, and its matrix and bulk-copy instructions.
Under it, for Hopper, a line per loop with matrix products (benchmarks/kernels/sass.py).
Exits with 1 if a kernel spills or needs more shared memory than its architecture has. Triton's cache (the folder
TRITON_CACHE_DIR) then holds what a GPU machine with the same Triton and Python would compile.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from triton import knobs

from benchmarks.kernels.case import DTYPES, FAMILIES
from benchmarks.kernels.launches import Launch, launches_of
from benchmarks.kernels.sass import Code, listing_of, loops
from kernels.dispatch import INTERPRETED, expect

# Shared memory that one block may ask for, in bytes (CUDA programming guide, compute capabilities).
# 8.0 tiles also serve 8.6, 8.9 and 12.0, which have the least.
SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# What the reports look for in a kernel's code: tensor-core products and bulk copies (TMA).
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk")


@dataclass(frozen=True)
class Report:
    """What the compiler made of a launch. spill: bytes per thread; shared: bytes per block."""

    arch: int
    registers: int
    spill: int
    shared: int
    instructions: tuple[str, ...]
    loops: tuple[str, ...] = ()

    def fits(self, may_spill: bool) -> bool:
        return (self.spill == 0 or may_spill) and self.shared <= SHARED_MEMORY[self.arch]

    def __str__(self) -> str:
        return (
            f"sm_{self.arch:<4} {self.registers:>3} registers {self.spill:>4} B spilled {self.shared:>6} B shared  "
            f"{' '.join(self.instructions) or '-':<39}"
        )


def jobs(architectures: Sequence[int], only: str) -> dict[Launch, tuple[str, bool]]:
    """The different launches of all cases, each with its name, in which `only` is found, and whether it may spill."""
    found: dict[Launch, tuple[str, bool]] = {}
    for family, (dtype, kind) in itertools.product(FAMILIES, DTYPES.items()):
        for case in import_module(f"benchmarks.kernels.{family}").compiled(kind):
            suited = [arch for arch in architectures if arch == 90 or case.impl != "gluon"]
            for launch in [launch for arch in suited for launch in launches_of(case, arch)]:
                name = f"{launch.kernel.removesuffix('_kernel')} {dtype} {launch.constants} of {case.name}"
                if launch not in found and re.search(only, name):
                    found[launch] = name, case.may_spill
    return found


def account_of(ptx: str, arch: int) -> str:
    """What the assembler says of registers, spills and its difficulties."""
    tools = knobs.nvidia
    ptxas = (tools.ptxas_blackwell if arch >= 100 else tools.ptxas).path
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target, "the PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx, encoding="utf-8")
        return subprocess.run(
            [ptxas, "-v", f"-arch={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip


def report_of(launch: Launch) -> Report:
    """Compile, and read the assembler's account."""
    compiled = launch.compile()
    account = account_of(compiled.asm["ptx"], launch.arch)
    registers = re.search(r"Used (\d+) registers", account)
    spill = re.findall(r"(\d+) bytes spill", account)
    assert registers, account
    assert spill, account
    return Report(
        launch.arch, int(registers[1]), sum(map(int, spill)), compiled.metadata.shared,
        tuple(word for word in INSTRUCTIONS if word in compiled.asm["ptx"]),
        tuple(loop.text(compiled.metadata.num_warps) for loop in loops(Code(listing_of(compiled.asm["cubin"]))))
        if launch.arch == 90 else (),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--only", default="", help="compile only the kernels whose name matches this expression")
    options = parser.parse_args(arguments)
    expect(not INTERPRETED, "found TRITON_INTERPRET=1, expected compiled kernels: unset it and run again")
    found = jobs(options.arch, options.only)
    expect(bool(found), f"--only: found no kernel whose name matches {options.only!r}")
    all_fit = True
    # Fresh processes: Triton's compiler must not be forked.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        for (name, may_spill), report in zip(found.values(), workers.map(report_of, found), strict=True):
            fits = report.fits(may_spill)
            print(f"{report} {name}{'' if fits else '  DOES NOT FIT'}", flush=True)
            for loop in report.loops:
                print(f"        loop: {loop}", flush=True)
            all_fit &= fits
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())
