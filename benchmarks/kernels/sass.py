"""What the assembler made of a kernel's loops, read from its machine code, and what bounds them on a Hopper GPU.

The model, for one program of a multiprocessor: a product m64nNk16 takes max(N / 2, N / 4 + 16 if its left operand comes
from shared memory) clocks, at 4096 operations and 128 bytes of shared memory a clock; four schedulers issue an
instruction of a warp each clock; exp2 runs 16 a clock. The loop takes at least the longest of the three, which is right
where all overlap, and their sum's two greatest, products and issue, where nothing does.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\S* \w+, (gdesc)?")
LINE = re.compile(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]+\*/\s+((?:@!?U?P\w+ )?)([A-Z][^;]*);)", re.MULTILINE)


@dataclass(frozen=True)
class Loop:
    """instructions: of each warp on the shortest way round. Of all ways: products by their N, and whether the left
    operand comes from shared memory; waits for products; barriers; exponentials; moves to and from spilled registers.
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


def shortest(code: Sequence[tuple[str, str]], labels: dict[str, int], first: int, last: int) -> int:
    """Instructions from `first` to `last`, by the branches that leave out most. code: (predicate, instruction)."""
    left = {last: 1}
    for at in range(last - 1, first - 1, -1):
        ways = [left[at + 1]]
        target = target_of(code[at][1], labels)
        if target is not None and at < target <= last:
            ways = [left[target]] + (ways if code[at][0] else [])
        left[at] = 1 + min(ways)
    return left[first]


def target_of(instruction: str, labels: dict[str, int]) -> int | None:
    found = re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction)
    return labels[found[1]] if found else None


def loops(listing: str) -> Iterator[Loop]:
    """The innermost loops with products, in their order, of what nvdisasm prints."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for label, predicate, instruction in LINE.findall(listing):
        if label:
            labels[label] = len(code)
        else:
            code.append((predicate, instruction.strip()))
    targets = ((target_of(instruction, labels), at) for at, (_, instruction) in enumerate(code))
    regions = [(first, last) for first, last in targets if first is not None and first <= last]
    for first, last in regions:
        body = [instruction for _, instruction in code[first : last + 1]]
        products = Counter(
            (int(found[1]), bool(found[2])) for instruction in body if (found := PRODUCT.match(instruction))
        )
        inner = any((first, last) != other and first <= other[0] and other[1] <= last for other in regions)
        if products and not inner:
            waits, barriers, exponentials = (
                sum(x.startswith(word) for x in body) for word in ("WARPGROUP.DEPBAR", "BAR.", "MUFU.EX2")
            )
            spills = sum(x.startswith(("LDL", "STL")) for x in body)
            yield Loop(shortest(code, labels, first, last), products, waits, barriers, exponentials, spills)


def listing_of(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
