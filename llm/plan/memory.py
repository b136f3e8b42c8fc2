"""Sizes of the model and of its training state in closed form: elements and bytes on one rank, by layout."""

from __future__ import annotations

from typing import NamedTuple

from llm.config import ModelConfig, RunConfig

FP32 = 4  # bytes


class TrainingState(NamedTuple):
    """Bytes of training state on one rank."""

    weights: int
    """Parameters and, where they are other tensors, fp32 masters."""
    moments: int
    """Adam's two."""
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

    FSDP2 has 4 N / d of weights at either stage: the masters' shards are the parameters. What is measured differs:

    - DeepSpeed at stage 1 in fp32 frees, after the last micro-batch, what belongs to other ranks: 4 N / d are left.
    - at stage 1 in bf16 it allocates the 4 N for gradients when it is built (they count as weights here), and keeps the
      last micro-batch's in bf16 beside them: 2 N.
    - at stage 3 it allocates the 4 N / d for gradients, and a bucket of reduce_bucket_size elements, when it is built.
    - at stages 1 and 2 in fp32 a parameter that the parts of two ranks share keeps its whole gradient on both.
    """
    tp, stage = config.parallel.tensor_parallel, config.parallel.zero_stage
    n, w, d = parameters(config.model, tp), weight_bytes(config), world_size // tp
    masters = FP32 * n // d
    if config.train.engine == "fsdp":
        return TrainingState(masters, 2 * masters, masters)
    if stage == 0:
        return TrainingState(w * n + (0 if w == FP32 else FP32 * n), 2 * FP32 * n, FP32 * n)
    weights = w * n // d if stage == 3 else w * n
    return TrainingState(weights + masters, 2 * masters, FP32 * n if stage == 1 else masters)


def weight_bytes(config: RunConfig) -> int:
    """w: bytes of a weight as the model computes with it."""
    return FP32 if config.train.precision == "fp32" else 2


def parameters(model: ModelConfig, tp: int = 1) -> int:
    """N: elements of all parameters on one of `tp` ranks, the vocabulary padded to a multiple of tp."""
    tables = (1 if model.tie_embeddings else 2) * -(-model.vocab_size // tp) * model.d_model
    return tables + position_parameters(model) + _norm_parameters(model) + block_parameters(model, tp)


def block_parameters(model: ModelConfig, tp: int = 1) -> int:
    """N_L: elements of the blocks' parameters on one of `tp` ranks."""
    C, F, bias = model.d_model, model.ff_dim, int(model.bias)
    columns = (model.n_head + 2 * model.kv_heads) * model.head_dim + F * (2 if model.activation == "swiglu" else 1)
    split = columns * (C + bias) + C * C + F * C
    return model.n_layer * (split // tp + 2 * bias * C + 2 * _norm_parameters(model))


def replicated_parameters(model: ModelConfig) -> int:
    """Elements that every tensor-parallel rank holds in full: norms, biases of rows, the position table."""
    row_biases = 2 * int(model.bias) * model.n_layer * model.d_model
    return position_parameters(model) + row_biases + (2 * model.n_layer + 1) * _norm_parameters(model)


def position_parameters(model: ModelConfig) -> int:
    """Elements of the table of learned positions; 0 where positions are rotary."""
    return model.max_seq_len * model.d_model if model.position == "learned" else 0


def _norm_parameters(model: ModelConfig) -> int:
    return model.d_model * (1 if model.norm == "rmsnorm" else 1 + int(model.bias))
