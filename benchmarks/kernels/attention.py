"""The cases of causal attention, in bfloat16, at the shapes of FlashAttention, tritonbench and GPT presets.

Tensors are [B, T, H, D]. Operations are counted as FlashAttention does: forward 4 D per head and visible pair of
positions, T^2 / 2 pairs without a window; backward 2.5 times that, even if a kernel computes some of them again.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.case import Case, Contest, Function, Loader, loaders, normal, sequence, setups, timed_dtype
from kernels.attention import Strided, attention, attention_with_lse
from kernels.attention.gluon import why_not_gluon
from kernels.philox import DropoutKey

LONGEST_REFERENCE = 2048  # it stores every weight in fp32
FLEX_LENGTHS = (2048, 8192)  # FlexAttention compiles for seconds at each shape
FLASH = {"FA2": "flash_attn.flash_attn_interface", "FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
GLUON = "ingot, gluon"
KEY = DropoutKey(0.1, 1, 2)


@dataclass(frozen=True)
class Shape:
    """Sizes, and what is switched on. K: key/value heads, 0 for as many as H. window: keys seen by a query. documents:
    how many are packed into the B * T tokens, 0 for one a row. atomics: the backward pass that is not deterministic.
    lse: whether it is a result too. expanded: the batch is one row seen B times, which no TMA descriptor can stand for.
    gluon: the kernels for Hopper alone.
    """

    B: int
    T: int
    H: int
    D: int
    K: int = 0
    window: int | None = None
    documents: int = 0
    sparse: Strided | None = None
    softcap: float = 0.0
    dropout: DropoutKey | None = None
    atomics: bool = False
    lse: bool = False
    expanded: bool = False
    gluon: bool = False

    def __str__(self) -> str:
        return " ".join(f"{name}={x}" if type(x) is int else name for name, x in vars(self).items() if x)


LENGTHS = [(32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384)]
SHAPES = {
    **{f"D={D}": [Shape(B, T, 2048 // D, D) for B, T in LENGTHS] for D in (64, 128)},
    "H=48 D=128": [Shape(4, T, 48, 128) for T in (1024, 2048, 4096, 8192)],
    # GPT presets: 124M, 350M, 6.7B at two lengths; 1.3B is among the lengths at D=128.
    "presets": [
        Shape(16, 1024, 12, 64), Shape(16, 1024, 16, 64), Shape(8, 2048, 32, 128), Shape(4, 4096, 32, 128),
        Shape(2, 8192, 32, 128, K=8),
    ],
    "masks": [Shape(1, 16384, 16, 128, window=1024), Shape(1, 16384, 16, 128, documents=16)],
}  # fmt: skip
SMALL = {"": [Shape(2, 64, 2, 16)], "masks": [Shape(1, 64, 4, 16, K=2, window=16)]}

# Of the kernels that are compiled. Grouped heads, and numbers of them that 16 does not divide: the general case.
HEAD_WIDTHS = (16, 32, 40, 64, 80, 96, 128, 192, 256)
PLAIN = Shape(2, 528, 6, 64, K=2)
ALL = replace(PLAIN, documents=3, softcap=30.0, dropout=KEY)
SOME_FORMS = [PLAIN, replace(PLAIN, dropout=KEY), ALL, replace(ALL, sparse=Strided(64, 2, 4))]
HOPPER = [replace(PLAIN, gluon=True), replace(PLAIN, window=100, documents=3, gluon=True)]
FORMS = [
    *SOME_FORMS, replace(PLAIN, softcap=30.0), replace(PLAIN, window=100), replace(PLAIN, documents=3),
    replace(PLAIN, T=256), replace(ALL, T=256), replace(PLAIN, sparse=Strided(64, 2, 4)),
]  # fmt: skip


def case(device: torch.device, dtype: torch.dtype, shape: Shape) -> Case:
    rows, T, H, D, K = 1 if shape.expanded else shape.B, shape.T, shape.H, shape.D, shape.K or shape.H
    tensors = normal(device, dtype, *((rows, T, heads, D) for heads in (H, K, K, H)))
    q, k, v, do = (tensor.expand(shape.B, -1, -1, -1) for tensor in tensors)
    function = partial(attention_with_lse if shape.lse else attention, **options_of(shape, device))
    gradients = (do, torch.randn(shape.B, H, T, device=device)) if shape.lse else (do,)
    impl = "gluon" if shape.gluon else "triton"
    return Case(str(shape), function, (q, k, v), gradients, may_spill=dtype == torch.float32, impl=impl)


def options_of(shape: Shape, device: torch.device) -> dict[str, Any]:
    """What attention takes beside q, k and v. cu_seqlens int32 [documents + 1]: their starts and the end."""
    names = ("window", "sparse", "softcap", "dropout")
    options = {name: getattr(shape, name) for name in names if getattr(shape, name)}
    if shape.dropout is not None:
        options["samples"] = torch.arange(shape.B, device=device)
    if shape.documents:
        tokens = shape.B * shape.T
        torch.manual_seed(0)
        inner = (torch.randperm(tokens - 1)[: shape.documents - 1] + 1).sort().values
        starts = torch.cat([torch.tensor([0]), inner, torch.tensor([tokens])])
        options["cu_seqlens"] = starts.to(torch.int32).to(device)
    return options | ({"deterministic": False} if shape.atomics else {})


def compiled(dtype: torch.dtype) -> Iterator[Case]:
    """Every form at the common widths in bf16, fewer elsewhere; both backward passes; loads by TMA and by pointers."""
    for D in HEAD_WIDTHS:
        common = D in (64, 128)
        forms = FORMS if common else SOME_FORMS
        if dtype != torch.bfloat16:
            forms = SOME_FORMS if common else [PLAIN]
        for form in [replace(form, D=D) for form in forms]:
            for atomics in (False, True):
                for expanded in (False, True):
                    yield case(torch.device("cpu"), dtype, replace(form, atomics=atomics, expanded=expanded))
        yield case(torch.device("cpu"), dtype, replace(PLAIN, D=D, lse=True))
    for form in [replace(form, D=D) for form in HOPPER for D in (64, 128) if dtype != torch.float32]:
        yield case(torch.device("cpu"), dtype, form)


def contests(device: torch.device, small: bool) -> Iterator[Contest]:
    for group, shapes in (SMALL if small else SHAPES).items():
        for shape in shapes:
            yield from contests_of(device, timed_dtype(small), group, shape)


def contests_of(
    device: torch.device, dtype: torch.dtype, group: str, shape: Shape, only: Collection[str] | None = None
) -> Iterator[Contest]:
    """Both passes at a shape. only: the rivals to have (None: all)."""
    given = case(device, dtype, shape)
    queries, keys = (t.numel() * t.itemsize for t in given.tensors[:2])
    lse, flops = 4 * shape.B * shape.T * shape.H, 4 * shape.H * shape.D * visible_pairs(shape)
    # q, k, v -> o, lse; then q, k, v, o, do, lse -> dq, dk, dv.
    for part, passes, operations in (("forward", 2, flops), ("backward", 4, 2.5 * flops)):
        chosen = {name: load for name, load in found(shape, part, given).items() if only is None or name in only}
        moved = passes * (queries + keys) + lse
        yield Contest(
            "attention", part, given.name, "sequence length", shape.T, dtype, moved,
            setups(given, part, chosen), operations, group,
        )  # fmt: skip


def visible_pairs(shape: Shape) -> float:
    """Pairs of a query and a key that it sees, over the batch."""
    if shape.documents:
        starts = options_of(shape, torch.device("cpu"))["cu_seqlens"]
        return float(starts.diff().double().square().sum() / 2)
    if shape.window is not None:
        return shape.B * float((torch.arange(shape.T) + 1).clamp_max(shape.window).sum())
    return shape.B * shape.T**2 / 2


def found(shape: Shape, part: str, given: Case) -> dict[str, Loader]:
    """Who can attend with this mask, by name."""
    device = given.tensors[0].device
    options = options_of(shape, device)
    ours = {"ingot": loaders(given)["ingot"]}
    if part == "backward" and device.type == "cuda":
        ours["ingot, atomics"] = lambda: partial(given.function, impl="triton", deterministic=False)
    if on_hopper(shape, device):
        ours[GLUON] = lambda: partial(given.function, impl="gluon")
    if shape.T <= LONGEST_REFERENCE:
        ours["reference"] = loaders(given)["reference"]
    if device.type != "cuda":
        return ours
    others: dict[str, Loader] = {}
    if not options:
        others["SDPA flash"] = lambda: partial(stock, SDPBackend.FLASH_ATTENTION)
        others["SDPA cuDNN"] = lambda: partial(stock, SDPBackend.CUDNN_ATTENTION)
    if shape.documents:
        others["torch varlen"] = lambda: torch_varlen(options["cu_seqlens"])
    if shape.T in FLEX_LENGTHS or options:
        others["FlexAttention"] = lambda: flex(shape.T, device, **options)
    return ours | others | {name: partial(flash_attention, module, **options) for name, module in FLASH.items()}


def on_hopper(shape: Shape, device: torch.device) -> bool:
    """Whether the Gluon kernels take this shape there."""
    p = shape.dropout.p if shape.dropout else 0.0
    return why_not_gluon(device, torch.bfloat16, shape.D, p, shape.sparse is not None, shape.softcap) is None


def stock(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's operator, which takes [B, H, T, D], held to one of its implementations."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            is_causal=True, enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)  # fmt: skip


def flex(T: int, device: torch.device, window: int | None = None, cu_seqlens: Tensor | None = None) -> Function:
    """FlexAttention, compiled, with the mask as blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.zeros(T, dtype=torch.int32, device=device)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, torch.arange(T, device=device, dtype=torch.int32), right=True)

    def causal(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return row >= col

    def windowed(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (row >= col) & (row - col < (window or T))

    def within_document(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (row >= col) & (document[row] == document[col])

    rule = within_document if cu_seqlens is not None else causal if window is None else windowed
    blocks = create_block_mask(rule, None, None, T, T, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out: Any = compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return attend


def flash_attention(module: str, window: int | None = None, cu_seqlens: Tensor | None = None) -> Function:
    """FlashAttention 2, 3 or 4, whose functions agree in these arguments. Its backward pass adds atomically."""
    package = import_module(module)
    options: dict[str, Any] = {"causal": True}
    if window is not None:
        options["window_size"] = (window - 1, 0)  # the keys before the query's own
    if cu_seqlens is None:
        return lambda q, k, v: sequence(package.flash_attn_func(q, k, v, **options))[0]
    options |= {f"cu_seqlens_{of}": cu_seqlens for of in "qk"}
    options |= {f"max_seqlen_{of}": int(cu_seqlens.diff().max()) for of in "qk"}
    return packed(partial(package.flash_attn_varlen_func, **options))


def torch_varlen(starts: Tensor) -> Function:
    """PyTorch's own function for packed documents."""
    from torch.nn.attention.varlen import varlen_attn

    longest = int(starts.diff().max())
    return packed(lambda q, k, v: varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0)))


def packed(function: Callable[..., Any]) -> Function:
    """`function` of q, k, v [B * T, heads, D] as one of [B, T, heads, D]."""
    return lambda q, *kv: sequence(function(*(x.flatten(0, 1) for x in (q, *kv))))[0].view(q.shape)
