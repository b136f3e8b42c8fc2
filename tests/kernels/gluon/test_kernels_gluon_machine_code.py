"""Faults of a schedule are found in machine code: in listings by hand, and where the assembler itself makes one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels.sass import Code
from machine_code import (
    SCHEDULES,
    faults,
    main_loops,
    named,
    out_of_order,
    parts,
    registers_missing,
    serialised,
    spilled,
    text,
    too_long,
    wide_barriers,
)

SCORES = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0"
SUM = "HGMMA.64x64x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88, gsb0"
ONE, NONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
TWO = "WARPGROUP.DEPBAR.LE gsb0, 0x2"
EXP = "MUFU.EX2 R25, R25"
OWN, ALL = "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "BAR.SYNC.DEFER_BLOCKING 0x1"
GOOD = [SCORES, SUM, ONE, OWN, EXP, EXP, NONE]
ROOT = Path(__file__).resolve().parents[3]


def kernel(*body: str, registers: int = 0xF0, behind: tuple[str, ...] = ()) -> Code:
    """A consumer with this loop, and a producer. "label NAME" is a place to branch to."""
    lines = [
        "USETMAXREG.DEALLOC.CTAPOOL 0x78", ALL, "@P0 BRA `(.L_x_9)",
        "label .L_x_0", f"USETMAXREG.TRY_ALLOC.CTAPOOL UP0, {registers:#x}",
        "@!P0 BRA `(.L_x_0)", ALL, "label .L_x_1", *body, "@P1 BRA `(.L_x_1)", ALL,
        "USETMAXREG.DEALLOC.CTAPOOL 0x78", "EXIT",
        "label .L_x_9", "USETMAXREG.DEALLOC.CTAPOOL 0x18", "MOV R17, R2", "EXIT", *behind,
    ]  # fmt: skip
    shown = [
        line.removeprefix("label ") + ":" if line.startswith("label ") else f"        /*{at:04x}*/ {line} ;"
        for at, line in enumerate(lines)
    ]
    return Code("\n".join(shown))


def disorder(code: Code, of: str = "forward") -> list[str]:
    return out_of_order(main_loops(code), SCHEDULES[of])


def test_a_schedule_without_faults() -> None:
    code = kernel(*GOOD)
    assert faults("forward", code, "ptxas info    : Used 168 registers") == []
    assert text(code) == "registers named, of those set: consumers 156 of 240, producer 18 of 24"


@pytest.mark.parametrize("turns", range(len(GOOD)))
def test_a_loop_may_begin_anywhere(turns: int) -> None:
    assert disorder(kernel(*GOOD[turns:], *GOOD[:turns])) == []


@pytest.mark.parametrize(
    ("body", "way"),
    [
        ([SCORES, SUM, ONE, NONE, EXP], "ss128 rs64 wait1 wait0 exp"),  # what ptxas makes within one basic block
        ([SCORES, SUM, NONE, EXP], "ss128 rs64 wait0 exp"),
        ([SCORES, ONE, SUM, EXP, NONE], "ss128 wait1 rs64 exp wait0"),
        ([SUM, SCORES, ONE, EXP, NONE], "rs64 ss128 wait1 exp wait0"),
        ([SCORES, SUM, ONE, EXP, NONE, EXP], "ss128 rs64 wait1 exp wait0 exp"),
        ([SCORES, EXP, SUM, ONE, EXP, NONE], "ss128 exp rs64 wait1 exp wait0"),
        ([SCORES, SUM, TWO, EXP, NONE], "ss128 rs64 wait2 exp wait0"),
        ([SCORES, SUM, EXP, NONE], "ss128 rs64 exp wait0"),
        ([SCORES, SUM, ONE, EXP], "ss128 rs64 wait1 exp"),
        ([SCORES, NONE, SUM, NONE, EXP], "ss128 wait0 rs64 wait0 exp"),
    ],
)
def test_another_order_is_found(body: list[str], way: str) -> None:
    (found,) = disorder(kernel(*body))
    assert found.startswith(f"a way round a loop is: {way};")


def test_another_order_on_one_way_alone_is_found() -> None:
    """The other way round is as it should be."""
    late = kernel(SCORES, SUM, ONE, "@P2 BRA `(.L_x_2)", NONE, "label .L_x_2", EXP, NONE)
    (found,) = disorder(late)
    assert ": ss128 rs64 wait1 wait0 exp wait0;" in found
    skipped = kernel(SCORES, SUM, ONE, EXP, "@P2 BRA `(.L_x_2)", NONE, "label .L_x_2", "NOP")
    assert len(disorder(skipped)) == 1
    left_out = kernel("@P2 BRA `(.L_x_2)", *GOOD, "label .L_x_2", "NOP")
    assert disorder(left_out) == [] and [loop.instructions for loop in main_loops(left_out)] == [len(GOOD) + 3]
    empty = kernel("@P2 BRA `(.L_x_2)", *GOOD, "BRA `(.L_x_3)", "label .L_x_2", EXP, "label .L_x_3", "NOP")
    assert disorder(empty)[0].startswith("a way round a loop is: exp;")
    spinning = ("label .L_x_3", EXP, "@!P1 BRA `(.L_x_3)", "BRA `(.L_x_2)")
    waiting = kernel(*GOOD[:-1], "@!P1 BRA `(.L_x_3)", "label .L_x_2", NONE, behind=spinning)
    assert disorder(waiting) == [], "what spins elsewhere is a part of the loop"
    waiting = kernel(*GOOD, "@!P1 BRA `(.L_x_3)", "label .L_x_2", "NOP", behind=spinning)
    assert ": ss128 rs64 wait1 exp wait0 exp;" in disorder(waiting)[0]
    masked = kernel(SCORES, SUM, ONE, "@P2 BRA `(.L_x_2)", "FSEL R24, R24, R3, P4", "label .L_x_2", EXP, NONE)
    assert disorder(masked) == []


def test_a_kernel_without_both_products_is_found() -> None:
    assert disorder(kernel(SCORES, ONE, EXP, NONE)) == ["no loop has products of both kinds"]


@pytest.mark.parametrize(
    ("barrier", "shown"),
    [
        (ALL, "all"),
        ("BAR.SYNC.DEFER_BLOCKING 0x1, 0x100", "256"),
        ("@P3 BAR.SYNC.DEFER_BLOCKING R4, R5", "all"),
        ("BAR.ARV 0x3, 0x180", "384"),
        (OWN, ""),
        ("BAR.SYNC.DEFER_BLOCKING 0x3, 0x20", ""),
    ],
)
def test_barriers_that_others_wait_at_too(barrier: str, shown: str) -> None:
    """Outside of the loop they are what begins and ends the parts."""
    found = wide_barriers(main_loops(kernel(*GOOD, barrier)))
    assert found == ([f"barriers of {shown} threads in loops, expected at most 128"] if shown else [])


@pytest.mark.parametrize("move", ["LDL.64 R2, [R1+0x8]", "STL [R1], R2"])
def test_spills_anywhere(move: str) -> None:
    assert spilled(kernel(*GOOD, move)) == ["1 moves to and from spilled registers, expected none"]


def test_registers() -> None:
    assert registers_missing(list(parts(kernel(*GOOD, registers=0x98)))) == [
        "156 registers named, expected at most the 152 set"
    ]
    assert registers_missing([]) == ["no warpgroup with products sets its number of registers"]
    shown = {SCORES: 88, SUM: 156, "LDS.128 R20, [R4]": 24, "LDG.E.64 R20, desc[UR4][R2.64]": 22, "NOP": 0, ALL: 0}
    shown |= {"R2UR UR4, R8": 9, "MOV R3, UR40": 4}
    assert {instruction: named(instruction) for instruction in shown} == shown


def test_length_and_the_assemblers_words() -> None:
    found = main_loops(kernel(*GOOD))
    assert too_long(found, 8) == []
    assert too_long(found, 7) == ["a loop of 8 instructions, expected at most 7"]
    account = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert serialised("ptxas info : Used 168 registers\n" + account) == [account]


def test_the_orders_of_the_backward_pass() -> None:
    keys = [SCORES, SCORES, ONE, EXP, SUM, ONE, SUM, NONE]
    queries = [SCORES, SCORES, SUM, TWO, EXP, ONE, NONE]
    for body, of in ((keys, "dkdv"), (queries, "dq"), (GOOD, "forward")):
        assert faults(of, kernel(*body), "") == []
        assert all(disorder(kernel(*body), other) for other in {*SCHEDULES} - {of})
    assert disorder(kernel(*keys[:2], NONE, *keys[3:]), "dkdv")
    assert disorder(kernel(*queries[:3], NONE, *queries[4:]), "dq")


def test_every_check_is_made() -> None:
    """The length is asked of the forward pass alone."""
    bad = kernel(SCORES, SUM, NONE, EXP, ALL, "STL [R1], R2", *["NOP"] * 460, registers=0x50)
    found = faults("forward", bad, "serialized")
    assert len(found) == 6
    assert len(faults("dq", bad, "serialized")) == 5


def compiled(*arguments: str) -> tuple[int, str]:
    """The exit code and output of the report: Triton's mode is fixed on import, so compiling takes its own process."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests/kernels/gluon/machine_code.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("D", ["64", "128"])
