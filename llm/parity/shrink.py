"""Shrinks a model that one process cannot hold to one of the same family that it can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from kernels.cross_entropy.linear import GPU_CHUNK
from llm.config import ModelConfig, RunConfig
from llm.config.checks import fp8_sides
from llm.errors import InputError
from llm.model.fp8 import MULTIPLE
from llm.plan.memory import parameters

# Bytes per parameter. Of the oracle: weights, gradients, moments; in bf16, fp16 and FP8 masters and 16-bit copies, and
# a second oracle. Gathered: weights and moments before and after a step, gradients. Of the layout: at most.
ORACLE = {"fp32": 16, "bf16": 36, "fp16": 36}
GATHERED = 28
LAYOUT = 32
# Allocators keep some memory, and tensors that are being gathered or compared need some.
USABLE = 0.8
SMALLEST_VOCABULARY, SMALLEST_HEAD = 1024, 8


def available_bytes(device: torch.device, local_world_size: int) -> int:
    """What rank 0 may use: its share of the host's memory, where states are gathered, and at most its GPU's."""
    share = _host_bytes() // local_world_size
    return min(share, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else share


def _host_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory of this host, and no more than its control group, which psutil does not read, leaves a container."""
    free = psutil.virtual_memory().available
    maximum, current = group / "memory.max", group / "memory.current"
    if maximum.is_file() and current.is_file() and (limit := maximum.read_text().strip()) != "max":
        return min(free, max(0, int(limit) - int(current.read_text())))
    return free


def needed_bytes(config: RunConfig, world_size: int) -> int:
    """Memory that `verify` needs on rank 0: its part of the layout, the oracle, and what is gathered.

    Activations of a micro-batch are B T (34 C + 5 H T) bytes per block in 16 bits (Korthikanti et al. 2022, eq. 1) and
    twice that in fp32; the second term, the attention weights, exists only where PyTorch's own operator cannot run.
    """
    model, parallel = config.model, config.parallel
    ranks = world_size if parallel.zero_stage == 3 or config.train.engine == "fsdp" else parallel.tensor_parallel
    tokens, T = config.train.micro_batch_size * config.data.seq_len, config.data.seq_len
    weights = 5 * model.n_head * T if model.dropout or model.attention_softcap or model.attention_sparse else 0
    activations = 2 * model.n_layer * tokens * (34 * model.d_model + weights)
    logits = 3 * 4 * min(tokens, GPU_CHUNK) * model.vocab_size
    oracle = ORACLE["bf16" if config.train.fp8 != "none" else config.train.precision]
    states = parameters(model) * (oracle + GATHERED + LAYOUT // ranks)
    return states + activations + logits


def shrink(config: RunConfig, available: int, world_size: int) -> RunConfig:
    """`config` itself if `verify` can hold its model in `available` bytes, else with the largest model that fits.

    Norms, activation, positions, tying, biases, dropout, query heads per key/value head, attention's window, pattern
    and softcap, sequence and batch stay. Raises InputError if not even the smallest fits.
    """
    limit = int(USABLE * available)
    if needed_bytes(config, world_size) <= limit:
        return config
    smallest, tp = config, config.parallel.tensor_parallel
    for model in smaller(config.model, tp):
        if config.train.fp8 != "none" and any(side % MULTIPLE for side in fp8_sides(model, tp).values()):
            continue  # which the config refuses
        smallest = replace(config, model=model)
        if needed_bytes(smallest, world_size) <= limit:
            return smallest
    raise InputError(
        f"verify needs {needed_bytes(smallest, world_size) / 1e9:.2f} GB on rank 0 even for a model of "
        f"{smallest.model}; {limit / 1e9:.2f} GB can be used: lower train.micro_batch_size or data.seq_len"
    )


def smaller(model: ModelConfig, tp: int) -> Iterator[ModelConfig]:
    """Ever smaller models of the same family, which `tp` ranks can share.

    First fewer blocks, for they are alike (with options that alternate: as many as differ), then a smaller vocabulary,
    then fewer heads, and last narrower ones.
    """
    lists = (model.attention_window, model.attention_sparse)
    fewest = max([2, *(len(each) for each in lists if isinstance(each, tuple))])
    while model.n_layer > fewest:
        model = replace(model, n_layer=max(fewest, model.n_layer // 2))
        yield model
    while model.vocab_size // 2 >= SMALLEST_VOCABULARY:
        half = model.vocab_size // 2
        # The padding that the ranks' vocabulary needs stays too.
        model = replace(model, vocab_size=half - (half - model.vocab_size) % tp)
        yield model
    while model.family == "lstm" and model.d_model >= 2 * SMALLEST_HEAD:
        model = replace(model, d_model=model.d_model // 2)
        yield model
    while model.family == "gpt" and model.kv_heads > tp:
        model = _narrower(model, max(tp, model.kv_heads // 2 // tp * tp), model.head_dim, tp)
        yield model
    while model.family == "gpt" and model.head_dim >= 2 * SMALLEST_HEAD:
        model = _narrower(model, model.kv_heads, model.head_dim // 4 * 2, tp)
        yield model


def _narrower(model: ModelConfig, kv_heads: int, head_dim: int, tp: int) -> ModelConfig:
    n_head = model.n_head // model.kv_heads * kv_heads
    d_model = n_head * head_dim
    wanted, unit = model.ff_dim * d_model // model.d_model, MULTIPLE * tp  # in FP8 each rank's part is a multiple
    d_ff = max(tp, wanted // unit * unit or wanted // tp * tp)
    return replace(model, n_kv_head=kv_heads, n_head=n_head, d_model=d_model, d_ff=d_ff)
