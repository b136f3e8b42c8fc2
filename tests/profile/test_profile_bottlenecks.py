"""Each bottleneck is found in the records that show it, is first among the findings, and gains what its model says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from llm.config import reports, sections
from llm.profile.bottlenecks import MOST, Finding, bottlenecks
from llm.profile.record import Collective, Host, Loader, Memory, Op, Record, Sync
from profile_records import LAYOUT, longer, record, waiting

PASSES = ("mul", "sub", "mean", "pow", "rsqrt")


def unfused(found: Record) -> Record:
    """Norms of 90 passes of half a millisecond, in place of 9 of each kind; and a short operation for each norm."""
    passes = [Op(f"aten::{name}", "norm", 18, 9.0) for name in PASSES]
    found = replace(found, layout=LAYOUT | {"impl": "reference"})
    return replace(longer("norm", 60.0, found), ops=(*passes, Op("aten::sqrt_", "norm", 9, 0.1)))


def many_micro_batches(found: Record, launches: int = 6_000, gap_ms: float = 34.0) -> Record:
    """Sixteen times few tokens: norms reach 9 % of the roofline, attention 13 %."""
    found, host = longer("norm", 30.0, longer("attention", 30.0, found)), Host(launches, gap_ms, gap_ms)
    return replace(found, layout=LAYOUT | {"micro_batch": 1, "grad_accum": 16}, host_time=host)


# What is wrong: (its finding's name, the ranks' records, what would be gained, words of where and of the advice).
CASES: dict[str, tuple[list[Record], float, str]] = {
    "slow rank": ([waiting(50.0, record(0)), longer("attention", 50.0, record(1))], 50.0, "rank 1 on node1 attention"),
    "slow loader": ([record(r, loader=Loader(30.0)) for r in range(2)], 30.0, "data.loader=native"),
    "host synchronisation": (
        [record(r, syncs=(Sync("llm/model/gpt.py:70", 64, 40.0), Sync("x.py:1", 1, 0.1))) for r in range(2)],
        40.0, "gpt.py:70 64 times logging.interval",
    ),
    "unfused part": ([unfused(record(r)) for r in range(2)], 45.1 - 2 * 9 * 0.5, "norm fused train.impl=auto"),
    "recomputation": (
        [longer("qkv", 35.0, record(r, layout=LAYOUT | {"recompute": "full"}), "recompute_ms") for r in (0, 1)], 35.0,
        "train.activation_checkpointing=none",
    ),
    "small micro-batches": (
        [many_micro_batches(record(r)) for r in range(2)], (34 + 36 - 0.8 * 10 * 3 - 2 * 9 / 141 + 1) * 15 / 16,
        "train.micro_batch_size 16",
    ),
    "exposed collective": ([waiting(30.0 + 9 * r, record(r)) for r in range(2)], 31.0, "all_reduce overlap_comm"),
    "host gaps": ([record(r, host_time=Host(900, 52.2, 50.0)) for r in range(2)], 25.0, "train.micro_batch_size"),
    "optimizer": (
        [longer("optimizer", 60.0, record(r, layout=LAYOUT | {"zero_stage": 0})) for r in range(2)], 32.0,
        "parallel.zero_stage=1",
    ),
    "slow part": (
        [longer("head_loss", 40.0, record(r)) for r in range(2)], 52.0 - 3 * 0.8 * 12, "head_loss vocab_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_named_first(name: str) -> None:
    records, gain, words = CASES[name]
    first = bottlenecks(records)[0]
    assert first.name == name
    assert first.gain_ms == pytest.approx(gain, abs=1.0)
    assert first.share == pytest.approx(first.gain_ms / max(r.step_ms for r in records))
    for word in words.split():
        assert word in first.where + " " + first.advice


def test_a_step_in_which_nothing_is_wrong_has_no_large_finding() -> None:
    assert all(found.share < 0.05 for found in bottlenecks([record(0), record(1)]))


@pytest.mark.parametrize("name", CASES)
def test_findings_are_ranked_and_few(name: str) -> None:
    records = CASES[name][0]
    found = bottlenecks([replace(r, syncs=tuple(Sync(f"f.py:{i}", 1, i) for i in range(30))) for r in records])
    gains = [each.gain_ms for each in found[:-1]]
    assert len(found) == MOST and gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert found[-1].name == "memory peak" and found[-1].gain_ms == 0


def test_advice_names_settings_that_there_are() -> None:
    keys = {
        f"{prefix}.{field.name}"
        for prefix, section in (
            ("model", sections.ModelConfig), ("data", sections.DataConfig), ("parallel", sections.ParallelConfig),
            ("train", sections.TrainConfig), ("logging", reports.LoggingConfig),
        )
        for field in fields(section)
    }  # fmt: skip
    import re

    named: set[str] = set()
    stages = [LAYOUT | {"zero_stage": stage, "tp": tp, "engine": engine}
              for stage in (0, 3) for tp in (1, 2) for engine in ("plain", "deepspeed")]  # fmt: skip
    for records, *_ in CASES.values():
        for layout in (LAYOUT, *stages):
            changed = [
                replace(r, layout=layout | {k: r.layout[k] for k in ("recompute", "grad_accum")}) for r in records
            ]
            for found in bottlenecks(changed):
                named |= set(re.findall(r"\b((?:model|data|parallel|train|logging)\.\w+)", found.advice))
    for kind in ("weights", "gradients", "moments", "activations", "temporary"):
        memory = replace(record().memory, categories={kind: 5})
        named |= set(re.findall(r"\b((?:model|parallel|train)\.\w+)", bottlenecks([record(memory=memory)])[-1].advice))
    assert len(named) > 10 and named <= keys


def test_one_slow_rank_does_not_blame_its_part() -> None:
    records, _, _ = CASES["slow rank"]
    assert [found.name for found in bottlenecks(records) if found.gain_ms > 10] == ["slow rank"]


def test_a_rank_waiting_for_another_is_no_exposed_collective() -> None:
    found = bottlenecks([waiting(50.0, record(0)), record(1)])
    assert not [each for each in found if each.name == "exposed collective" and each.gain_ms > 1]


@pytest.mark.parametrize(("gap_ms", "bound"), [(4.0, 400 * 0.025), (34.0, 34.0 - 0.2)])
def test_the_hosts_time_bounds_what_larger_micro_batches_gain(gap_ms: float, bound: float) -> None:
    found = bottlenecks([many_micro_batches(record(rank), launches=400, gap_ms=gap_ms) for rank in range(2)])
    gains = [each.gain_ms for each in found if each.name == "small micro-batches"]
    assert gains == [pytest.approx((bound + 1) * 15 / 16)]


def test_what_small_micro_batches_cost_is_no_slow_part() -> None:
    found = bottlenecks([many_micro_batches(record(rank)) for rank in range(2)])
    gains = [each.gain_ms for each in found if each.name == "slow part"]
    assert gains and sum(gains) == pytest.approx((34 + 36 - 0.8 * 10 * 3 - 2 * 9 / 141) / 16)


def test_the_profilers_share_goes_to_the_part_with_most_operations() -> None:
    slowed = [longer("qkv", 40.0, record(rank)) for rank in range(2)]
    slowed = [replace(each, unprofiled_step_ms=75.0, ops=(Op("aten::item", "qkv", 4000, 1.0),)) for each in slowed]
    assert not [each for each in bottlenecks(slowed) if each.name == "slow part"]


def test_a_single_rank_is_compared_with_nobody() -> None:
    assert "slow rank" not in {found.name for found in bottlenecks([record(world=1)])}


def test_the_slow_rank_of_four_is_the_one_that_is_busy() -> None:
    records = [waiting(50.0, record(rank, 4)) for rank in range(4)]
    records[2] = longer("qkv", 50.0, record(2, 4))
    first = bottlenecks(records)[0]
    assert first.name == "slow rank" and first.where.startswith("rank 2 on node2") and first.gain_ms == 50.0


def test_a_rank_that_is_slow_in_some_steps_alone_is_no_slow_rank() -> None:
    once, often = (91.0, *[73.8] * 3), (73.8, *[91.0] * 3)
    records = [record(0, busy_ms=(73.8,) * 4), record(1, busy_ms=once)]
    assert "slow rank" not in {found.name for found in bottlenecks(records)}
    first = bottlenecks([records[0], record(1, busy_ms=often)])[0]
    assert first.name == "slow rank" and first.gain_ms == pytest.approx(17.2)


def test_the_profilers_own_time_is_no_gap() -> None:
    slowed = [record(rank, host_time=Host(900, 25.0, 20.0), unprofiled_step_ms=52.0) for rank in range(2)]
    assert not [found for found in bottlenecks(slowed) if found.name == "host gaps" and found.gain_ms > 1]


def on_gpu(found: Record) -> Record:
    parts = tuple(replace(p, device_ms=p.forward_ms + p.backward_ms, backward_ms=p.forward_ms) for p in found.parts)
    return replace(found, device="NVIDIA H200", parts=parts)


def test_on_a_gpu_a_wait_costs_no_more_than_the_idle_time() -> None:
    waits = (Sync("llm/train/loop.py:80", 4, 60.0),)
    first = bottlenecks([on_gpu(record(rank, syncs=waits, host_time=Host(900, 12.0, 9.0))) for rank in range(2)])[0]
    assert first.name == "host synchronisation" and first.ms == 60.0 and first.gain_ms == 12.0


def test_on_a_gpu_small_micro_batches_cost_the_time_without_a_kernel() -> None:
    layout, idle = LAYOUT | {"grad_accum": 4}, Host(900, 22.2, 9.0)
    found = bottlenecks([on_gpu(record(rank, layout=layout, host_time=idle)) for rank in range(2)])
    gains = {each.name: each.gain_ms for each in found}
    assert gains["small micro-batches"] == pytest.approx((22.2 - 0.2 - 2.0 + 1.0) * 3 / 4)


def test_on_a_gpu_recomputation_is_a_share_of_the_kernels() -> None:
    found = on_gpu(record())
    parts = tuple(replace(p, forward_ms=1, backward_ms=2, recompute_ms=1, device_ms=40) if p.name == "qkv" else p
                  for p in found.parts)  # fmt: skip
    gains = [f.gain_ms for f in bottlenecks([replace(found, parts=parts)]) if f.name == "recomputation"]
    assert gains == [10.0]


NOTHING: dict[str, Callable[[Record], Record]] = {
    "times": lambda r: replace(
        r, step_ms=0.0, unprofiled_step_ms=0.0, unattributed_ms=0.0,
        parts=tuple(replace(p, forward_ms=0, backward_ms=0, flops=0, bytes=0) for p in r.parts),
    ),
    "parts": lambda r: replace(r, parts=()),
    "ops": lambda r: replace(r, ops=(), syncs=(), collectives=(), host_time=Host(0, 0, 0)),
    "memory": lambda r: replace(r, memory=Memory(0, {}, 0, (), ())),
    "layout": lambda r: replace(r, layout={}),
    "machine": lambda r: replace(r, machine=replace(r.machine, matmul_tflops=0, copy_gbs=0)),
}  # fmt: skip


@pytest.mark.parametrize("missing", NOTHING)
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_missing_or_zero_is_no_error(missing: str, world: int) -> None:
    found = bottlenecks([NOTHING[missing](record(rank, world)) for rank in range(world)])
    assert all(isinstance(each, Finding) and each.gain_ms >= 0 for each in found)


def test_tensor_parallel_communication_has_its_own_advice() -> None:
    slow = (Collective("all_reduce", 4, 48, 40.0, 40.0, 1e8),)
    layout = LAYOUT | {"tp": 4, "dp": 2}
    first = bottlenecks([record(rank, 8, collectives=slow, layout=layout) for rank in range(8)])[0]
    assert first.name == "exposed collective" and "parallel.sequence_parallel=true" in first.advice
    assert "global_batch_size" not in first.advice
    slow = (Collective("all_reduce", 2, 48, 40.0, 40.0, 1e8),)
    first = bottlenecks([record(rank, 8, collectives=slow, layout=layout) for rank in range(8)])[0]
    assert "tensor_parallel" not in first.advice and "global_batch_size" in first.advice
