"""Sizes in closed form: elements of the model's parameters, and bytes of memory on one rank of a layout.

Bytes of training state follow Rajbhandari et al. 2020, section 3.1, those of activations Korthikanti et al. 2022,
section 4; docs/parallelism.md has both, and how they differ from what was measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from llm.config import ModelConfig, RunConfig
from llm.config.lora import LoRAConfig
from llm.model.parts import PART_OF_LAYER, ModelPart

FP32 = 4  # bytes
# DeepSpeed's default of stage3_max_live_parameters: so many elements stay gathered under ZeRO 3.
LIVE_PARAMETERS = 10**9
# Tokens whose logits exist at once, at least (kernels/cross_entropy/linear.py on a GPU).
LOGITS = 4096


def parameters_by_part(model: ModelConfig, tp: int = 1) -> dict[ModelPart, int]:
    """Elements of the parameters by part of the model on one of `tp` ranks, the vocabulary padded to a multiple of tp.

    Attention between the two products has none, nor has a tied head.
    """
    L, C, F, bias = model.n_layer, model.d_model, model.ff_dim, int(model.bias)
    qkv = (model.n_head + 2 * model.kv_heads) * model.head_dim
    table = -(-model.vocab_size // tp) * C
    if model.family == "lstm":
        head = 0 if model.tie_embeddings else table
        return {"embedding": table, "lstm": L * 4 * C * (2 * C + bias), "head_loss": head}
    return {
        "embedding": table + position_parameters(model),
        "norm": (2 * L + 1) * norm_parameters(model),
        "qkv": L * qkv * (C + bias) // tp,
        "attention": 0,
        "attention_output": L * (C * C // tp + bias * C),
        "feed_forward": L * ((_up_width(model) * (C + bias) + F * C) // tp + bias * C),
        "head_loss": 0 if model.tie_embeddings else table,
    }


def factors_by_part(model: ModelConfig, lora: LoRAConfig, tp: int = 1) -> Counter[ModelPart]:
    """Elements of LoRA's factors by part of the model on one of `tp` ranks, which cut one of each pair.

    In qkv and up that is B [output width, rank], in the others A [rank, input width]; the whole one is d_model wide.
    """
    C, r = model.d_model, lora.rank * model.n_layer
    qkv = (model.n_head + 2 * model.kv_heads) * model.head_dim
    cut = {"qkv": qkv, "attention_output": C, "up": _up_width(model), "down": model.ff_dim}
    found: Counter[ModelPart] = Counter()
    for role in lora.targets:
        found[PART_OF_LAYER[role]] += r * (C + cut[role] // tp)
    return found


def parameters(model: ModelConfig, tp: int = 1) -> int:
    """N: elements of all parameters on one of `tp` ranks, the vocabulary padded to a multiple of tp."""
    return sum(parameters_by_part(model, tp).values())


def block_parameters(model: ModelConfig, tp: int = 1) -> int:
    """N_L: elements of the blocks' parameters on one of `tp` ranks."""
    parts = parameters_by_part(model, tp)
    if model.family == "lstm":
        return parts["lstm"]
    inside = parts["qkv"] + parts["attention_output"] + parts["feed_forward"]
    return inside + 2 * model.n_layer * norm_parameters(model)


def hidden_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Elements of the blocks' matrices on one of `tp` ranks, of which Muon keeps one moment."""
    plain = replace(model, bias=False)
    norms = 2 * model.n_layer * norm_parameters(plain) if model.family == "gpt" else 0
    return block_parameters(plain, tp) - norms


def position_parameters(model: ModelConfig) -> int:
    """Elements of the table of learned positions; 0 where positions are rotary."""
    return model.max_seq_len * model.d_model if model.position == "learned" else 0


def norm_parameters(model: ModelConfig) -> int:
    """Elements of one norm."""
    return model.d_model * (1 if model.norm == "rmsnorm" else 1 + int(model.bias))


def _up_width(model: ModelConfig) -> int:
    """What the first product of the feed-forward layer gives per token: of SwiGLU gate and up."""
    return model.ff_dim * (2 if model.activation == "swiglu" else 1)


def held_and_trained(config: RunConfig) -> tuple[int, int]:
    """Elements of the weights on one tensor-parallel rank, LoRA's factors among them; and of those that are trained."""
    tp = config.parallel.tensor_parallel
    n, factors = parameters(config.model, tp), factors_by_part(config.model, config.lora, tp).total()
    return n + factors, factors or n


def weight_bytes(config: RunConfig) -> int:
    """w: bytes of a weight as the model computes with it."""
    return FP32 if config.train.precision == "fp32" else 2


class TrainingState(NamedTuple):
    """Bytes of training state on one rank."""

    weights: int
    """Parameters and, where they are other tensors, fp32 masters."""
    moments: int
    """Adam's two; Muon has one."""
    gradients: int
    """What is alive between the backward pass and the step and not after it."""


