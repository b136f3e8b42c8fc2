"""Times the forms of each operation on a GPU, with tensors as one layer of a run has them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention.gluon import why_not_gluon
from kernels.gelu import gelu
from kernels.rope import rope_qkv
from kernels.swiglu import swiglu
from llm.config import ModelConfig, RunConfig
from llm.model.forms import Forms
from llm.model.layers import DenseLayers
from llm.train.engines.base import DTYPES
from llm.train.optim import adamw

Thunk = Callable[[], object]
Turn = Callable[[Thunk], float]  # milliseconds of a call
Times = dict[str, dict[str, float]]  # median milliseconds by operation and form
# What may be chosen, the preferred form first: another is taken where it is faster by more than MARGIN.
FORMS = {
    "attention": ("triton", "atomic", "gluon", "flash", "cudnn"),
    **dict.fromkeys(("rope", "norm", "activation", "loss"), ("triton", "torch")),
    "adamw": ("torch", "triton"),
}
MARGIN = 0.03
SECONDS = 0.25  # of an operation's rounds, of which there is at least one
QUEUE_CYCLES = 6_000_000  # 3 ms of an H200: the host needs less to queue a call
MOST_TOKENS = 8192  # of the loss, which takes 4096 at a time
MOST_ELEMENTS = 1 << 26  # that AdamW updates, with 16 bytes for each


def candidates(config: RunConfig, device: torch.device) -> dict[str, tuple[str, ...]]:
    """The forms to compare, of each operation that has several: those that keep the run's masks, and its bits."""
    model, longest = config.model, max(phase.seq_len for phase in config.phases)
    # PyTorch's operator has the others, if at all, by masks: of all scores, or of a dropout that follows the layout.
    masks = [model.layer_sparse(i) or (model.layer_window(i) or longest) < longest for i in range(model.n_layer)]
    masked = any([*masks, model.attention_softcap, model.dropout, config.data.document_masks])
    left_out = ["flash", "cudnn"] * (masked or config.train.precision == "fp32")
    left_out += ["atomic", "cudnn"] * config.train.deterministic
    sparse = any(model.layer_sparse(i) for i in range(model.n_layer))
    no_gluon = why_not_gluon(
        device, DTYPES[config.train.precision], model.head_dim, model.dropout, sparse, model.attention_softcap
    )
    left_out += ["gluon"] * (no_gluon is not None)
    # Deterministic, flash is switched by hooks of autograd, which no graph can have.
    left_out += ["flash"] * (config.train.deterministic and config.train.compile != "none")
    recurrent = model.family == "lstm"  # of which only the loss and AdamW have several forms
    absent = {"attention": recurrent, "activation": recurrent, "norm": recurrent or model.dropout > 0}
    absent |= {"rope": model.position != "rope", "adamw": config.parallel.offload != "none"}
    found = {op: tuple(form for form in forms if form not in left_out) for op, forms in FORMS.items()}
    return {op: forms for op, forms in found.items() if len(forms) > 1 and not absent.get(op, False)}


def attention_of(layers: DenseLayers, model: ModelConfig) -> Callable[..., Tensor]:
    attention = layers.attention(model, 0, 0)
    return lambda q, k, v, samples: attention((q, k, v), samples)


