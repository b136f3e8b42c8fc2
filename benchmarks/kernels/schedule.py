"""What the machine code of attention's Gluon kernels must show, else they are right and slow (docs/kernels.md).

Each check takes what sass.py reads and returns the faults that it has found.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.kernels.sass import PRODUCT, Code, Loop, loops, walked

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


def out_of_order(loops: Sequence[Loop], schedule: str) -> list[str]:
    """Ways round a main loop, which has products of both kinds, that neither follow the schedule nor do nothing."""
    both = [loop for loop in loops if {shared for _, shared in loop.products} == {False, True}]
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


def faults(module: str, code: Code, account: str) -> list[str]:
    """All that a Gluon kernel of that module has. account: what the assembler prints."""
    found, name = list(loops(code)), module.removeprefix(GLUON)
    return [
        *serialised(account), *spilled(code), *wide_barriers(found), *registers_missing(list(parts(code))),
        *out_of_order(found, SCHEDULES[name]), *(too_long(found) if name == "forward" else []),
    ]  # fmt: skip


def text(code: Code) -> str:
    """The registers of the consumers and of the producer."""
    found = list(parts(code))
    least = min(found, key=lambda part: (part.registers, -part.named))
    shown = [f"{part.named} of {part.registers}" for part in [*(part for part in found if part.products), least]]
    return f"registers named, of those set: consumers {', '.join(shown[:-1])}, producer {shown[-1]}"
