"""ZeRO beyond parity: how a partitioned model is built, what the update uses, offload, and small buckets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.layout.counters import LiveStorages
from chosen import slow_but
from llm.config import RunConfig
from llm.model.gpt import GPT
from llm.model.init import initial_tensor
from llm.parallel.mesh import Mesh
from llm.parallel.parallelize import choose_layers
from llm.slices import Slice, slice_of
from llm.train.build import build_engine, build_model
from llm.train.engines.deepspeed_config import deepspeed_config
from llm.train.engines.plain import PlainEngine
from llm.train.optim import decays
from pool import RankPool
from test_parity_reference import STEPS, check
from test_train_engines import poisoned_step
from test_train_restart import first_half, second_half, tensors
from tiny_run import batches, case, on_ranks, plain, target_count

CPU = torch.device("cpu")


def with_zero_keys(config: RunConfig, **keys: Any) -> RunConfig:
    """The run with further keys of deepspeed.zero_optimization."""
    zero = {**config.deepspeed.get("zero_optimization", {}), **keys}
    return replace(config, deepspeed={"zero_optimization": zero})


# Construction


def skeleton(config: RunConfig, mesh: Mesh) -> GPT:
    with torch.device("meta"):
        return GPT(config.model, choose_layers(config, mesh))


def partitioned(config: RunConfig, mesh: Mesh) -> GPT:
    """The model as the engine holds it before DeepSpeed's own initialisation."""
    import deepspeed

    from llm.train.engines.deepspeed import partition

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    model = skeleton(config, mesh)
    generated = deepspeed_config(config, dp_size=mesh.dp_size, device="cpu")
    partition(model, generated, mesh, CPU, torch.float32)
    return model


def bytes_of_construction(config: RunConfig) -> dict[str, int]:
    mesh = Mesh.create(config.parallel, "cpu")
    sizes = [4 * p.numel() for p in skeleton(config, mesh).parameters()]
    with LiveStorages(existing=False) as parameters:
        model = partitioned(config, mesh)
    held = sum(4 * p.ds_tensor.numel() for p in model.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    with LiveStorages(existing=False) as build:
        build_engine(config, mesh, CPU).close()
    return {
        "total": sum(sizes),
        "largest": max(sizes),
        "held": held,
        "parameters": parameters.peak,
        "build": build.peak,
    }


def test_a_model_is_built_that_no_rank_could_hold(four_ranks: RankPool) -> None:
    """The peak while parameters are partitioned, and of the whole build with its fp32 masters and gradients."""
    config = case(
        model=dict(n_layer=4, d_model=64, n_kv_head=4),
        parallel=dict(zero_stage=3),
        train=dict(precision="bf16"),
    )
    config = with_zero_keys(config, reduce_bucket_size=1000, stage3_prefetch_bucket_size=1000)
    for found in four_ranks.run(bytes_of_construction, config):
        assert found["largest"] < found["total"] / 10
        assert found["total"] / 4 <= found["held"] < 1.01 * found["total"] / 4
        # A collective may hold on to the parameter before for a moment.
        assert found["parameters"] < found["held"] + 2.2 * found["largest"]
        # bf16 weights, fp32 masters and fp32 gradients: 10 bytes an element, a quarter of them on each rank.
        assert found["build"] < 10 / 4 * found["held"] + 2.2 * found["largest"] < found["total"]


def facts_of_partition(config: RunConfig) -> dict[str, Any]:
    mesh = Mesh.create(config.parallel, "cpu")
    model, before = partitioned(config, mesh), skeleton(config, mesh)
    parameters: dict[str, Any] = dict(model.named_parameters())
    same = all(
        slice_of(p) == slice_of(parameters[name])
        and getattr(p, "tensor_model_parallel", None) == getattr(parameters[name], "tensor_model_parallel", None)
        and tuple(parameters[name].ds_shape) == tuple(p.shape)
        for name, p in before.named_parameters()
    )
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameters["embedding.weight"]]):
        embedding = parameters["embedding.weight"].detach().clone()
    return {
        "same": same,
        "tied": model.embedding.weight is model.head.weight,
        "zero": not embedding.any(),
        "groups": {tuple(dist.get_process_group_ranks(p.ds_process_group)) for p in parameters.values()},
        "expected": tuple(dist.get_process_group_ranks(mesh.dp_group)),
        "patched": torch.nn.functional.linear.__module__,
    }


