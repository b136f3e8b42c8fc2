"""`verify` can fail: each of these faults, which others have shipped, is found and its parameter named."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import silu

from chosen import slow_but
from llm.config import RunConfig
from llm.model.layers import IGNORED_TARGET, CausalAttention, DenseLayers
from llm.parallel.collectives import ReduceFromTensorParallel
from llm.parallel.layers import TensorParallel, TensorParallelLayers
from llm.parity.layout import Layout
from llm.slices import Slice, mark
from llm.train.engines.base import StepResult
from llm.train.engines.deepspeed import DeepSpeedEngine
from matrix import verified
from pool import RankPool
from tiny_run import case


def g_without_all_reduce() -> AbstractContextManager:
    return patch.object(ReduceFromTensorParallel, "forward", staticmethod(lambda ctx, x, *_: x.view_as(x)))


def f_without_all_reduce() -> AbstractContextManager:
    return patch("llm.parallel.layers.start_all_reduce_", lambda x, group: x)


def unmarked_slices() -> AbstractContextManager:
    def split(tensor: Tensor, held: Slice) -> nn.Parameter:
        parameter = nn.Parameter(tensor)
        mark(parameter, held)
        return parameter  # without tensor_model_parallel

    return patch("llm.parallel.layers.split", split)


def norm_gradients_not_reduced() -> AbstractContextManager:
    return patch.object(TensorParallel, "on_weight", lambda self, weight: weight)


def clipping_on_one_rank() -> AbstractContextManager:
    from llm.train.engines import deepspeed

    honest = deepspeed.clip
    return patch.object(deepspeed, "clip", honest if dist.get_rank() == 0 else lambda *arguments: None)


def mean_of_means() -> AbstractContextManager:
    honest = DeepSpeedEngine.forward_backward

    def forward_backward(self: DeepSpeedEngine, micro_batches: list, target_count: int) -> Tensor:
        own = sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in micro_batches)
        return honest(self, micro_batches, own * self.mesh.dp_size)

    return patch.object(DeepSpeedEngine, "forward_backward", forward_backward)


def same_dropout_for_every_ranks_heads() -> AbstractContextManager:
    honest = TensorParallelLayers.attention

    def attention(self: TensorParallelLayers, *arguments: Any) -> nn.Module:
        module = honest(self, *arguments)
        module.head_offset = 0
        return module

    return patch.object(TensorParallelLayers, "attention", attention)


def same_dropout_at_every_site() -> AbstractContextManager:
    return patch.object(TensorParallelLayers, "dropout", lambda self, p, site: DenseLayers.dropout(self, p, 0))


def attention_without_documents() -> AbstractContextManager:
    honest = CausalAttention.forward
    tensor_parallel = TensorParallelLayers.attention

    def attention(self: TensorParallelLayers, *arguments: Any) -> nn.Module:
        module = tensor_parallel(self, *arguments)
        module.forward = lambda heads, samples, documents=None: honest(module, heads, samples)
        return module

    return patch.object(TensorParallelLayers, "attention", attention)


def first_positions_on_every_rank() -> AbstractContextManager:
    return patch.object(
        TensorParallel, "local_positions", lambda self, positions: positions.chunk(self.size, dim=-1)[0]
    )


def after_each_step(fault: Callable[[DeepSpeedEngine], None]) -> AbstractContextManager:
    honest = DeepSpeedEngine.step

    def step(self: DeepSpeedEngine) -> StepResult:
        result = honest(self)
        fault(self)
        return result

    return patch.object(DeepSpeedEngine, "step", step)


def moment_lost() -> AbstractContextManager:
    return after_each_step(lambda engine: engine.optimizer.state[engine.parameters["norm.weight"]]["exp_avg"].zero_())


def weight_not_updated() -> AbstractContextManager:
    """One element of one rank's slice."""
    before: list[Tensor] = []

    def restore(engine: DeepSpeedEngine) -> None:
        element = engine.parameters["blocks.1.down.weight"].data[0, :1]
        if before and engine.mesh.tp_rank == 1:
            element.copy_(before[-1])
        before.append(element.clone())

    return after_each_step(restore)


def replica_not_updated() -> AbstractContextManager:
    """One element on one data-parallel rank."""

    def nudge(engine: DeepSpeedEngine) -> None:
        if engine.mesh.dp_rank == 1:
            engine.parameters["blocks.1.up.weight"].data[0, 0] += 1e-6

    return after_each_step(nudge)


def piece_not_saved() -> AbstractContextManager:
    honest = DeepSpeedEngine.state_pieces

    def state_pieces(self: DeepSpeedEngine) -> Any:
        return (p for p in honest(self) if (p.name, self.mesh.rank) != ("blocks.0.up.weight", 1))

    return patch.object(DeepSpeedEngine, "state_pieces", state_pieces)


def other_initial_weights() -> AbstractContextManager:
    honest = Layout.__init__

    def other(self: Layout, config: RunConfig, *arguments: Any) -> None:
        honest(self, replace(config, seed=config.seed + 1), *arguments)

    return patch.object(Layout, "__init__", other)


def stale_graph() -> AbstractContextManager:
    """The place of the first block's dropouts is a constant of the graph, and nothing looks whether it still holds."""
    unguarded = partial(torch.compile, options={"guard_filter_fn": lambda guards: [False] * len(guards)})
    stack = ExitStack()
    stack.enter_context(patch("llm.train.compiled.DynamicInt", int))
    stack.enter_context(patch.object(torch, "compile", unguarded))
    return stack


