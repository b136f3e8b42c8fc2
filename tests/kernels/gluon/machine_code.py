"""What the machine code of the Gluon kernels must show, else they are right and slow (docs/kernels.md).

`python tests/kernels/gluon/machine_code.py` compiles them for sm_90 and prints registers, loops and faults.
Each check takes what benchmarks/kernels/sass.py reads, and returns the faults that it has found.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from benchmarks.kernels.aot import account_of
from benchmarks.kernels.attention import HOPPER, case
from benchmarks.kernels.case import name_of
from benchmarks.kernels.launches import launches_of
from benchmarks.kernels.sass import PRODUCT, Code, innermost, listing_of, loops, shortest, walked

GLUON = "kernels.attention.gluon."
WARPGROUP = 128  # threads
# Of a consumer's warp for 64 queries and 128 keys at D = 128, so that they are issued while the products run.
MOST_INSTRUCTIONS = 460
# By module, the events of a way round the main loop (event_of). S = Q K^T, dP = dO V^T; "exp" is the softmax.
SCHEDULES = {
    "forward": r"ss\d+ rs\d+ wait1 exp wait0",  # S of the next tile, P V of this one, beside which the softmax runs
    "dkdv": r"ss\d+ wait1 exp rs\d+ wait1 rs\d+ wait0",  # S and dP; the softmax beside dP; P dO; dP is there; dS Q
    "dq": r"ss\d+ rs\d+ wait2 exp wait1 wait0",  # S and dP of the next tile, dS K of this one; beside it the softmax
}
SET_REGISTERS = re.compile(r"USETMAXREG\.(?:TRY_ALLOC|DEALLOC)\S* (?:UP\d, )?0x([0-9a-f]+)")


WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
BARRIER = re.compile(r"BAR\.\S+ [^,]+(?:, (0x[0-9a-f]+))?")


class Loop(NamedTuple):
    """instructions: of each warp on the shortest way round with a product. barriers: of each the threads that wait
    there, 0 for all of the program's. ways: the events of each way round.
    """

    instructions: int
    barriers: tuple[int, ...]
    ways: frozenset[str]


class Part(NamedTuple):
    """The code from where a warpgroup sets its number of registers up to where it sets another.

    registers: what it sets; named: how many its instructions name; products: whether it has any.
    """

    registers: int
    named: int
    products: bool


def named(instruction: str) -> int:
    """One more than the highest register of the instruction."""
    more = 3 if "128 " in instruction or ".128." in instruction else 1 if ".64" in instruction else 0
    numbers = [int(found) for found in re.findall(r"\bR(\d+)\b", instruction)]
    if product := PRODUCT.match(instruction):  # fp32 sums of 64 x N over 128 threads; a left operand of four registers
        return max(numbers[0] + int(product[1]) // 2, max(numbers) + 4)
    return max(numbers, default=-1 - more) + more + 1


def parts(code: Code) -> Iterator[Part]:
    for start, text in enumerate(code.instructions):
        if found := SET_REGISTERS.match(text):
            others = {at for at, x in enumerate(code.instructions) if SET_REGISTERS.match(x)}
            _, places = walked(code.following, start, set(range(len(code.instructions))) - others)
            body = [code.instructions[at] for at in places]
            yield Part(int(found[1], 16), max(map(named, body)), any(map(PRODUCT.match, body)))


def event_of(instruction: str) -> str:
    """ss128, rs128: a product of N = 128 whose left operand comes from shared memory, from registers; wait1: until at
    most one group of products is in flight; exp: an exponential; "": anything else.
    """
    if found := PRODUCT.match(instruction):
        return f"{'ss' if found[2] else 'rs'}{found[1]}"
    if found := WAIT.match(instruction):
        return f"wait{found[1]}"
    return "exp" if instruction.startswith("MUFU.EX2") else ""


def ways(code: Code, first: int, body: set[int]) -> frozenset[str]:
    """The events of every way from the first place to where it is reached again; of a run of equal ones the first."""
    back, order = walked(code.following, first, body)
    known: dict[int, set[tuple[str, ...]]] = {}
    for at in order:
        event = event_of(code.instructions[at])
        after = [known[to] for to in code.following[at] if to in body and (at, to) not in back]
        after += [{()}] * (first in code.following[at])
        known[at] = {
            way if not event or way[:1] == (event,) else (event, *way) for found in after for way in found
        }  # fmt: skip
    return frozenset(" ".join(way) for way in known[first])


def main_loops(code: Code) -> list[Loop]:
    """The innermost loops with products."""
    found = []
    for first, places in innermost(code).items():
        hits = [hit for at in sorted(places) if (hit := BARRIER.match(code.instructions[at]))]
        barriers = tuple(int(hit[1] or "0", 16) for hit in hits)
        found.append(Loop(shortest(code, first, places), barriers, ways(code, first, places)))
    return found


def out_of_order(loops: Sequence[Loop], schedule: str) -> list[str]:
    """Ways round a main loop, which has products of both kinds, that neither follow the schedule nor do nothing."""
    both = [loop for loop in loops if all(kind in " ".join(loop.ways) for kind in ("ss", "rs"))]
    found = [way for loop in both for way in sorted(loop.ways) if way and not follows(way, schedule)]
    missing = [] if both else ["no loop has products of both kinds"]
    return missing + [f"a way round a loop is: {way}; expected {schedule}" for way in found]


def follows(way: str, schedule: str) -> bool:
    """Wherever the loop begins, be it within a run of equal events."""
    events = way.split()
    events = events[: len(events) - (events[:1] == events[-1:])]
    return any(re.fullmatch(schedule, " ".join(events[at:] + events[:at])) for at in range(len(events)))


def spilled(code: Code) -> list[str]:
    moves = sum(text.startswith(("LDL", "STL")) for text in code.instructions)
    return [f"{moves} moves to and from spilled registers, expected none"] if moves else []


def wide_barriers(loops: Sequence[Loop]) -> list[str]:
    """Barriers in loops at which other warpgroups wait too: they keep consumers and producer in step."""
    wide = [threads or "all" for loop in loops for threads in loop.barriers if threads not in range(1, WARPGROUP + 1)]
    return [f"barriers of {', '.join(map(str, wide))} threads in loops, expected at most {WARPGROUP}"] if wide else []


def registers_missing(parts: Sequence[Part]) -> list[str]:
    """A part that names more registers than it has, and kernels of which no part sets any."""
    if not any(part.products for part in parts):
        return ["no warpgroup with products sets its number of registers"]
    return [
        f"{part.named} registers named, expected at most the {part.registers} set" for part in parts
        if part.named > part.registers
    ]  # fmt: skip


def serialised(account: str) -> list[str]:
    """Whether the assembler says that it waits after every product."""
    return [line.strip() for line in account.splitlines() if "serialized" in line]


def too_long(loops: Sequence[Loop], most: int = MOST_INSTRUCTIONS) -> list[str]:
    return [
        f"a loop of {loop.instructions} instructions, expected at most {most}" for loop in loops
        if loop.instructions > most
    ]  # fmt: skip


def faults(kernel: str, code: Code, account: str) -> list[str]:
    """All that a kernel has, of SCHEDULES. account: what the assembler prints."""
    found = main_loops(code)
    return [
        *serialised(account), *spilled(code), *wide_barriers(found), *registers_missing(list(parts(code))),
        *out_of_order(found, SCHEDULES[kernel]), *(too_long(found) if kernel == "forward" else []),
    ]  # fmt: skip


def text(code: Code) -> str:
    """The registers of the consumers and of the producer."""
    found = list(parts(code))
    least = min(found, key=lambda part: (part.registers, -part.named))
    shown = [f"{part.named} of {part.registers}" for part in [*(part for part in found if part.products), least]]
    return f"registers named, of those set: consumers {', '.join(shown[:-1])}, producer {shown[-1]}"


def changed(kernel: str, source: Path) -> None:
    """Let a file stand for the module of a kernel."""
    spec = importlib.util.spec_from_file_location(GLUON + kernel, source)
    assert spec and spec.loader, source
    sys.modules[GLUON + kernel] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[GLUON + kernel])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--plain", action="store_true", help="no windows and documents, and bf16 alone")
    parser.add_argument("--source", type=Path, help="a file in place of the one kernel's module")
    options = parser.parse_args(arguments)
    if options.source:
        changed(*options.kernels, options.source)
    forms, dtypes = HOPPER[: 1 if options.plain else None], [torch.bfloat16, torch.float16][: 1 if options.plain else 2]
    wrong = 0
    for shape, dtype in [(replace(form, D=D), dtype) for D in options.widths for form in forms for dtype in dtypes]:
        for launch in launches_of(case(torch.device("cpu"), dtype, shape), 90):
            kernel = launch.module.removeprefix(GLUON)
            if kernel not in options.kernels:
                continue
            compiled = launch.compile()
            code, account = Code(listing_of(compiled.asm["cubin"])), account_of(compiled.asm["ptx"], 90)
            print(f"{kernel} {name_of(dtype)} {launch.constants}: {compiled.metadata.shared} B shared, {text(code)}")
            for loop, main_loop in zip(loops(code), main_loops(code), strict=True):
                print(f"    loop: {loop.text(4)}; {', or '.join(sorted(filter(None, main_loop.ways)))}")
            found = faults(kernel, code, account)
            print(*(f"    FAULT: {fault}" for fault in found), sep="\n", end="\n" * bool(found), flush=True)
            wrong += len(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