def test_partitions_are_spread_over_the_data_parallel_group(four_ranks: RankPool) -> None:
    config = case(parallel=dict(tensor_parallel=2, zero_stage=3))
    found = four_ranks.run(facts_of_partition, config)
    for facts in found:
        assert facts["same"] and facts["tied"] and facts["zero"]
        assert facts["groups"] == {facts["expected"]}
        assert "deepspeed" not in facts["patched"]
    assert {facts["expected"] for facts in found} == {(0, 2), (1, 3)}


RESIDENT = {
    "zero3": dict(parallel=dict(zero_stage=3)),
    "zero3-untied-accumulation": dict(
        parallel=dict(zero_stage=3), model=dict(tie_embeddings=False), train=dict(micro_batch_size=1)
    ),
}


@pytest.mark.parametrize("name", slow_but(["zero3"], RESIDENT))
def test_small_parameters_that_stay_whole(name: str, two_ranks: RankPool) -> None:
    """With DeepSpeed's own persistence threshold: no parameter of a model this small is freed."""
    config = replace(case(**RESIDENT[name]), deepspeed={})
    check(config, two_ranks.run(on_ranks, config, STEPS))


@pytest.mark.parametrize("resident", slow_but([True], [False, True]))
def test_zero_3_under_tensor_parallelism(resident: bool, four_ranks: RankPool) -> None:
    config = case(parallel=dict(tensor_parallel=2, zero_stage=3), train=dict(micro_batch_size=1))
    if resident:
        config = replace(config, deepspeed={})
    check(config, four_ranks.run(on_ranks, config, STEPS))


# Masters, gradients and updates


def pieces(engine: Any) -> list[tuple[str, str, Slice, int, np.ndarray]]:
    return [(p.name, p.kind, p.slice, p.start, p.data.numpy().copy()) for p in engine.state_pieces()]


def first_step(config: RunConfig) -> dict[str, Any]:
    """What this rank holds before and after a step, and the gradients that the engine reports between them."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    before = pieces(engine)
    engine.set_lr(config.optim.lr)
    engine.forward_backward(batches(config, 0, mesh.dp_rank, mesh.dp_size, False), target_count(False))
    gradients = {name: engine.gradient(name).numpy().copy() for name in engine.parameters}
    norm = float(engine.step().grad_norm)
    after = pieces(engine)
    engine.close()
    return {"before": before, "after": after, "gradients": gradients, "norm": norm}


def whole(results: list[dict[str, Any]], when: str) -> dict[tuple[str, str], np.ndarray]:
    """The global tensors by (name, kind), each element of which some rank gave exactly once."""
    found, seen = {}, {}
    for name, kind, held, start, data in (piece for result in results for piece in result[when]):
        for store, values in ((found, data), (seen, np.ones_like(data))):
            tensor = store.setdefault((name, kind), np.zeros(held.global_shape, np.float32))
            index = [slice(None)] * tensor.ndim
            index[held.dim] = slice(held.start, held.stop)
            part = tensor[tuple(index)].copy().reshape(-1)
            part[start : start + len(data)] += values
            tensor[tuple(index)] = part.reshape(held.shape)
    assert all((count == 1).all() for count in seen.values())
    return found


def adamw_step(config: RunConfig, name: str, weight: np.ndarray, gradient: np.ndarray) -> dict[str, np.ndarray]:
    """AdamW's first step in float64."""
    optim, (beta_1, beta_2) = config.optim, config.optim.betas
    first, second = (1 - beta_1) * gradient, (1 - beta_2) * gradient**2
    update = (first / (1 - beta_1)) / (np.sqrt(second / (1 - beta_2)) + optim.eps)
    decayed = weight * (1 - optim.lr * optim.weight_decay * decays(name))
    return {"master": decayed - optim.lr * update, "exp_avg": first, "exp_avg_sq": second}


