"""What the assembler made of a kernel's loops, read from its machine code, and what bounds them on a Hopper GPU.

The model, for one program of a multiprocessor: a product m64nNk16 takes max(N / 2, N / 4 + 16 if its left operand comes
from shared memory) clocks, at 4096 operations and 128 bytes of shared memory a clock; four schedulers issue an
instruction of a warp each clock; exp2 runs 16 a clock. The loop takes at least the longest of the three, which is right
where all overlap, and their sum's two greatest, products and issue, where nothing does.
"""

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\S* \w+, (gdesc)?")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
BARRIER = re.compile(r"BAR\.\S+ [^,]+(?:, (0x[0-9a-f]+))?")
LINE = re.compile(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]+\*/\s+((?:@!?U?P\w+ )?)([A-Z][^;]*);)", re.MULTILINE)
Edges = list[list[int]]


class Code:
    """A kernel's instructions in the order of their addresses, and the places that may follow each."""

    def __init__(self, listing: str) -> None:
        """listing: what nvdisasm prints."""
        self.instructions: list[str] = []
        predicates, labels = list[str](), dict[str, int]()
        for label, predicate, instruction in LINE.findall(listing):
            if label:
                labels[label] = len(self.instructions)
            else:
                predicates.append(predicate)
                self.instructions.append(instruction.strip())
        self.following: Edges = []
        for at, (predicate, text) in enumerate(zip(predicates, self.instructions, strict=True)):
            ends = not predicate and re.match(r"BRA\S* `|BRX|EXIT|RET", text)
            targets = [labels[x] for x in re.findall(r"\.L_x_\d+", text)] if text.startswith("BR") else []
            self.following.append(targets + [at + 1] * (not ends and at + 1 < len(predicates)))


@dataclass(frozen=True)
class Loop:
    """instructions: of each warp on the shortest way round with a product. Of all ways: products by their N and whether
    the left operand comes from shared memory; waits for products; the threads of each barrier, 0 for all of the
    program's; exponentials; moves to and from spilled registers. ways: the events of each way round (event_of).
    """

    instructions: int
    products: Counter[tuple[int, bool]]
    waits: int
    barriers: tuple[int, ...]
    exponentials: int
    spills: int
    ways: frozenset[str]

    def of_peak(self, warps: int) -> tuple[float, float]:
        """Of the tensor cores' peak by the model: where nothing overlaps, and where all does."""
        ideal = sum(count * n / 2 for (n, _), count in self.products.items()) * warps / 4
        takes = sum(count * max(n / 2, (n / 4 + 16) * shared) for (n, shared), count in self.products.items())
        tensor, issue, special = takes * warps / 4, self.instructions * warps / 4, self.exponentials * warps * 2
        return ideal / (tensor + issue), ideal / max(tensor, issue, special)

    def text(self, warps: int) -> str:
        shapes = " ".join(
            f"{count} n{n}{' from shared' * shared}" for (n, shared), count in sorted(self.products.items())
        )
        low, high = self.of_peak(warps)
        return (
            f"{self.instructions} instructions, products {shapes}, {self.waits} waits, {len(self.barriers)} barriers, "
            f"{self.exponentials} exp2, {self.spills} spill moves: {low:.0%} to {high:.0%} of peak; "
            f"{', or '.join(sorted(filter(None, self.ways)))}"
        )


def event_of(instruction: str) -> str:
    """ss128, rs128: a product of N = 128 whose left operand comes from shared memory, from registers; wait1: until at
    most one group of products is in flight; exp: an exponential; "": anything else.
    """
    if found := PRODUCT.match(instruction):
        return f"{'ss' if found[2] else 'rs'}{found[1]}"
    if found := WAIT.match(instruction):
        return f"wait{found[1]}"
    return "exp" if instruction.startswith("MUFU.EX2") else ""


def walked(following: Edges, start: int, within: Collection[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """(edges that lead back to a place of the way to it, all places, each behind those that follow it)."""
    back, order, way = list[tuple[int, int]](), dict[int, None](), {start}
    stack = [(start, iter(following[start]))]
    while stack:
        at, left = stack[-1]
        to = next(left, None)
        if to is None:
            order[at] = None
            way.remove(at)
            stack.pop()
        elif to in way:
            back.append((at, to))
        elif to in within and to not in order:
            way.add(to)
            stack.append((to, iter(following[to])))
    return back, list(order)


def bodies(code: Code) -> dict[int, set[int]]:
    """The places of every loop by its first: those that lead back to it without passing it."""
    back, order = walked(code.following, 0, range(len(code.following)))
    before: dict[int, list[int]] = defaultdict(list)
    for at in order:
        for to in code.following[at]:
            before[to].append(at)
    found: dict[int, set[int]] = {}
    for last, first in back:
        body, todo = found.setdefault(first, {first}), [last]
        while todo:
            at = todo.pop()
            if at not in body:
                body.add(at)
                todo += before[at]
    return found


def shortest(code: Code, first: int, body: set[int]) -> int:
    """Instructions of the shortest way round with a product: other ways may leave a tile out."""
    products = {at for at in body if PRODUCT.match(code.instructions[at])}
    reached, steps = {(first, first in products)}, 1
    while not any(passed and first in code.following[at] for at, passed in reached):
        pairs = ((to, passed) for at, passed in reached for to in code.following[at] if to in body)
        reached = {(to, passed or to in products) for to, passed in pairs}
        steps += 1
    return steps


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


def loops(code: Code) -> Iterator[Loop]:
    """The innermost loops with products, in their order."""
    found = {
        first: body for first, body in sorted(bodies(code).items())
        if any(PRODUCT.match(code.instructions[at]) for at in body)
    }  # fmt: skip
    for first, places in found.items():
        if any(other < places for other in found.values()):
            continue
        body = [code.instructions[at] for at in sorted(places)]
        products = Counter((int(hit[1]), bool(hit[2])) for text in body if (hit := PRODUCT.match(text)))
        yield Loop(
            shortest(code, first, places), products,
            waits=sum(bool(WAIT.match(text)) for text in body),
            barriers=tuple(int(hit[1] or "0", 16) for text in body if (hit := BARRIER.match(text))),
            exponentials=sum(text.startswith("MUFU.EX2") for text in body),
            spills=sum(text.startswith(("LDL", "STL")) for text in body),
            ways=ways(code, first, places),
        )  # fmt: skip


def listing_of(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
