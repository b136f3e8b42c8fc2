"""Table look-up with a deterministic gradient: N tokens, V rows of the table, C width.

The gradient of a row is the sum of dy over the tokens with its id. Tokens are sorted (stably), so a row's tokens are
neighbours. The sorted list is cut into chunks of CHUNK tokens. A piece is the tokens of one row in one chunk:

    pieces   one program per index of the list. Where a piece begins, it sums the piece, ROWS tokens at a time. If the
             piece is all of the row, it writes the row. If not, the sum is a partial sum of the chunk: "tail" if the
             row begins in this chunk, "head" if it continues from the chunk before.
    joined   one program per chunk border. Where a row crosses its first border, its tail and heads are added.

Every row is written once, from fp32 sums whose order is a function of the tokens: the same bits on every run and
GPU. There are no atomics, and every size is known from N and V, so that nothing waits for the GPU.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import KernelError, cdiv, choose, padded, readable, wide
from kernels.plan import Plan, planned
from kernels.registration import call, operator

CHUNK = 64
ROWS = 4  # of dy that a program reads at once: most tokens of a batch are rare
MAX_COLS = 1024  # of a program


@triton.jit(do_not_specialize=["N", "V"])
def embedding_pieces_kernel(
    dy_ptr, ids_ptr, order_ptr, dweight_ptr, partial_ptr, stride_dy, N, V,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums the piece that begins at this index of the sorted ids i32 [N], if one does.

    dy [N, C]; order i64 [N], the indices of the tokens; dweight [V, C]; partial fp32 [2, chunks, C], heads then tails.
    """
    index = tl.program_id(0) // TILES
    row = tl.load(ids_ptr + index)
    begins = tl.load(ids_ptr + index - 1, index > 0, -1) != row
    if (begins | (index % CHUNK == 0)) & (row >= 0) & (row < V):
        border = (index // CHUNK + 1) * CHUNK
        indices = index + tl.arange(0, CHUNK)
        size = tl.sum((tl.load(ids_ptr + indices, indices < tl.minimum(border, N), -1) == row).to(tl.int32), 0)
        cols = tl.program_id(0) % TILES * COLS + tl.arange(0, COLS)
        total = tl.zeros((COLS,), tl.float32)
        for start in range(0, size, ROWS):
            which = start + tl.arange(0, ROWS)
            tokens = tl.load(order_ptr + index + which, which < size, 0)
            inside = (which < size)[:, None] & (cols < C)[None, :]
            dy = tl.load(dy_ptr + tokens[:, None] * stride_dy + cols[None, :], inside, 0.0)
            total += tl.sum(dy.to(tl.float32), 0)
        crosses = tl.load(ids_ptr + border, border < N, -1) == row
        if begins & (crosses == 0):
            out = dweight_ptr + row.to(tl.int64) * C + cols
            tl.store(out, total.to(dweight_ptr.dtype.element_ty), cols < C)
        else:
            chunk = (index // CHUNK).to(tl.int64) + begins.to(tl.int64) * tl.cdiv(N, CHUNK)
            tl.store(partial_ptr + chunk * C + cols, total, cols < C)


@triton.jit(do_not_specialize=["N", "V"])
def embedding_joined_kernel(
    ids_ptr, dweight_ptr, partial_ptr, N, V,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes the row whose tokens cross this border between chunks, if it is the first that they cross."""
    chunk = tl.program_id(0) // TILES + 1
    index = chunk * CHUNK
    row = tl.load(ids_ptr + index)
    crosses = tl.load(ids_ptr + index - 1) == row
    earlier = tl.load(ids_ptr + index - CHUNK - 1, chunk > 1, -1) == row
    if crosses & (earlier == 0) & (row >= 0) & (row < V):
        chunks = tl.cdiv(N, CHUNK)
        cols = tl.program_id(0) % TILES * COLS + tl.arange(0, COLS)
        tail = (chunks + chunk - 1).to(tl.int64)
        total = tl.load(partial_ptr + tail * C + cols, cols < C, 0.0)
        while chunk < chunks:
            heads = chunk + tl.arange(0, ROWS)
            inside = heads < chunks
            inside = inside & (tl.load(ids_ptr + heads * CHUNK, inside, -1) == row)
            at = partial_ptr + heads.to(tl.int64)[:, None] * C + cols[None, :]
            total += tl.sum(tl.load(at, inside[:, None] & (cols < C)[None, :], 0.0), 0)
            chunk = tl.where(tl.sum(inside.to(tl.int32), 0) == ROWS, chunk + ROWS, chunks)
        out = dweight_ptr + row.to(tl.int64) * C + cols
        tl.store(out, total.to(dweight_ptr.dtype.element_ty), cols < C)


@planned
def plans_of(N: int, V: int, C: int, stride: int, dtype: torch.dtype, device: torch.device) -> tuple[Plan, Plan]:
    COLS = min(padded(C), MAX_COLS)
    TILES = cdiv(C, COLS)  # programs that share a row
    constants = N, V, C, CHUNK, ROWS, COLS, TILES
    joined = Plan(embedding_joined_kernel, max(0, cdiv(N, CHUNK) - 1) * TILES, device, *constants)
    return Plan(embedding_pieces_kernel, N * TILES, device, stride, *constants), joined


@operator("embedding_backward", fake=lambda dy, tokens, V: dy.new_empty((V, dy.shape[-1])))
def embedding_backward_op(dy: Tensor, tokens: Tensor, V: int) -> Tensor:
    """dy [..., C], tokens int [...] -> the gradient of the table [V, C], in the dtype of dy."""
    (rows,) = readable(dy.reshape(-1, dy.shape[-1]))
    N, C = rows.shape
    # 32-bit keys take half the passes of a radix sort; what is outside of the table stays outside.
    ids, order = tokens.flatten().clamp(-1, V).to(torch.int32).sort(stable=True)
    dweight = rows.new_zeros((V, C))
    partial = rows.new_empty((2, cdiv(N, CHUNK), C), dtype=torch.float32)
    pieces, joined = plans_of(N, V, C, rows.stride(0), rows.dtype, dy.device)
    pieces(rows, ids, order, dweight, partial)
    joined(ids, dweight, partial)
    return dweight.to(dy.dtype)


def _save(ctx, inputs, output) -> None:
    tokens, weight, _ = inputs
    ctx.save_for_backward(tokens)
    ctx.V = weight.shape[0]


def _backward(ctx, dy):
    return None, call(embedding_backward_op, dy, *ctx.saved_tensors, ctx.V)


def stock_embedding(tokens: Tensor, weight: Tensor, zero_outside: bool) -> Tensor:
    """F.embedding, with rows of zeros for tokens outside of the table where asked for."""
    if not zero_outside:
        return F.embedding(tokens, weight)
    outside = (tokens < 0) | (tokens >= weight.shape[0])
    return F.embedding(tokens.masked_fill(outside, 0), weight).masked_fill(outside.unsqueeze(-1), 0.0)


# The Triton form: only its backward pass is a kernel.
embedding_op = operator("embedding", fake=stock_embedding, save=_save, backward=_backward)(stock_embedding)


def embedding(tokens: Tensor, weight: Tensor, *, zero_outside: bool = False, impl: str = "auto") -> Tensor:
    """The rows of `weight` that `tokens` number: int64 or int32 [...], weight [V, C] -> [..., C] in its dtype.

    zero_outside: tokens outside of 0 to V - 1 give rows of zeros and no gradient, as a rank that holds a slice of a
    vocabulary needs it (Shoeybi et al. 2019, section 3); without it they raise IndexError on a CPU, and stop the
    process's use of a GPU with a device-side assertion, as in F.embedding.

    Differentiable once; the gradient is dense, [V, C]. The Triton form's is summed in fp32 in an order that the
    tokens alone determine, so it has the same bits on every run and every GPU. impl: see kernels/dispatch.py.
    Raises KernelError on wrong shapes or dtypes or a form that cannot run.
    """
    if weight.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        found = f"tokens {tokens.dtype} and weight of shape {tuple(weight.shape)}"
        raise KernelError(f"embedding: found {found}, expected int64 or int32 tokens and a weight [V, C]")
    form = choose(impl, "embedding", device=weight.device, dtype=weight.dtype)
    if form == "triton":
        return embedding_op(tokens, weight, zero_outside)
    if form == "reference":
        # In fp32, so that the sum of a row's gradients is rounded once.
        return stock_embedding(tokens, wide(weight), zero_outside).to(weight.dtype)
    return stock_embedding(tokens, weight, zero_outside)