def check_step(config: RunConfig, results: list[dict[str, Any]]) -> None:
    """Masters start as the fp32 initial weights, bit for bit, and the update is AdamW's of the reported gradients."""
    before, after = whole(results, "before"), whole(results, "after")
    for name in results[0]["gradients"]:
        weight = before[name, "master"]
        initial = initial_tensor(config.model, config.seed, name, weight.shape)
        assert np.array_equal(weight, initial.numpy()), f"{name} does not start as the initial weight"
    gradients = {name: g.astype(np.float64) for name, g in results[0]["gradients"].items()}
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert results[0]["norm"] == pytest.approx(norm, rel=1e-6)
    assert norm > config.optim.grad_clip
    for name, gradient in gradients.items():
        clipped = gradient * (config.optim.grad_clip / (norm + 1e-6))
        expected = adamw_step(config, name, before[name, "master"].astype(np.float64), clipped)
        for kind, value in expected.items():
            error = np.linalg.norm(after[name, kind] - value)
            assert error <= 1e-6 * np.linalg.norm(value) + 1e-12, f"{kind} of {name}: {error:.2e}"


FAST = [(1, "optimizer"), (2, "none"), (3, "all")]
LAYOUTS = [(stage, "none") for stage in (1, 2, 3)] + [(stage, "optimizer") for stage in (1, 2, 3)] + [(3, "all")]


@pytest.mark.parametrize("precision", slow_but(["bf16"], ["fp32", "bf16"]))
@pytest.mark.parametrize(("stage", "offload"), slow_but(FAST, LAYOUTS, several=True))
def test_the_update_uses_the_reported_gradient(stage: int, offload: str, precision: str, two_ranks: RankPool) -> None:
    config = case(
        parallel=dict(zero_stage=stage, offload=offload),
        optim=dict(weight_decay=0.5, grad_clip=0.1),
        train=dict(precision=precision, micro_batch_size=1),
    )
    check_step(config, two_ranks.run(first_step, config))


WITH_TP = [(1, "none"), (1, "optimizer"), (3, "none"), (3, "all")]


@pytest.mark.parametrize(("stage", "offload"), slow_but([(1, "optimizer"), (3, "none")], WITH_TP, several=True))
def test_the_update_under_tensor_parallelism(stage: int, offload: str, four_ranks: RankPool) -> None:
    config = case(
        parallel=dict(zero_stage=stage, offload=offload, tensor_parallel=2),
        optim=dict(weight_decay=0.5, grad_clip=0.1),
        train=dict(precision="bf16"),
    )
    check_step(config, four_ranks.run(first_step, config))


# Offload


OFFLOADED = slow_but(
    [(2, "optimizer"), (3, "all")], [*((stage, "optimizer") for stage in (1, 2, 3)), (3, "all")], several=True
)


@pytest.mark.parametrize("micro_batch_size", slow_but([1], [4, 1]))
@pytest.mark.parametrize(("stage", "offload"), OFFLOADED)
def test_offload_gives_the_same_training(stage: int, offload: str, micro_batch_size: int, two_ranks: RankPool) -> None:
    config = case(parallel=dict(zero_stage=stage, offload=offload), train=dict(micro_batch_size=micro_batch_size))
    check(config, two_ranks.run(on_ranks, config, STEPS))


