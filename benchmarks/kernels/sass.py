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
    the left operand comes from shared memory; waits for products; barriers; exponentials; spilled registers' moves.
    """

    instructions: int
    products: Counter[tuple[int, bool]]
    waits: int
    barriers: int
    exponentials: int
    spills: int

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
            f"{self.instructions} instructions, products {shapes}, {self.waits} waits, {self.barriers} barriers, "
            f"{self.exponentials} exp2, {self.spills} spill moves: {low:.0%} to {high:.0%} of peak"
        )


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


def innermost(code: Code) -> dict[int, set[int]]:
    """The places of the innermost loops with products, in their order, by the first of each."""
    products = {at for at, text in enumerate(code.instructions) if PRODUCT.match(text)}
    found = {first: body for first, body in sorted(bodies(code).items()) if body & products}
    return {first: body for first, body in found.items() if not any(other < body for other in found.values())}


def loops(code: Code) -> Iterator[Loop]:
    for first, places in innermost(code).items():
        body = [code.instructions[at] for at in sorted(places)]
        products = Counter((int(hit[1]), bool(hit[2])) for text in body if (hit := PRODUCT.match(text)))
        waits, barriers, exponentials = (
            sum(x.startswith(word) for x in body) for word in ("WARPGROUP.DEPBAR", "BAR.", "MUFU.EX2")
        )
        spills = sum(x.startswith(("LDL", "STL")) for x in body)
        yield Loop(shortest(code, first, places), products, waits, barriers, exponentials, spills)


def listing_of(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
