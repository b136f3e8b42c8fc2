"""The rotary position encoding kernel, in the three ways that it is used."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernels.aot.compile import Case
from kernels.rope import HEADS, rope_kernel, tile_of

HEAD_WIDTHS = (64, 80, 128, 256)
TYPES = {"positions_ptr": "*i64", "frequencies_ptr": "*fp32"}
USES = {
    "qkv forward": {"UNPACK": True, "INVERSE": False},
    "qkv backward": {"UNPACK": False, "INVERSE": True},
    "forward": {"UNPACK": False, "INVERSE": False},
}


def cases(arch: int) -> Iterator[Case]:
    for D in HEAD_WIDTHS:
        tokens, pairs = tile_of(D)
        for dtype in ("bf16", "fp16", "fp32"):
            shape = {"D": D, "TOKENS": tokens, "PAIRS": pairs, "HEADS": HEADS}
            for use, constants in USES.items():
                name = f"rope {use} {dtype} D={D}"
                yield Case(name, rope_kernel, dtype, shape | constants, TYPES, may_spill=dtype == "fp32")
