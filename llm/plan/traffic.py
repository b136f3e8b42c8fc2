"""What a step of training sends, in closed form: bytes of each collective, for one rank, by the layout.

m micro-batches on a rank; B, T, C of one; L blocks, R of them recomputed whole; k ranks in a group; w bytes of a weight
(and of an activation's element); N parameters on a tensor-parallel rank, those of the blocks N_L. Tests compare these
formulas with what is counted (tests/traffic_count.py), to the byte.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, TypeAlias

from llm.config import ModelConfig, RunConfig


class Collective(NamedTuple):
    """A kind of collective among so many ranks."""

    kind: str
    """all_reduce, all_gather, reduce_scatter, broadcast or reduce"""
    ranks: int

    @property
    def ring_factor(self) -> float:
        """Bytes that a rank sends per byte of payload, by ring algorithms (Patarasu & Yuan 2009), mean over ranks.

        An all-reduce is a reduce-scatter and an all-gather, of each of which a rank sends (k - 1) / k of the payload;
        so does a broadcast or a reduction along a chain, where one rank of k sends nothing.
        """
        once = (self.ranks - 1) / self.ranks
        return 2 * once if self.kind == "all_reduce" else once


Payload: TypeAlias = "Counter[Collective]"
FP32 = 4


def payload(config: RunConfig, world_size: int) -> Payload:
    """Bytes of payload (a collective's whole buffer on one rank) by collective, in every step but a run's first.

    ZeRO 3 with stage3_param_persistence_threshold 0 and a model within stage3_max_live_parameters. Padding is not in
    the formulas: every parameter's rows divide by the data-parallel ranks (FSDP), their sum by twice as many (ZeRO).
    """
    tp = config.parallel.tensor_parallel
    dp = world_size // tp
    result: Payload = Counter()
    if tp > 1:
        result += tensor_parallel(config, tp, micro_batches(config, dp))
    if dp > 1:
        result += data_parallel(config, dp)
    return result


def micro_batches(config: RunConfig, dp: int) -> int:
    return config.train.global_batch_size // (dp * config.train.micro_batch_size)


def tensor_parallel(config: RunConfig, tp: int, m: int) -> Payload:
    """Megatron's (Shoeybi et al. 2019, section 3; with sequence parallelism Korthikanti et al. 2022, section 4.2.2).

    One `activation` is B T C w bytes. f and g are all-reduces of it; with sequence parallelism each is a reduce-scatter
    in one direction and an all-gather in the other.
    """
    model, train = config.model, config.train
    blocks, every = model.n_layer, train.checkpoint_every
    recomputed = -(-blocks // every) if train.activation_checkpointing == "full" else 0
    w = weight_bytes(config)
    tokens = train.micro_batch_size * config.data.seq_len
    activation = tokens * model.d_model * w
    result: Payload = Counter()
    # The vocabulary-parallel loss: two fp32 numbers per token from each rank.
    result[Collective("all_gather", tp)] = m * 2 * FP32 * tokens * tp
    if not config.parallel.sequence_parallel:
        # f and g of attention and feed-forward, g of the embedding, f of the head; a block that is computed again ends
        # at the input of its last product, so only attention's g is sent again.
        result[Collective("all_reduce", tp)] = m * (4 * blocks + 2 + recomputed) * activation
        return result
    # Forward: into the columns 2 L + 1 (head); backward: out of the rows 2 L + 1 (embedding), and the input of each of
    # 2 L columns again for its weight's gradient; recomputed: into the columns.
    result[Collective("all_gather", tp)] += m * (6 * blocks + 2 + 2 * recomputed) * activation
    result[Collective("reduce_scatter", tp)] = m * (4 * blocks + 2 + recomputed) * activation
    # Gradients of what every rank holds whole: norms, biases of rows, the position table.
    result[Collective("all_reduce", tp)] = m * whole_parameters(model) * w
    return result


def data_parallel(config: RunConfig, dp: int) -> Payload:
    """Gradients in fp32, each element once per reduction, and weights in their own precision.

    Rajbhandari et al. 2020, section 7, count 2 N for the all-reduce of stage 0, and for stages 1 and 2 a
    reduce-scatter and an all-gather, 2 N too. DeepSpeed all-reduces gradients at stages 1 and 2 as well, and at
    stage 2 after every micro-batch.
    """
    m, stage, w = micro_batches(config, dp), config.parallel.zero_stage, weight_bytes(config)
    tp = config.parallel.tensor_parallel
    n, gradients = parameters(config.model, tp), FP32 * parameters(config.model, tp)
    reduce, gather, scatter = (Collective(kind, dp) for kind in ("all_reduce", "all_gather", "reduce_scatter"))
    if config.train.engine == "fsdp":
        # At stage 3 the blocks are gathered for the backward pass again, but for the last, which is still there.
        again = block_parameters(config.model, tp) if stage == 3 else 0
        return Counter({gather: m * (n + again) * w, scatter: m * gradients})
    if stage == 3:
        return Counter({gather: m * n * w, scatter: m * gradients})
    if stage == 0:
        return Counter({reduce: gradients})
    return Counter({reduce: gradients * (m if stage == 2 else 1), gather: n * w})


def weight_bytes(config: RunConfig) -> int:
    return FP32 if config.train.precision == "fp32" else 2


def parameters(model: ModelConfig, tp: int) -> int:
    """N: elements of all parameters on one of `tp` ranks, the vocabulary padded to a multiple of tp."""
    tables = (1 if model.tie_embeddings else 2) * -(-model.vocab_size // tp) * model.d_model
    positions = model.max_seq_len * model.d_model if model.position == "learned" else 0
    return tables + positions + _norm(model) + block_parameters(model, tp)


def block_parameters(model: ModelConfig, tp: int) -> int:
    """N_L: elements of the blocks' parameters on one of `tp` ranks."""
    C, F, bias = model.d_model, model.ff_dim, int(model.bias)
    columns = (model.n_head + 2 * model.kv_heads) * model.head_dim + F * (2 if model.activation == "swiglu" else 1)
    split = columns * (C + bias) + C * C + F * C
    return model.n_layer * (split // tp + 2 * bias * C + 2 * _norm(model))


def whole_parameters(model: ModelConfig) -> int:
    """Elements that every tensor-parallel rank holds whole: norms, biases of rows, the position table."""
    positions = model.max_seq_len if model.position == "learned" else 0
    return (positions + 2 * int(model.bias) * model.n_layer) * model.d_model + (2 * model.n_layer + 1) * _norm(model)


def _norm(model: ModelConfig) -> int:
    return model.d_model * (1 if model.norm == "rmsnorm" else 1 + int(model.bias))
