"""Causal attention at the shapes that FlashAttention, tritonbench and GPT presets are measured at, in bfloat16.

Tensors are [B, T, H, D]. Operations are counted as FlashAttention does: forward 4 D per head and visible pair of
positions, T^2 / 2 pairs without a window; backward 2.5 times that, whatever a kernel computes again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.case import BenchCase, Setup
from kernels.attention import attention

LONGEST_REFERENCE = 2048  # it stores every weight in fp32
FLEX_LENGTHS = (2048, 8192)  # FlexAttention compiles for seconds at each shape
DOCUMENT = 1024  # mean length of a document
FLASH = {"FA2": "flash_attn.flash_attn_interface", "FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """K: key/value heads, 0 for as many as H. window: keys seen by a query. documents: packed ones, B = 1."""

    group: str
    B: int
    T: int
    H: int
    D: int
    K: int = 0
    window: int | None = None
    documents: bool = False


LENGTHS = [(32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384)]
SHAPES = [
    *(Shape(f"D={D}", B, T, 2048 // D, D) for D in (64, 128) for B, T in LENGTHS),
    *(Shape("H=48 D=128", 4, T, 48, 128) for T in (1024, 2048, 4096, 8192)),
    # GPT presets: 124M, 350M, 6.7B at two lengths; 1.3B is among the lengths at D=128.
    Shape("presets", 16, 1024, 12, 64),
    Shape("presets", 16, 1024, 16, 64),
    Shape("presets", 8, 2048, 32, 128),
    Shape("presets", 4, 4096, 32, 128),
    Shape("presets", 2, 8192, 32, 128, K=8),
    Shape("masks", 1, 16384, 16, 128, window=1024),
    Shape("masks", 1, 16384, 16, 128, documents=True),
]
SMALL = [Shape("", 2, 64, 2, 16), Shape("masks", 1, 64, 4, 16, K=2, window=16)]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a case. cu_seqlens int32 [documents + 1]: their starts and the end; longest: their longest."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    cu_seqlens: Tensor | None
    longest: int


def cases(device: torch.device, small: bool) -> Iterator[BenchCase]:
    dtype = torch.float32 if small else torch.bfloat16
    for shape in SMALL if small else SHAPES:
        tensors = make(shape, device, dtype)
        K = shape.K or shape.H
        heads = f"H={shape.H}" + (f" K={K}" if shape.K else "")
        mask = f" window={shape.window}" * (shape.window is not None) + " documents" * shape.documents
        name = f"B={shape.B} T={shape.T} {heads} D={shape.D}{mask}"
        flops = 4 * shape.H * shape.D * visible_pairs(shape, tensors)
        queries, keys = (shape.B * shape.T * heads * shape.D * dtype.itemsize for heads in (shape.H, K))
        lse = 4 * shape.B * shape.T * shape.H
        costs = {  # q, k, v -> o, lse; then q, k, v, o, do, lse -> dq, dk, dv
            "forward": (flops, 2 * queries + 2 * keys + lse),
            "backward": (2.5 * flops, 4 * queries + 4 * keys + lse),
        }
        for part, (operations, moved) in costs.items():
            found = rivals(shape, part, tensors)
            setups = {rival: part_of(part, make_attend, tensors) for rival, make_attend in found.items()}
            yield BenchCase(
                "attention", part, name, "sequence length", shape.T, str(dtype)[6:], operations, moved, setups,
                group=shape.group,
            )  # fmt: skip


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Tensors:
    torch.manual_seed(0)
    B, T, H, D, K = shape.B, shape.T, shape.H, shape.D, shape.K or shape.H
    q, k, v, do = (torch.randn(B, T, heads, D, device=device, dtype=dtype) for heads in (H, K, K, H))
    cu_seqlens, longest = None, T
    if shape.documents:
        inner = (torch.randperm(T - 1)[: T // DOCUMENT - 1] + 1).sort().values
        starts = torch.cat([torch.tensor([0]), inner, torch.tensor([T])]).to(torch.int32)
        cu_seqlens, longest = starts.to(device), int(starts.diff().max())
    return Tensors(q, k, v, do, cu_seqlens, longest)


def visible_pairs(shape: Shape, tensors: Tensors) -> float:
    """Pairs of a query and a key that it sees, over the batch."""
    if tensors.cu_seqlens is not None:
        return float(tensors.cu_seqlens.diff().double().square().sum() / 2)
    if shape.window is not None:
        return shape.B * float((torch.arange(shape.T) + 1).clamp_max(shape.window).sum())
    return shape.B * shape.T**2 / 2


def part_of(part: str, make_attend: Callable[[], Attend], tensors: Tensors) -> Setup:
    """Times the forward pass without autograd, or the backward pass alone."""

    def forward() -> Callable[[], object]:
        attend = make_attend()

        def run() -> Tensor:
            with torch.no_grad():
                return attend(tensors.q, tensors.k, tensors.v)

        return run

    def backward() -> Callable[[], object]:
        inputs = [t.detach().requires_grad_() for t in (tensors.q, tensors.k, tensors.v)]
        out = make_attend()(*inputs)
        return lambda: torch.autograd.grad(out, inputs, tensors.do, retain_graph=True)

    return forward if part == "forward" else backward


def rivals(shape: Shape, part: str, tensors: Tensors) -> dict[str, Callable[[], Attend]]:
    """Who can attend with this mask, by name."""
    on_gpu = tensors.q.device.type == "cuda"
    mask = {"window": shape.window, "cu_seqlens": tensors.cu_seqlens}
    mask = {name: value for name, value in mask.items() if value is not None}
    ours = partial(attention, impl="triton" if on_gpu else "torch", **mask)
    found: dict[str, Callable[[], Attend]] = {"ingot": lambda: ours}
    if part == "backward" and on_gpu:
        found["ingot, atomics"] = lambda: partial(ours, deterministic=False)
    if shape.T <= LONGEST_REFERENCE:
        found["reference"] = lambda: partial(attention, impl="reference", **mask)
    if not on_gpu:
        return found
    if not mask:
        found["SDPA flash"] = lambda: partial(stock, SDPBackend.FLASH_ATTENTION)
        found["SDPA cuDNN"] = lambda: partial(stock, SDPBackend.CUDNN_ATTENTION)
    if shape.documents:
        found["torch varlen"] = lambda: torch_varlen(tensors)
    if shape.T in FLEX_LENGTHS or mask:
        found["FlexAttention"] = lambda: flex(shape, tensors)
    return found | {name: partial(flash_attention, module, shape, tensors) for name, module in FLASH.items()}


def stock(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's operator, which takes [B, H, T, D], held to one of its implementations."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            is_causal=True, enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)  # fmt: skip


def flex(shape: Shape, tensors: Tensors) -> Attend:
    """FlexAttention, compiled, with the mask as blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, T, cu_seqlens = tensors.q.device, shape.T, tensors.cu_seqlens
    document = torch.zeros(T, dtype=torch.int32, device=device)
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, torch.arange(T, device=device, dtype=torch.int32), right=True)
    window = shape.window

    def causal(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return row >= col

    def windowed(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (row >= col) & (row - col < (window or T))

    def within_document(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (row >= col) & (document[row] == document[col])

    rule = within_document if shape.documents else causal if window is None else windowed
    blocks = create_block_mask(rule, None, None, T, T, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out: Any = compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return attend


def flash_attention(module: str, shape: Shape, tensors: Tensors) -> Attend:
    """FlashAttention 2, 3 or 4, whose functions agree in these arguments. Its backward pass adds atomically."""
    package = importlib.import_module(module)
    options: dict[str, Any] = {"causal": True}
    if shape.window is not None:
        options["window_size"] = (shape.window - 1, 0)  # the keys before the query's own
    if tensors.cu_seqlens is None:
        function = partial(package.flash_attn_func, **options)
    else:
        options |= {f"cu_seqlens_{of}": tensors.cu_seqlens for of in "qk"}
        options |= {f"max_seqlen_{of}": tensors.longest for of in "qk"}
        function = packed(partial(package.flash_attn_varlen_func, **options))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def torch_varlen(tensors: Tensors) -> Attend:
    """PyTorch's own function for packed documents."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = tensors.cu_seqlens, tensors.longest
    assert starts is not None
    return packed(lambda q, k, v: varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0)))


def packed(function: Callable[..., Any]) -> Attend:
    """`function` of q, k, v [B * T, heads, D] as one of [B, T, heads, D]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        return (out[0] if isinstance(out, tuple) else out).view(q.shape)

    return attend