@dataclass(frozen=True)
class Mutation:
    fault: Callable[[], AbstractContextManager]
    config: RunConfig
    named: tuple[str, ...]
    """What the failures must name."""


TP2, DP2 = dict(tensor_parallel=2), dict()
MUTATIONS = {
    "g-without-all-reduce": Mutation(
        g_without_all_reduce, case(parallel=TP2), ("loss", "blocks.0.attention_output.weight gradient")
    ),
    "f-without-all-reduce": Mutation(
        f_without_all_reduce, case(parallel=TP2), ("blocks.1.norm_2.weight gradient", "embedding.weight gradient")
    ),
    "unmarked-slices": Mutation(unmarked_slices, case(parallel=TP2), ("gradient norm", "blocks.0.qkv.weight exp_avg")),
    "unmarked-slices-zero2-bf16": Mutation(
        unmarked_slices,
        case(parallel=dict(**TP2, zero_stage=2), train=dict(precision="bf16")),
        ("gradient norm", "blocks.0.qkv.weight exp_avg"),
    ),
    "norm-gradients-not-reduced": Mutation(
        norm_gradients_not_reduced,
        case(parallel=dict(**TP2, sequence_parallel=True)),
        ("blocks.0.norm_1.weight gradient", "blocks.1.norm_2.bias gradient", "norm.weight gradient"),
    ),
    "norm-gradients-not-reduced-bf16": Mutation(
        norm_gradients_not_reduced,
        case(parallel=dict(**TP2, sequence_parallel=True, zero_stage=2), train=dict(precision="bf16")),
        ("blocks.0.norm_1.weight gradient", "blocks.1.norm_2.bias gradient", "norm.weight gradient"),
    ),
    "clipping-on-one-rank": Mutation(
        clipping_on_one_rank, case(parallel=TP2), ("blocks.0.qkv.weight exp_avg", "blocks.1.down.weight exp_avg_sq")
    ),
    "mean-of-means": Mutation(mean_of_means, case(parallel=DP2), ("loss", "blocks.0.qkv.weight gradient")),
    "mean-of-means-zero2-bf16": Mutation(
        mean_of_means,
        case(parallel=dict(zero_stage=2), train=dict(precision="bf16")),
        ("loss", "blocks.0.qkv.weight gradient"),
    ),
    "same-dropout-for-every-ranks-heads": Mutation(
        same_dropout_for_every_ranks_heads,
        case(parallel=TP2, model=dict(dropout=0.1)),
        ("loss", "blocks.0.qkv.weight gradient"),
    ),
    "same-dropout-at-every-site": Mutation(
        same_dropout_at_every_site,
        case(parallel=TP2, model=dict(dropout=0.1)),
        ("loss", "blocks.1.down.weight gradient"),
    ),
    "attention-without-documents": Mutation(
        attention_without_documents,
        case(parallel=TP2, data=dict(document_masks=True)),
        ("loss", "blocks.0.qkv.weight gradient"),
    ),
    "first-positions-on-every-rank": Mutation(
        first_positions_on_every_rank,
        case(
            parallel=dict(**TP2, sequence_parallel=True),
            model=dict(position="learned"),
            data=dict(document_masks=True),
        ),
        ("loss", "position_table.weight gradient"),
    ),
    "moment-lost": Mutation(moment_lost, case(parallel=DP2), ("norm.weight exp_avg",)),
    "weight-not-updated": Mutation(weight_not_updated, case(parallel=TP2), ("blocks.1.down.weight weight",)),
    "replica-not-updated": Mutation(replica_not_updated, case(parallel=DP2), ("blocks.1.up.weight differs",)),
    "piece-not-saved": Mutation(
        piece_not_saved, case(parallel=TP2), ("blocks.0.up.weight (exp_avg): 2048 of 4096 elements are in no rank",)
    ),
    "stale-graph": Mutation(
        stale_graph,
        case(parallel=TP2, model=dict(dropout=0.1), train=dict(compile="blocks")),
        ("loss", "blocks.1.down.weight gradient"),
    ),
    "other-initial-weights": Mutation(other_initial_weights, case(parallel=TP2), ("embedding.weight weight, step 0",)),
}

FAST = [
    *("g-without-all-reduce", "norm-gradients-not-reduced-bf16", "clipping-on-one-rank", "mean-of-means"),
    *("same-dropout-for-every-ranks-heads", "weight-not-updated", "replica-not-updated", "piece-not-saved"),
]


def mutated(name: str) -> tuple[bool, list[str]]:
    mutation = MUTATIONS[name]
    with mutation.fault():
        report = verified(mutation.config)
    return report.passed, report.failures


@pytest.mark.parametrize("name", slow_but(FAST, MUTATIONS))
def test_a_fault_is_found_and_named(name: str, two_ranks: RankPool) -> None:
    results = two_ranks.run(mutated, name)
    assert not any(passed for passed, _ in results)
    failures = results[0][1]
    for text in MUTATIONS[name].named:
        assert any(text in failure for failure in failures), failures


@pytest.mark.slow
def test_without_the_faults_it_passes(two_ranks: RankPool) -> None:
    for config in {repr(mutation.config): mutation.config for mutation in MUTATIONS.values()}.values():
        assert two_ranks.run(verified, config)[0].failures == []


def with_another_activation() -> bool:
    with patch("llm.model.gpt.gelu", lambda x, impl: silu(x)):
        return verified(case(parallel=TP2)).passed


def test_a_fault_that_the_oracle_shares_does_not_show(two_ranks: RankPool) -> None:
    """What verify cannot say, tests/model/test_model_options.py and test_model_transformers.py do."""
    assert two_ranks.run(with_another_activation) == [True, True]
