"""Compiling one kernel for a GPU that is not here, and reading what the assembler says of it."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one block may ask for, in bytes (CUDA programming guide, compute capabilities).
# 8.0 tiles also serve 8.6, 8.9 and 12.0, which have the least.
SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# What the reports look for in a kernel's code: tensor-core products and bulk copies (TMA).
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk")


@dataclass(frozen=True)
class Case:
    """One kernel with its compile-time constants, and how it is launched.

    dtype: Triton's name of the tensors' dtype ("bf16"). constants: the kernel's constexpr arguments, and arguments
    that are None. types: of the arguments that are neither a constant, nor a pointer (`*_ptr`) to `dtype`, nor a
    32-bit integer: for instance {"eps": "fp32", "mean_ptr": "*fp32"}. may_spill: whether a few spilled bytes are
    accepted (in fp32, to have more blocks on a multiprocessor).
    """

    name: str
    kernel: Any
    dtype: str
    constants: Mapping[str, Any]
    types: Mapping[str, str] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1
    may_spill: bool = False


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case. spill: bytes per thread; shared: bytes per block."""

    case: Case
    arch: int
    registers: int
    spill: int
    shared: int
    instructions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return (self.spill == 0 or self.case.may_spill) and self.shared <= SHARED_MEMORY[self.arch]

    def __str__(self) -> str:
        return (
            f"sm_{self.arch:<4} {self.case.name:<70} {self.registers:>4} registers "
            f"{self.spill:>6} B spilled {self.shared:>7} B shared  "
            f"{' '.join(self.instructions) or '-'}{'' if self.fits else '  DOES NOT FIT'}"
        )


def source_of(case: Case) -> ASTSource:
    """The kernel with types for its arguments: aligned pointers, 32-bit numbers, as a contiguous
    call gives.
    """
    signature, aligned = {}, {}
    known = {"pointer": f"*{case.dtype}", "number": "i32"}
    for index, name in enumerate(inspect.signature(case.kernel.fn).parameters):
        if name in case.constants:
            signature[name] = "constexpr"
        else:
            signature[name] = case.types.get(name, known["pointer" if name.endswith("_ptr") else "number"])
        if signature[name] != "constexpr" and (name.endswith("_ptr") or name.startswith("stride_")):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, dict(case.constants), aligned)


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
        tuple(word for word in INSTRUCTIONS if word in ptx),
    )  # fmt: skip