def training_state(config: RunConfig, world_size: int) -> TrainingState:
    """Rajbhandari et al. 2020, section 3.1 and figure 1, as Ingot sets DeepSpeed up: gradients are kept in fp32.

    For N parameters on a tensor-parallel rank, w bytes each (fp32 4, bf16 and fp16 2), d data-parallel ranks:

        stage   weights          moments   gradients
        0       w N              8 N       4 N           and 4 N of masters if w is 2
        1       w N + 4 N / d    8 N / d   4 N
        2       w N + 4 N / d    8 N / d   4 N / d
        3       (w + 4) N / d    8 N / d   4 N / d

    FSDP2 has 4 N / d of weights at either stage: the masters' shards are the parameters. With LoRA, moments, gradients
    and the masters of stages 1 to 3 are the factors'. Muon has one moment of a block's matrix. docs/parallelism.md says
    in which cases DeepSpeed differs.
    """
    tp, stage = config.parallel.tensor_parallel, config.parallel.zero_stage
    (n, trained), w, d = held_and_trained(config), weight_bytes(config), world_size // tp
    masters, spared = FP32 * trained // d, FP32 * hidden_parameters(config.model, tp) * (config.optim.name == "muon")
    if config.train.engine == "fsdp":
        return TrainingState(FP32 * n // d, 2 * masters - spared // d, masters)
    if stage == 0:
        return TrainingState(w * n + (0 if w == FP32 else FP32 * n), 2 * FP32 * trained - spared, FP32 * trained)
    weights = w * n // d if stage == 3 else w * n
    return TrainingState(weights + masters, 2 * masters - spared // d, FP32 * trained if stage == 1 else masters)


def offloaded(config: RunConfig, world_size: int) -> TrainingState:
    """The part of `training_state` that parallel.offload keeps in the CPU's memory."""
    state, offload = training_state(config, world_size), config.parallel.offload
    if offload == "none":
        return TrainingState(0, 0, 0)
    masters = state.moments // 2
    # Stage 1 has the gradients of all ranks where they are summed: on the GPU.
    gradients = state.gradients if config.parallel.zero_stage > 1 else 0
    return TrainingState(state.weights if offload == "all" else masters, state.moments, gradients)


def frozen_masters(config: RunConfig, world_size: int) -> int:
    """Bytes of a rank's part of what LoRA does not train, which ZeRO keeps in the CPU's memory in fp32."""
    held, trained = held_and_trained(config)
    kept = config.train.engine == "deepspeed" and config.parallel.zero_stage > 0
    return FP32 * (held - trained) * config.parallel.tensor_parallel // world_size if kept else 0


def gathered(config: RunConfig) -> int:
    """Bytes of the weights of other ranks that stage 3 and FSDP have at hand at once."""
    tp, w, stage = config.parallel.tensor_parallel, weight_bytes(config), config.parallel.zero_stage
    n, _ = held_and_trained(config)
    blocks = n - parameters(config.model, tp) + block_parameters(config.model, tp)
    if config.train.engine == "fsdp":
        # Stage 3: what is in no block, the block that computes, and the next one, which is on its way.
        return w * (n if stage == 2 else n - blocks + 2 * blocks // config.model.n_layer)
    live = config.deepspeed.get("zero_optimization", {}).get("stage3_max_live_parameters", LIVE_PARAMETERS)
    return w * min(n, live) if stage == 3 else 0


class Activations(NamedTuple):
    """Bytes of activations of one micro-batch on one rank, at their peak."""

    blocks: int
    """What the forward pass keeps of the blocks, and one block that is computed again."""
    head: int
    """The last norm's input, the loss's gradients, which it computes at once, and the logits of a chunk of tokens."""


def activations(config: RunConfig) -> Activations:
    """Korthikanti et al. 2022, equation 2, without masks and scores, for this model's widths.

    A token of a block keeps w (4 C) in the stream and the norms, which sequence parallelism divides by tp, and
    w (2 C + 2 K D + 2 F) + 4 H between the products, which tensor parallelism divides: q, k and v, attention's output
    and its log-sum-exps in fp32, and the feed-forward layer's before and after gelu (of swiglu 3 F). Selective
    recomputation spares none of these where attention is fused; full recomputation leaves the w C of a block's input.
    An LSTM's layer keeps w (7 C): its input, four gates, the cell and its output.
    """
    model, train, tp = config.model, config.train, config.parallel.tensor_parallel
    w, C = weight_bytes(config), model.d_model
    tokens = train.micro_batch_size * max(phase.seq_len for phase in config.phases)
    stream = tokens * w * C // (tp if config.parallel.sequence_parallel else 1)
    inside = 2 * C + 2 * model.kv_heads * model.head_dim + _up_width(model) + model.ff_dim
    block = 4 * stream + tokens * (w * inside + FP32 * model.n_head) // tp
    block = 7 * stream if model.family == "lstm" else block
    again = -(-model.n_layer // train.checkpoint_every) if train.activation_checkpointing == "full" else 0
    blocks = (model.n_layer - again) * block + again * stream + (block if again else 0)
    vocabulary = -(-model.vocab_size // tp)
    gradients = tokens * w * C + (0 if config.lora.rank else FP32 * vocabulary * C)
    return Activations(blocks, stream + gradients + min(tokens, LOGITS) * vocabulary * w)


def rank_memory(config: RunConfig, world_size: int) -> dict[str, int]:
    """Bytes on one rank's GPU, by what they are for; with the 16-bit gradients that DeepSpeed's stage 1 keeps."""
    state, host, kept = training_state(config, world_size), offloaded(config, world_size), activations(config)
    first = config.train.engine == "deepspeed" and config.parallel.zero_stage == 1 and weight_bytes(config) < FP32
    return {
        "weights, fp32 masters": state.weights - host.weights,
        "moments": state.moments - host.moments,
        "gradients": state.gradients - host.gradients,
        "the last micro-batch's": weight_bytes(config) * held_and_trained(config)[1] if first else 0,
        "gathered weights": gathered(config),
        "activations": kept.blocks,
        "head_loss": kept.head,
    }
