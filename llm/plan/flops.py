"""Model FLOPs by named formulas, and the peak of the GPU that they are compared with.

Figures of two systems compare only under the same formula (they differ by 12 % and more at long sequences), so every
utilisation is reported with the name of its formula.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

from llm.config import ModelConfig, RunConfig
from llm.config.lora import NO_LORA, LoRAConfig
from llm.config.phases import steps_by_phase
from llm.config.sections import SparseAttention
from llm.model.parts import ModelPart
from llm.plan.memory import block_parameters, factors_by_part, parameters_by_part

Formula = Literal["causal", "non-causal"]
Precision = Literal["fp32", "bf16", "fp16"]

# Dense peaks in TFLOP/s from NVIDIA's data sheets, without structured sparsity, by torch.cuda.get_device_name. bf16 and
# fp16: tensor cores with fp32 accumulation; fp32: no tensor cores (TF32 is off by default). With train.fp8 the peak
# stays that of train.precision, in which the rest of the model computes, so that MFU compares with runs without FP8.
PEAK_TFLOPS: dict[str, dict[Precision, float]] = {
    r"Tesla T4": {"fp16": 65, "fp32": 8.1},
    r"Tesla V100-SXM2-(16|32)GB": {"fp16": 125, "fp32": 15.7},
    r"NVIDIA A10": {"bf16": 125, "fp16": 125, "fp32": 31.2},
    r"NVIDIA A30": {"bf16": 165, "fp16": 165, "fp32": 10.3},
    r"NVIDIA A40": {"bf16": 149.7, "fp16": 149.7, "fp32": 37.4},
    r"NVIDIA A100(-SXM4-(40|80)GB|-PCIE-40GB| 80GB PCIe)": {"bf16": 312, "fp16": 312, "fp32": 19.5},
    r"NVIDIA L4": {"bf16": 121, "fp16": 121, "fp32": 30.3},
    r"NVIDIA L40S": {"bf16": 362, "fp16": 362, "fp32": 91.6},
    r"NVIDIA GeForce RTX 3090": {"bf16": 71, "fp16": 71, "fp32": 35.6},
    r"NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "fp32": 82.6},
    r"NVIDIA H100 PCIe": {"bf16": 756, "fp16": 756, "fp32": 51.2},
    r"NVIDIA H(100|200) NVL": {"bf16": 835.5, "fp16": 835.5, "fp32": 60},
    r"NVIDIA H100 80GB HBM3": {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9},
    r"NVIDIA H200": {"bf16": 989.4, "fp16": 989.4, "fp32": 66.9},
    r"NVIDIA B200": {"bf16": 2250, "fp16": 2250, "fp32": 75},
    r"NVIDIA GB200": {"bf16": 2500, "fp16": 2500, "fp32": 80},
}


def flops_by_part(
    model: ModelConfig, seq_len: int, formula: Formula = "causal", lora: LoRAConfig = NO_LORA
) -> dict[ModelPart, float]:
    """FLOPs of forward and backward for one token of a sequence of `seq_len`, by part of the model.

    A part with parameters has 6 of them each, biases and norms included: 2 in the forward pass and 4 in the backward
    pass. The tables that are looked up have none, the head those of its [V, C], tied or not.
    attention, the products of queries, keys and values:
    non-causal: 12 L C T (Chowdhery et al. 2022, appendix B), attention to all T positions, whatever the mask.
    causal: 12 C (sum over layers of P / T - 1/2) with P of `visible_pairs`: 6 L C T where all layers are dense, half of
    the non-causal one. A query's own key counts half in it.
    An LSTM has none of it: its parameters are multiplied once per token.
    With LoRA the factors have 6 and the other parameters 4: those of a gradient of their own are not computed.
    Activations that are computed again do not count: `recomputed_flops`.
    """
    multiplied = parameters_by_part(model)
    multiplied["embedding"], multiplied["head_loss"] = 0, model.vocab_size * model.d_model
    each, factors = 4.0 if lora.rank else 6.0, factors_by_part(model, lora)
    flops: dict[ModelPart, float] = {name: each * count + 6.0 * factors[name] for name, count in multiplied.items()}
    if model.family == "gpt":
        flops["attention"] = attention_flops(model, seq_len, formula, range(model.n_layer))
    return flops


def attention_flops(model: ModelConfig, seq_len: int, formula: Formula, layers: range) -> float:
    """Of the attention of these layers, per token."""
    keys = float(len(layers) * seq_len)
    if formula == "causal" and seq_len > 0:
        pairs = sum(visible_pairs(seq_len, model.layer_window(i), model.layer_sparse(i)) for i in layers)
        keys = pairs / seq_len - len(layers) / 2
    return 12 * model.d_model * keys


def flops_per_token(model: ModelConfig, seq_len: int, formula: Formula = "causal", lora: LoRAConfig = NO_LORA) -> float:
    """The sum of `flops_by_part`: 6 N + attention, N all parameters but the tables that are looked up."""
    return sum(flops_by_part(model, seq_len, formula, lora).values())


def recomputed_flops(config: RunConfig, seq_len: int, formula: Formula = "causal") -> float:
    """FLOPs per token that the backward pass spends on activations again, by train.activation_checkpointing.

    Not those of scores within fused attention. Of a block, all is computed again but its last product, whose result
    nothing needs; dropout behind it does, and an operator of Ingot's own, as in FP8, is computed whole.
    """
    model, train = config.model, config.train
    layers = range(0, model.n_layer, train.checkpoint_every)
    if train.activation_checkpointing == "none":
        return 0.0
    attention = attention_flops(model, seq_len, formula, layers) / 3
    if train.activation_checkpointing == "selective":
        return attention
    whole = model.dropout > 0 or train.fp8 != "none"
    last = 0 if whole else model.ff_dim * model.d_model + int(model.bias) * model.d_model
    block = (block_parameters(model) + factors_by_part(model, config.lora).total()) / model.n_layer
    return attention + 2 * len(layers) * (block - last)


@cache
def visible_pairs(seq_len: int, window: int | None, sparse: SparseAttention | None) -> int:
    """P: pairs of a query and a key that it sees, in one head and a sequence of `seq_len` without document masks."""
    if sparse is None:
        W = min(window or seq_len, seq_len)
        return W * (W + 1) // 2 + (seq_len - W) * W
    pairs = 0
    for i in range(-(-seq_len // sparse.block)):
        queries, near = min(sparse.block, seq_len - i * sparse.block), min(sparse.local - 1, i)
        earlier = near + i // sparse.stride - near // sparse.stride  # blocks before block i that its queries see
        pairs += queries * earlier * sparse.block + queries * (queries + 1) // 2
    return pairs


def flops_of_steps(
    config: RunConfig, first: int, last: int, formula: Formula = "causal", *, recomputed: bool = False
) -> float:
    """FLOPs over all ranks of the steps after step `first`, up to step `last`; with `recomputed_flops` or without.

    Documents that do not attend to one another spare some of attention's, which no formula here leaves out.
    """
    total = 0.0
    for phase, steps in steps_by_phase(config.phases, first, last):
        per_token = flops_per_token(config.model, phase.seq_len, formula, config.lora)
        if config.finetune.task == "classify":  # its head has a row for each label, which is next to nothing
            per_token -= flops_by_part(config.model, phase.seq_len, formula, config.lora)["head_loss"]
        per_token += recomputed_flops(config, phase.seq_len, formula) if recomputed else 0
        total += steps * phase.global_batch_size * phase.seq_len * per_token
    return total


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """Dense peak of one GPU in TFLOP/s; None if not known (a CPU, a MIG slice, a new GPU)."""
    known = (peaks for pattern, peaks in PEAK_TFLOPS.items() if re.fullmatch(pattern, device_name))
    return next(known, {}).get(precision)
