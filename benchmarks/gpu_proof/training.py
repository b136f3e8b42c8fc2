"""Stage `training`: whole steps of GPT-2 124M and 350M in bf16, micro-batch 16 x 1024, with Ingot's plain engine.

Forms: the kernels ("triton"), PyTorch's operators ("torch"), and these in one graph of torch.compile ("compiled"); the
kernels with the settings of FEATURES, each alone and all together; and the same model without Ingot
(benchmarks/contenders.py).
"""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.clock import Thunk, clock_of, compare, summary
from benchmarks.contenders import COMPILED, PLAIN, SIZES, TRANSFORMERS, make
from benchmarks.gpu_proof.stage import Items, wait
from benchmarks.report import Record
from llm.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from llm.model.forms import Forms
from llm.plan.flops import flops_per_token, peak_tflops
from llm.train.build import build_model
from llm.train.engines.base import MicroBatch
from llm.train.engines.plain import PlainEngine

MODELS: dict[str, dict[str, Any]] = {name: SIZES[name] for name in ("124M", "350M")}
SMALL: dict[str, dict[str, Any]] = {"tiny": dict(n_layer=1, n_head=2, d_model=32, vocab_size=64, max_seq_len=16)}
TRITON = Forms.of("triton")
# Attention and the loss by the kernels; Inductor joins what lies between the matrix products.
JOINED = TRITON._replace(norm="torch", rope="torch", activation="torch")
BLOCKS, FP8 = {"compile": "blocks"}, {"fp8": "tensorwise"}  # of the section `train`
MUON = {"name": "muon"}  # of the section `optim`
FEATURES: dict[str, tuple[Forms, dict[str, Any], dict[str, Any]]] = {
    "blocks": (TRITON, BLOCKS, {}),
    "blocks, joined": (JOINED, BLOCKS, {}),
    "FP8": (TRITON, FP8, {}),
    "Muon": (TRITON, {}, MUON),
    "blocks, FP8": (TRITON, BLOCKS | FP8, {}),
    "blocks, FP8, Muon": (TRITON, BLOCKS | FP8, MUON),
}
ROUNDS = 8
TOP = 12  # kernels of a profile
# What the profiler lists among kernels and is none.
NO_KERNEL = ("Mem", "Optimizer.", "ProfilerStep", "## ", "Torch-Compiled", "Activity Buffer")


def training(device: torch.device) -> Items:
    on_gpu = device.type == "cuda"
    found = [(model, form) for model in MODELS for form in ("triton", "torch", PLAIN)]
    found += [(model, form) for form in (COMPILED, *FEATURES) for model in MODELS]  # which takes most of the stage
    found += [(model, TRANSFORMERS) for model in MODELS if importlib.util.find_spec("transformers")]
    found += [(model, "compiled") for model in MODELS]
    found = found if on_gpu else [("tiny", "torch"), ("tiny", PLAIN)]
    return {f"{model} {form}": partial(measure, device, model, form) for model, form in found}


def engine_of(device: torch.device, model: dict[str, Any], form: str) -> tuple[PlainEngine, MicroBatch]:
    """An engine and a micro-batch of random tokens."""
    B, T, impl = 16 if device.type == "cuda" else 2, model["max_seq_len"], "triton" if form == "triton" else "torch"
    forms, train, optim = FEATURES.get(form, (Forms.of(impl), {}, {}))
    train = dict[str, Any](engine="plain", precision="bf16", impl=impl) | train
    config = RunConfig(
        model=ModelConfig(**model),
        data=DataConfig(seq_len=T),
        optim=OptimConfig(**optim),
        train=TrainConfig(global_batch_size=B, micro_batch_size=B, **train),
    )
    built = build_model(config, None, forms)
    if "compile" in train:
        from llm.train.compiled import CompiledBlocks

        CompiledBlocks.of(config, built)
    engine = PlainEngine(config, built, None, device)
    tokens = torch.randint(0, model["vocab_size"], (B, T + 1), device=device)
    positions, samples = torch.arange(T, device=device), torch.arange(B, device=device)
    return engine, MicroBatch(tokens[:, :-1], positions, samples, tokens[:, 1:])


def engine_step(device: torch.device, model: dict[str, Any], form: str) -> dict[str, Callable[[], Any]]:
    """A step, which returns its loss; and its forward and backward pass alone."""
    engine, batch = engine_of(device, model, form)
    if form == "compiled":
        engine.model.compile()

    def step() -> torch.Tensor:
        loss = engine.forward_backward([batch], batch.targets.numel())
        engine.step()
        return loss

    def queue() -> None:
        engine.model(*batch).backward()
        engine.model.zero_grad()

    return {"step": step, "queue": queue}


def peer_step(device: torch.device, model: dict[str, Any], form: str, B: int) -> dict[str, Callable[[], Any]]:
    train = TrainConfig(engine="plain", global_batch_size=B, micro_batch_size=B, precision="bf16")
    config = RunConfig(model=ModelConfig(**model), data=DataConfig(seq_len=model["max_seq_len"]), train=train)
    return {"step": make(form, config, device)}


def measure(device: torch.device, name: str, form: str) -> Record:
    """Of a step: ms, tokens a second, MFU, kernels, their ms; host_ms: until forward and backward are queued.

    start_s: until it was built and had made a step.
    """
    on_gpu, model = device.type == "cuda", (MODELS | SMALL)[name]
    torch.manual_seed(0)
    peer = form in (PLAIN, COMPILED, TRANSFORMERS)
    B, T, losses = 16 if on_gpu else 2, model["max_seq_len"], list[torch.Tensor]()
    began = time.perf_counter()
    thunks = peer_step(device, model, form, B) if peer else engine_step(device, model, form)
    thunks["step"]()
    wait(device)
    start = time.perf_counter() - began
    step: Thunk = lambda: losses.append(thunks["step"]())  # noqa: E731
    samples = compare(clock_of(device, cold=False), thunks | {"step": step}, ROUNDS if on_gpu else 1)
    host = summary(samples.get("queue", samples["step"]))["host_ms"]
    found: Record = {"model": name, "form": form, "start_s": start} | summary(samples["step"]) | {"host_ms": host}
    found |= {"tokens_s": B * T / found["ms"] * 1e3} | profile(step, device)
    found |= {"losses": [float(loss) for loss in losses[:: len(losses) - 1]]}
    if on_gpu:
        found["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        peak = peak_tflops(torch.cuda.get_device_name(device), "bf16")
        rate = found["tokens_s"] * flops_per_token(ModelConfig(**model), T) / 1e12
        found |= {"mfu": rate / peak} if peak else {}
        torch.cuda.reset_peak_memory_stats(device)
        torch.compiler.reset()
    return found


def profile(step: Thunk, device: torch.device) -> Record:
    """kernels: how many a step launches; busy_ms: what they take; top: those that take longest."""
    kind, activity = DeviceType.CPU, torch.profiler.ProfilerActivity.CPU
    if device.type == "cuda":
        kind, activity = DeviceType.CUDA, torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profiled:
        step()
        wait(device)
    rows: list[Record] = [
        {"name": x.key[:70], "launches": x.count, "ms": (x.self_device_time_total or x.self_cpu_time_total) / 1e3}
        for x in profiled.key_averages()
        if x.device_type == kind and not x.key.startswith(NO_KERNEL)
    ]
    top = sorted(rows, key=lambda row: -row["ms"])[:TOP]
    return {"kernels": sum(row["launches"] for row in rows), "busy_ms": sum(row["ms"] for row in rows), "top": top}
