"""AdamW (Loshchilov & Hutter 2019, algorithm 2) in one pass over flat tensors.

With g the gradient times grad_scale, t the number of this update, and every operation in fp32:
    m = m + (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
The pass reads p, m, v, g and writes p, m, v, and a 16-bit copy of p if the caller wants one.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import TRITON_DTYPES, cdiv, choose, expect, interpretable, wide
from kernels.philox import WORD, philox, signed
from kernels.plan import Plan, planned
from kernels.registration import operator

# Four elements per thread: then 16-bit and fp32 tensors have one layout, and nothing crosses threads.
BLOCK = 1024
WARPS = 8
# Lowest bits of an fp32 number that rounding it to a 16-bit type drops.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def bias_correction(log_beta, t):
    """1 - beta^t = -expm1(t log beta), fp32 scalars; near 0 by its series, where 1 - exp would cancel."""
    x = t * log_beta
    near = tl.maximum(x, -0.5)
    series = 1.0
    for k in tl.static_range(0, 8):  # pyright: ignore[reportGeneralTypeIssues]
        series = 1.0 + series * near * (1.0 / (9 - k))
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit
def random_words(seeds, first, BLOCK: tl.constexpr):
    """32 random bits for each of the elements from number `first` on; `stochastic` says which."""
    groups = first // 4 + tl.arange(0, BLOCK // 4)
    low = (groups & 0xFFFFFFFF).to(tl.uint32)
    high = (groups >> 32).to(tl.uint32)
    # Triton types a call from one kernel to another as if it were made from the host.
    w0, w1, w2, w3 = tl.philox(seeds, low, high, 0, 0xFFFFFFFF)  # pyright: ignore[reportGeneralTypeIssues]
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def round_stochastically(x, words, DROPPED: tl.constexpr):
    """fp32 x to one of its two neighbours in the 16-bit type, the nearer the likelier; still fp32."""
    mask: tl.constexpr = 2**DROPPED - 1  # pyright: ignore[reportOperatorIssue]
    noise = words & mask
    bits = x.to(tl.uint32, bitcast=True) + noise
    rounded = (bits & (0xFFFFFFFF - mask)).to(tl.float32, bitcast=True)
    if DROPPED == 13:  # fp16's subnormal numbers are multiples of 2^-24
        steps = tl.floor(tl.abs(x) * 16777216.0 + noise.to(tl.float32) * (1.0 / 8192))
        small = steps * (1.0 / 16777216.0)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, tl.where(x < 0, -small, small), rounded)
    return tl.where(x == x, rounded, x)  # the bits of a NaN would carry into its sign


@triton.jit
def adamw_block(
    parameter_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_ptr, offsets, inside,
    scale, step_size, decay, rest1, beta2, rest2, eps, root, words, DROPPED: tl.constexpr,
):  # fmt: skip
    """The update of the elements `offsets`, of which those `inside` exist (all if None)."""
    p = tl.load(parameter_ptr + offsets, inside).to(tl.float32)
    g = tl.load(gradient_ptr + offsets, inside).to(tl.float32) * scale
    m = tl.load(exp_avg_ptr + offsets, inside).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + offsets, inside).to(tl.float32)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p = decay * p - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(exp_avg_ptr + offsets, m.to(exp_avg_ptr.dtype.element_ty), inside)
    tl.store(exp_avg_sq_ptr + offsets, v.to(exp_avg_sq_ptr.dtype.element_ty), inside)
    low = p
    if DROPPED > 0:
        low = round_stochastically(p, words, DROPPED)
    if low_ptr is None:
        tl.store(parameter_ptr + offsets, low.to(parameter_ptr.dtype.element_ty), inside)
    else:
        tl.store(parameter_ptr + offsets, p.to(parameter_ptr.dtype.element_ty), inside)
        tl.store(low_ptr + offsets, low.to(low_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["N", "seed"])
def adamw_kernel(
    parameter_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_ptr, scale_ptr, step_ptr, skip_ptr,
    seed, step, lr, decay, rest1, beta2, rest2, eps, log_beta1, log_beta2, N,
    BLOCK: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    """One block of N elements. Pointers from low_ptr on may be None; `step` counts without step_ptr."""
    if skip_ptr is not None:
        N = tl.where(tl.load(skip_ptr) != 0, 0, N)  # then no element exists
    t = step
    if step_ptr is not None:
        t = tl.load(step_ptr).to(tl.float32)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    step_size = lr / bias_correction(log_beta1, t)
    root = tl.sqrt_rn(bias_correction(log_beta2, t))
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    words = None
    if DROPPED > 0:
        key = seed.to(tl.uint32, bitcast=True).to(tl.uint64)
        words = random_words((t.to(tl.uint64) << 32) | key, first, BLOCK)
    # Without a mask whole blocks are read 16 bytes at a time whatever divides N.
    if first + BLOCK <= N:
        adamw_block(
            parameter_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_ptr, offsets, None,
            scale, step_size, decay, rest1, beta2, rest2, eps, root, words, DROPPED,
        )  # fmt: skip
    else:
        adamw_block(
            parameter_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, low_ptr, offsets, offsets < N,
            scale, step_size, decay, rest1, beta2, rest2, eps, root, words, DROPPED,
        )  # fmt: skip


@planned
def plan_of(N: int, dtypes: tuple[torch.dtype | None, ...], dropped: int, device: torch.device) -> Plan:
    """dtypes: of the kernel's tensors, None for what there is not. dropped: bits that are rounded stochastically."""
    return Plan(adamw_kernel, cdiv(N, BLOCK), device, N, BLOCK, dropped, warps=WARPS)