@pytest.mark.parametrize("precision", slow_but(["bf16"], ["fp32", "bf16"]))
@pytest.mark.parametrize(("stage", "offload"), OFFLOADED)
def test_an_offloaded_run_resumes_exactly(
    stage: int, offload: str, precision: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    config = case(parallel=dict(zero_stage=stage, offload=offload), train=dict(precision=precision))
    whole_run = two_ranks.run(first_half, config, tmp_path / "a")
    assert two_ranks.run(second_half, config, tmp_path / "a", tmp_path / "b") == whole_run
    after = tensors(tmp_path / "b")
    for key, value in tensors(tmp_path / "a").items():
        assert np.array_equal(value, after[key]), key


@pytest.mark.parametrize(("first", "second"), [((1, "none"), (3, "all")), ((2, "optimizer"), (1, "none"))])
def test_offload_reads_checkpoints_of_other_layouts(
    first: tuple[int, str], second: tuple[int, str], two_ranks: RankPool, tmp_path: Path
) -> None:
    configs = [case(parallel=dict(zero_stage=stage, offload=offload)) for stage, offload in (first, second)]
    whole_run = two_ranks.run(first_half, configs[0], tmp_path / "a")[0]
    resumed = two_ranks.run(second_half, configs[1], tmp_path / "a", tmp_path / "b")[0]
    np.testing.assert_allclose(resumed, whole_run, atol=1e-5)


@pytest.mark.parametrize("precision", slow_but(["bf16"], ["fp32", "bf16"]))
@pytest.mark.parametrize(("stage", "offload"), OFFLOADED)
def test_a_lost_gradient_is_not_offloaded_in_silence(
    stage: int, offload: str, precision: str, two_ranks: RankPool
) -> None:
    config = case(parallel=dict(zero_stage=stage, offload=offload), train=dict(precision=precision))
    for norm, skipped in two_ranks.run(poisoned_step, config):
        assert not np.isfinite(norm)
        assert not skipped


# Buckets

SMALL = dict(reduce_bucket_size=500, allgather_bucket_size=300, stage3_prefetch_bucket_size=400)
BUCKETS = {
    "small": SMALL,
    "small-overlapped": dict(SMALL, overlap_comm=True),
    "small-not-contiguous": dict(SMALL, contiguous_gradients=False),
    "one-parameter-each-overlapped": dict(reduce_bucket_size=1, allgather_bucket_size=2, overlap_comm=True),
}


@pytest.mark.parametrize("stage", slow_but([2], [1, 2, 3]))
@pytest.mark.parametrize("buckets", slow_but(["one-parameter-each-overlapped"], BUCKETS))
def test_buckets_do_not_change_the_training(buckets: str, stage: int, two_ranks: RankPool) -> None:
    """The largest parameter has 4096 elements, so that some are larger than a bucket and some share one."""
    config = case(parallel=dict(zero_stage=stage), train=dict(micro_batch_size=1))
    config = with_zero_keys(config, **BUCKETS[buckets])
    check(config, two_ranks.run(on_ranks, config, STEPS))


@pytest.mark.parametrize("stage", slow_but([], [1, 2, 3]))
def test_buckets_in_bf16(stage: int, two_ranks: RankPool) -> None:
    """Each micro-batch's gradient is rounded to bf16 once; no bucket rounds their sum again."""
    config = case(
        parallel=dict(zero_stage=stage), train=dict(micro_batch_size=1, precision="bf16"), optim=dict(grad_clip=0.1)
    )
    oracle = PlainEngine(plain(config), build_model(config, None), None, CPU)
    oracle.forward_backward(batches(config, 0, 0, 1, False), target_count(False))
    expected = {name: oracle.gradient(name).numpy() for name in oracle.parameters}
    everything = np.sqrt(sum(float((g**2).sum()) for g in expected.values()))
    for keys in (BUCKETS["small"], BUCKETS["small-overlapped"]):
        found = two_ranks.run(first_step, with_zero_keys(config, **keys))
        check_step(config, found)
        for name, gradient in found[0]["gradients"].items():
            error = np.linalg.norm(gradient - expected[name])
            assert error <= 1e-6 * np.linalg.norm(expected[name]) + 1e-7 * everything, f"{name}: {error:.2e}"