@pytest.mark.parametrize("kernel", SCHEDULES)
def test_the_kernels_have_no_fault(kernel: str, D: str) -> None:
    """In both types, with windows and documents and without."""
    code, printed = compiled("--kernels", kernel, "--widths", D)
    assert code == 0, printed
    assert printed.count(f"{kernel} ") == 4
    assert printed.count("    loop: ") == 8


BRANCH = "        await_tile(keys, i + 1, K_STAGES, i + 1 < n)\n"
WAIT = "        acc, p, weights = warpgroup_mma_wait(0, deps=(acc, p, weights))\n"
FIRST = "warpgroup_mma_wait({}, deps=(scores,))"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "old", "new", "fault"),
    [
        ("forward", BRANCH + WAIT, WAIT + BRANCH, "ss128 rs128 wait1 wait0 exp;"),  # the assembler lifts the wait
        ("forward", FIRST.format(1), FIRST.format(0), "rs128 wait0 exp"),
        ("forward", "    if partial:", "    if True:", "instructions, expected at most 460"),
        ("forward", "[240, 24]", "[152, 24]", "spilled registers, expected none"),
        ("dkdv", "[240, 24]", "[208, 24]", "serialized due to insufficient register resources"),
        ("dkdv", FIRST.format(1), FIRST.format(0), "ss64 wait0 exp"),
        ("dq", FIRST.format(2), FIRST.format(0), "rs128 wait0 exp"),
    ],
)
def test_what_spoils_a_schedule_is_found(kernel: str, old: str, new: str, fault: str, tmp_path: Path) -> None:
    """In the machine code of the kernel with one change, which computes the same."""
    source = (ROOT / f"kernels/attention/gluon/{kernel}.py").read_text()
    assert old in source
    (tmp_path / "changed.py").write_text(source.replace(old, new))
    arguments = ["--kernels", kernel, "--widths", "128", "--plain", "--source", str(tmp_path / "changed.py")]
    code, printed = compiled(*arguments)
    assert code == 1
    assert any(fault in line for line in printed.splitlines() if "    FAULT: " in line), printed