@operator("adamw_", fake=lambda *_: None, mutates=("parameter", "exp_avg", "exp_avg_sq", "low_precision"))
def adamw_op(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, low_precision: Tensor | None,
    grad_scale: Tensor | None, step_tensor: Tensor | None, skip: Tensor | None, step: float, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, seed: int | None,
) -> None:  # fmt: skip
    """Update in place. `step` counts where step_tensor is None. See `adamw_`."""
    targets = parameter, exp_avg, exp_avg_sq, low_precision
    seen = interpretable(*targets)
    rounded = parameter if low_precision is None else low_precision
    tensors = seen[0], *interpretable(gradient.contiguous()), *seen[1:], grad_scale, step_tensor, skip
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    plan = plan_of(parameter.numel(), dtypes, 0 if seed is None else DROPPED_BITS[rounded.dtype], parameter.device)
    factors = 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    plan(*tensors, numbers=(signed(seed or 0), step, lr, *factors, eps, *logs))
    for target, written in zip(targets, seen, strict=True):
        if target is not None and written is not target:
            target.copy_(written)


def check(parameter: Tensor, others: dict[str, Tensor], scalars: dict[str, Tensor], seed: int | None) -> None:
    """Raise KernelError unless shapes, devices and what is to be rounded fit `adamw_`."""
    for name, tensor in (others | scalars).items():
        shape = () if name in scalars else tuple(parameter.shape)
        expect(
            tensor.shape == shape and tensor.device == parameter.device,
            f"adamw_: found {name} of shape {tuple(tensor.shape)} on {tensor.device}, expected {shape} on "
            f"{parameter.device}, as the parameter",
        )
    rounded = others.get("low_precision", parameter).dtype
    expect(
        "low_precision" not in others or (parameter.dtype not in DROPPED_BITS and rounded in DROPPED_BITS),
        f"adamw_: found parameter {parameter.dtype} with low_precision {rounded}, expected a wider parameter and a "
        "16-bit copy: 16-bit parameters need no copy",
    )
    if seed is not None:
        expect(
            rounded in DROPPED_BITS,
            f"adamw_: found seed={seed} with {rounded}, expected a 16-bit parameter or low_precision to round "
            "stochastically: leave out the seed",
        )
        expect(0 <= seed <= WORD, f"adamw_: found seed {seed}, expected 0 to 2^32 - 1")


