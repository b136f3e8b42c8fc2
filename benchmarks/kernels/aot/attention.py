"""The attention kernels with the tiles that they run with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernels.aot.compile import Case
from kernels.attention.backward import CAST_ELEMENTS, DELTA_ROWS, attention_delta_kernel, scale_and_cast_kernel
from kernels.attention.dkdv import attention_dkdv_kernel
from kernels.attention.dq import attention_dq_kernel
from kernels.attention.forward import attention_forward_kernel
from kernels.attention.parts import DOCUMENT_TOKENS, document_bounds_kernel
from kernels.attention.tiles import Tile, tile_for, tile_width

HEAD_WIDTHS = (16, 32, 40, 64, 80, 96, 128, 192, 256)
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = {
    "forward": attention_forward_kernel,
    "dkdv": attention_dkdv_kernel,
    "fused": attention_dkdv_kernel,
    "dq": attention_dq_kernel,
}
# What is switched on: DROPOUT, SOFTCAP, BOUNDED, SPARSE, LOCAL, STRIDE; and whether the sequences are short.
PLAIN = (False, False, False, 0, 1, 1)
FORMS = {
    "": (PLAIN, False),
    " dropout": ((True, False, False, 0, 1, 1), False),
    " softcap": ((False, True, False, 0, 1, 1), False),
    " window": ((False, False, True, 0, 1, 1), False),
    " documents": ((False, False, True, 0, 1, 1), False),
    " documents softcap dropout": ((True, True, True, 0, 1, 1), False),
    " short": (PLAIN, True),
    " short documents softcap dropout": ((True, True, True, 0, 1, 1), True),
    " sparse": ((False, False, False, 64, 2, 4), True),
    " sparse documents softcap dropout": ((True, True, True, 64, 2, 4), True),
}
SOME_FORMS = ("", " dropout", " documents softcap dropout", " sparse documents softcap dropout")
TYPES = {
    "lse_ptr": "*fp32", "dlse_ptr": "*fp32", "delta_ptr": "*fp32", "samples_ptr": "*i64", "starts_ptr": "*i32",
    "ends_ptr": "*i32", "cu_seqlens_ptr": "*i32", "scale": "fp32", "grad_scale": "fp32", "cap": "fp32",
    "keep_scale": "fp32", "log2_e": "fp32",
}  # fmt: skip


def attention_case(kind: str, dtype: str, D: int, tile: Tile, form: str) -> Case:
    dropout, softcap, bounded, sparse, local, stride = FORMS[form][0]
    constants: dict[str, Any] = {
        "D": D, "WIDTH": tile_width(D), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "DROPOUT": dropout,
        "SOFTCAP": softcap, "BOUNDED": bounded, "SPARSE": sparse, "LOCAL": local, "STRIDE": stride, "TMA": tile.tma,
    }  # fmt: skip
    types = dict(TYPES)
    if not dropout:
        constants["samples_ptr"] = None
    if "documents" not in form:
        constants |= {"starts_ptr": None} if kind in ("forward", "dq") else {"ends_ptr": None}
    if kind in ("dkdv", "fused"):
        constants |= {"FUSED": kind == "fused"} | ({"dq_ptr": None} if kind == "dkdv" else {})
    if kind == "fused":
        types["dq_ptr"] = "*fp32"
    if tile.tma:
        rows = {"q_ptr": tile.block_m, "do_ptr": tile.block_m, "k_ptr": tile.block_n, "v_ptr": tile.block_n}
        types |= {name: f"tensordesc<{dtype}[1, 1, {count}, {D}]>" for name, count in rows.items()}
    name = f"attention {kind} {dtype} D={D} {tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}"
    name += " tma" * tile.tma + form
    return Case(name, KERNELS[kind], dtype, constants, types, tile.warps, tile.stages, dtype == "fp32")


def configurations() -> Iterator[tuple[int, str, str]]:
    """(D, dtype, form): every form at the common widths in bf16, fewer elsewhere."""
    for D in HEAD_WIDTHS:
        for dtype in ("bf16", "fp16", "fp32"):
            common = D in (64, 128) and dtype == "bf16"
            for form in FORMS if common else SOME_FORMS if dtype == "bf16" or D in (64, 128) else ("",):
                yield D, dtype, form


def cases(arch: int) -> Iterator[Case]:
    """The attention kernels with the tiles that they run with on `arch`."""
    for D, dtype, form in configurations():
        switched, small = FORMS[form]
        for kind in KERNELS:
            for described in {tile_width(D) == D, False}:
                tile = tile_for(
                    kind, D, ITEMSIZE[dtype], arch // 10, crowded=any(switched[:2]), small=small, described=described
                )
                if tile.tma == described:
                    yield attention_case(kind, dtype, D, tile, form)
    for dtype in ITEMSIZE:
        for D in HEAD_WIDTHS:
            constants = {"D": D, "WIDTH": tile_width(D), "BLOCK_M": DELTA_ROWS}
            for name, none in (("delta", {"dlse_ptr": None}), ("delta lse", {})):
                yield Case(f"attention {name} {dtype} D={D}", attention_delta_kernel, dtype, constants | none, TYPES)
        cast = TYPES | {"x_ptr": "*fp32"}
        yield Case(f"attention cast {dtype}", scale_and_cast_kernel, dtype, {"BLOCK": CAST_ELEMENTS}, cast)
    yield Case("attention bounds", document_bounds_kernel, "i32", {"BLOCK": DOCUMENT_TOKENS}, TYPES)