def operation(op: str, config: RunConfig, tp: int, dp: int, device: torch.device) -> Callable[[str], Thunk]:
    """What makes a call of a form of `op`, forward and backward, on tensors that all its forms share."""
    model, train, C, D = config.model, config.train, config.model.d_model, config.model.head_dim
    B, T = train.micro_batch_size, max(phase.seq_len for phase in config.phases)
    H, K, F, V = model.n_head // tp, model.kv_heads // tp, model.ff_dim // tp, -(-model.vocab_size // tp)
    activation, up = (swiglu, 2 * F) if model.activation == "swiglu" else (gelu, F)
    N, on = min(B * T, MOST_TOKENS), dict[str, Any](device=device)
    if op == "adamw":
        sizes = [rows * C for rows in ((H + 2 * K) * D, H * D, up, F, 1, 1)]
        sizes = [4 * C * C, 4 * C * C] if model.family == "lstm" else sizes
        sizes = sizes if config.parallel.zero_stage == 0 else [sum(sizes) // dp]  # ZeRO updates one flat tensor
        weights = [torch.zeros(min(size, MOST_ELEMENTS // len(sizes)), **on) for size in sizes]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        return lambda form: adamw([{"params": weights}], config.optim, form).step
    generator, dtype = torch.Generator(device).manual_seed(0), DTYPES[train.precision]  # not the process's own
    samples, positions, targets = torch.arange(B, **on), torch.arange(T, **on), torch.arange(N, **on) % V
    rope = partial(rope_qkv, n_kv_head=K, head_dim=D, theta=model.rope_theta)
    norm: dict[str, Any] = dict(bias=model.bias, eps=model.norm_eps, p=0.0, site=0)
    shapes, others, function_of = {
        "attention": ([(B, T, n, D) for n in (H, K, K)], [samples], lambda layers, form: attention_of(layers, model)),
        "rope": ([(B, T, (H + 2 * K) * D)], [positions], lambda layers, form: partial(rope, impl=form)),
        "norm": ([(B, T, C)] * 2, [samples, positions], lambda layers, form: layers.add_norm(model.norm, C, **norm)),
        "activation": ([(B, T, up)], [], lambda layers, form: partial(activation, impl=form)),
        "loss": ([(N, C)], [targets], lambda layers, form: layers.lm_head(C, V, None)),
    }[op]
    inputs = [torch.randn(shape, dtype=dtype, generator=generator, **on).requires_grad_() for shape in shapes]

    def make(form: str) -> Thunk:
        layers = DenseLayers(forms=Forms(deterministic=train.deterministic)._replace(**{op: form}), z_loss=train.z_loss)
        function, leaves = function_of(layers, form), [*inputs]
        if isinstance(function, nn.Module):
            leaves += function.to(device, dtype).parameters()
        found = function(*inputs, *others)
        gradients = [*map(torch.ones_like, found)] if isinstance(found, tuple) else torch.ones_like(found)
        return lambda: torch.autograd.grad(function(*inputs, *others), leaves, gradients)

    return make


def on_gpu(thunk: Thunk) -> float:
    """Milliseconds of a call on the current GPU, without gaps in which that waits for the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_CYCLES)  # meanwhile the host queues the call
    start.record()
    thunk()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def medians(thunks: dict[str, Thunk], turn: Turn, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """The median of `turn` of each thunk; they take turns, so that a slow spell of the machine hits all."""
    found, end = {name: list[float]() for name in thunks}, clock() + SECONDS
    while True:
        for name, thunk in thunks.items():
            found[name].append(turn(thunk))
        if clock() >= end:
            return {name: statistics.median(times) for name, times in found.items()}


def measure(config: RunConfig, tp: int, dp: int, device: torch.device) -> tuple[Times, list[str]]:
    """The times of the candidates on `device`, the current GPU, and which failed, and why; needs no process group."""
    found, failures = Times(), list[str]()
    for op, forms in candidates(config, device).items():
        make, thunks = operation(op, config, tp, dp, device), dict[str, Thunk]()
        for form in forms:
            try:
                thunk = make(form)
                thunk()  # compiles
                torch.cuda.synchronize(device)
                thunks[form] = thunk
            except Exception as error:  # noqa: BLE001 - whatever it is, other forms may run
                torch.use_deterministic_algorithms(False)  # flash may have failed between its two switches
                failures.append(f"{op} by {form} failed: {type(error).__name__}: {error}".split("\n")[0])
        found |= {op: medians(thunks, on_gpu)} if thunks else {}
        del make, thunks
        torch.cuda.empty_cache()
    return found, failures


def fastest(ms: Times) -> dict[str, str]:
    """The form to take, by operation: the first of FORMS that is within MARGIN of the fastest."""
    limits = {op: min(times.values()) * (1 + MARGIN) for op, times in ms.items()}
    return {op: next(f for f in FORMS[op] if f in times and times[f] <= limits[op]) for op, times in ms.items()}