def given(**found: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def no_kernel(parameter: Tensor, others: dict[str, Tensor]) -> str | None:
    """Why the Triton form cannot update these tensors, beyond the parameter's device and dtype; or None."""
    for name, tensor in {"parameter": parameter, **others}.items():
        if tensor.dtype not in TRITON_DTYPES:
            return f"found {name} {tensor.dtype}, expected float32, float16 or bfloat16: use impl=torch or reference"
        if name != "gradient" and not tensor.is_contiguous():
            return f"found {name} with strides {tensor.stride()}, expected it contiguous: use impl=torch or reference"
    return None


def no_stock(parameter: Tensor, others: dict[str, Tensor], seed: int | None) -> str | None:
    """Why PyTorch's fused AdamW cannot do this update, or None."""
    if seed is not None:
        return "found a seed, which asks for stochastic rounding: use impl=triton or reference"
    found = {parameter.dtype, others["exp_avg"].dtype, others["exp_avg_sq"].dtype}
    if len(found) > 1:
        return f"found {sorted(map(str, found))}, expected one dtype of parameter and moments: use impl=reference"
    return None


@torch.no_grad()
def adamw_(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int | Tensor,
    grad_scale: Tensor | None = None, low_precision: Tensor | None = None, seed: int | None = None,
    skip: Tensor | None = None, impl: str = "auto",
) -> None:  # fmt: skip
    """Update `parameter`, `exp_avg` and `exp_avg_sq` in place as torch.optim.AdamW does (Loshchilov & Hutter 2019).

    All tensors have one shape; parameter and moments are contiguous; dtypes fp32, fp16 or bf16, mixed as wanted, and
    the arithmetic is fp32. step: the number of this update, from 1; an int, or a tensor [] on the device, which is
    not synchronised with. grad_scale: fp32 [] on the device, multiplies the gradient (clipping, unscaling).
    low_precision: 16-bit, receives the updated parameter rounded. What is 16-bit is rounded to the nearest, or with
    a seed (32-bit) the 16-bit parameter or copy stochastically, by bits that are a function of (seed, step, index of
    the element); give each tensor its own seed. skip: fp32 [] on the device; where it is 1 nothing changes. impl: see
    kernels/dispatch.py; "torch" is PyTorch's fused AdamW.
    Raises KernelError on tensors that do not fit or a form that cannot run.
    """
    others = given(gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, low_precision=low_precision)
    check(parameter, others, given(step=step, grad_scale=grad_scale, skip=skip), seed)
    form = choose(
        impl, "adamw_", device=parameter.device, dtype=parameter.dtype,
        no_triton=no_kernel(parameter, others), no_torch=no_stock(parameter, others, seed),
    )  # fmt: skip
    number, tensor = (0.0, step) if isinstance(step, Tensor) else (float(step), None)
    if form == "triton":
        state = parameter, gradient, exp_avg, exp_avg_sq
        adamw_op(*state, low_precision, grad_scale, tensor, skip, number, lr, *betas, eps, weight_decay, seed)
    elif form == "torch":
        scaled = gradient.to(parameter.dtype)
        scaled = scaled if grad_scale is None else scaled * grad_scale
        tensor = torch.full((), number, device=parameter.device) if tensor is None else tensor
        torch._fused_adamw_(
            [parameter], [scaled], [exp_avg], [exp_avg_sq], [], [tensor.float()], lr=lr, beta1=betas[0], beta2=betas[1],
            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, found_inf=skip,
        )  # fmt: skip
        if low_precision is not None:
            low_precision.copy_(parameter)
    elif skip is None or not skip:
        scaled = wide(gradient) if grad_scale is None else wide(gradient) * grad_scale
        state = wide(parameter), scaled, wide(exp_avg), wide(exp_avg_sq)
        p, m, v = adamw_reference(*state, int(step), lr, betas, eps, weight_decay)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        parameter.copy_(p)
        target = parameter if low_precision is None else low_precision
        target.copy_(p if seed is None else stochastic(p, target.dtype, seed, int(step)))


def adamw_reference(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Algorithm 2 of Loshchilov & Hutter (2019): p, m and v after update number t."""
    m = m + (1 - betas[0]) * (g - m)
    v = betas[1] * v + (1 - betas[1]) * g.square()
    root = (1 - betas[1] ** t) ** 0.5
    step_size = lr / (1 - betas[0] ** t)
    return (1 - lr * weight_decay) * p - step_size * (m / (v.sqrt() / root + eps)), m, v


def stochastic(x: Tensor, dtype: torch.dtype, seed: int, step: int) -> Tensor:
    """fp32 x rounded to a neighbour in bfloat16 or float16, up with the share of the gap that lies below x.

    The bits added before cutting off are those of Philox4x32-10 (kernels/philox.py) with
        key      seed, step
        counter  low and high word of index // 4, 0, 2^32 - 1 (which no dropout mask has)
        output   number index % 4 of the four
    for the element of this index in the flattened tensor.
    """
    x = x.float()
    groups = torch.arange((x.numel() + 3) // 4, device=x.device)
    zero = torch.zeros_like(groups)
    words = philox((groups & WORD, groups >> 32, zero, zero + WORD), (seed & WORD, step & WORD))
    noise = torch.stack(words, -1).flatten()[: x.numel()].view(x.shape)
    dropped = DROPPED_BITS[dtype]
    noise = noise & ((1 << dropped) - 1)
    bits = (x.contiguous().view(torch.int32).long() & WORD) + noise
    bits = bits >> dropped << dropped
    rounded = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:  # subnormal numbers are multiples of 2^-24
        small = (x.abs() * 2**24 + noise * 2.0**-13).floor() * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, small.copysign(x), rounded)
    return torch.where(x.isnan(), x, rounded).to(dtype)
