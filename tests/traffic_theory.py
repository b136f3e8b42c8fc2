"""Bytes that one rank sends in a training step, in closed form: of each collective, by layout.

m micro-batches on a rank; B, T, C of one; L blocks, R of them fully recomputed; k ranks in a group; w bytes of a weight
(and of an activation's element); N parameters on a tensor-parallel rank, N_L of them in the blocks. Tests count what is
sent (tests/traffic_count.py) and find these formulas to the byte.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, TypeAlias

from llm.config import ModelConfig, RunConfig
from llm.plan.memory import (
    FP32,
    block_parameters,
    norm_parameters,
    parameters,
    position_parameters,
    weight_bytes,
)


class Collective(NamedTuple):
    """A kind of collective and the size of its group."""

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


def payload(config: RunConfig, world_size: int) -> Payload:
    """Bytes of payload (a collective's whole buffer on one rank) by collective, in every step but a run's first.

    ZeRO 3 with stage3_param_persistence_threshold 0 and a model within stage3_max_live_parameters. Padding is not in
    the formulas: every parameter's rows divide by the data-parallel ranks (FSDP), their sum by twice as many (ZeRO).
    """
    tp = config.parallel.tensor_parallel
    dp = world_size // tp
    m = config.train.global_batch_size // (dp * config.train.micro_batch_size)
    result: Payload = Counter()
    if tp > 1:
        result += tensor_parallel(config, tp, m)
    if dp > 1:
        result += data_parallel(config, dp, m)
    return result


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
    # Gradients of what every rank holds in full: norms, biases of rows, the position table.
    result[Collective("all_reduce", tp)] = m * replicated_parameters(model) * w
    return result


def data_parallel(config: RunConfig, dp: int, m: int) -> Payload:
    """Gradients in fp32, each element once per reduction, and weights in their own precision.

    Rajbhandari et al. 2020, section 7, count 2 N for the all-reduce of stage 0, and for stages 1 and 2 a
    reduce-scatter and an all-gather, 2 N too. DeepSpeed all-reduces gradients at stages 1 and 2 as well, and at
    stage 2 after every micro-batch.
    """
    tp, stage, w = config.parallel.tensor_parallel, config.parallel.zero_stage, weight_bytes(config)
    n = parameters(config.model, tp)
    gradients = FP32 * n
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


def replicated_parameters(model: ModelConfig) -> int:
    """Elements that every tensor-parallel rank holds in full: norms, biases of rows, the position table."""
    row_biases = 2 * int(model.bias) * model.n_layer * model.d_model
    return position_parameters(model) + row_biases + (2 * model.n_layer + 1) * norm_parameters(model)
