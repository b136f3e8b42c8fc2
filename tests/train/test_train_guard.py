"""The guard is silent while replicas agree, and one flipped bit on one rank is found, named, and stops the run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chosen import slow_but
from llm.config import ParallelConfig
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from llm.train.guard import Finding, checksum, compare_replicas, equal_ranks, majority, odd_ranks
from pool import RankPool, free_port
from runs import DEEPSPEED, Workspace, succeeded
from tiny_run import batches, case, target_count

GRID = torch.arange(4).view(2, 2)  # ranks [dp, tp]


@torch.no_grad()
def flip(tensor: Tensor, index: int = 0, bit: int = 0) -> None:
    """Flip one bit of one element, in place; bit 0 is the mantissa's last."""
    bits = tensor.view(-1)[index : index + 1].view({4: torch.int32, 2: torch.int16}[tensor.element_size()])
    bits.bitwise_xor_(1 << bit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 7, 8, 1001])
def test_any_one_bit_changes_the_checksum(dtype: torch.dtype, numel: int) -> None:
    tensor = torch.randn(numel).to(dtype)
    before = checksum(tensor)
    assert before.dtype == torch.int64 and before.shape == ()
    for index in {0, numel // 2, numel - 1}:
        for bit in range(8 * tensor.element_size() - 1):
            flip(tensor, index, bit)
            assert checksum(tensor) != before, (index, bit)
            flip(tensor, index, bit)
    assert checksum(tensor) == before


def test_bits_are_compared_and_not_values() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([math.nan])) == checksum(torch.tensor([math.nan]))
    values = torch.randn(9)
    for offset in range(4):  # wherever in memory
        assert checksum(torch.cat([torch.ones(offset), values])[offset:]) == checksum(values)
    assert checksum(torch.empty(0)) == 0


def test_which_ranks_hold_the_same() -> None:
    assert equal_ranks(GRID, split=False, replicated=True) == [[0, 1, 2, 3]]
    assert equal_ranks(GRID, split=False, replicated=False) == [[0, 1], [2, 3]]
    assert equal_ranks(GRID, split=True, replicated=True) == [[0, 2], [1, 3]]
    assert equal_ranks(GRID, split=True, replicated=False) == []


def test_the_majority_is_right() -> None:
    assert majority([0, 1, 2, 3], [5, 7, 7, 7]) == ([1, 2, 3], [0])
    assert majority([1, 3], [0, 5, 0, 6]) == ([1], [3])


@pytest.mark.parametrize(
    ("right", "wrong", "odd"),
    [([1, 2, 3], [0], {0}), ([0, 1, 2], [3, 4], {3, 4}), ([0, 1], [2, 3], set()), ([0], [1, 2], set())],
)
def test_only_a_majority_proves_a_rank_wrong(right: list[int], wrong: list[int], odd: set[int]) -> None:
    assert odd_ranks([Finding("a", right, wrong), Finding("b", [0], [1])]) == odd


LAYOUTS = {
    **{
        f"zero{stage}-tp{tp}-{precision}": dict(
            parallel=dict(zero_stage=stage, tensor_parallel=tp), train=dict(precision=precision)
        )
        for stage in range(4)
        for tp in (1, 2, 4)
        for precision in ("fp32", "bf16")
        if (stage or precision == "fp32") and (tp != 4 or stage == 1)
    },
    "sequence": dict(parallel=dict(tensor_parallel=2, sequence_parallel=True)),
    "fsdp": dict(parallel=dict(zero_stage=3, tensor_parallel=2), train=dict(engine="fsdp")),
}


def findings_over_steps(config: Any, steps: int) -> list[str]:
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, torch.device("cpu"))
    found = [*map(str, compare_replicas(engine, mesh))]
    for step in range(steps):
        engine.set_lr(config.optim.lr)
        engine.forward_backward(batches(config, step, mesh.dp_rank, mesh.dp_size, False), target_count(False))
        engine.step()
        found += map(str, compare_replicas(engine, mesh))
    engine.close()
    return found


FAST = ["zero0-tp1-fp32", "sequence", "fsdp"]


@pytest.mark.parametrize("name", slow_but(FAST, LAYOUTS))
def test_silent_while_replicas_agree(name: str, four_ranks: RankPool) -> None:
    sections = LAYOUTS[name] | {"model": dict(n_kv_head=4, dropout=0.1)}
    assert four_ranks.run(findings_over_steps, case(**sections), 3) == [[]] * 4


def findings_after_a_flip(config: Any, name: str, rank: int) -> list[str]:
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, torch.device("cpu"))
    if mesh.rank == rank:
        flip(engine.local_weight(name), index=1)
    found = [*map(str, compare_replicas(engine, mesh))]
    engine.close()
    return found


FLIPS = {
    # Held whole by all four ranks.
    ("blocks.0.norm_1.weight", 1, 3): "ranks [3] from ranks [0, 1, 2]",
    ("blocks.1.down.bias", 0, 0): "ranks [0] from ranks [1, 2, 3]",
    # Split over TP: rank 2 and rank 0 hold the same half.
    ("blocks.1.qkv.weight", 1, 2): "ranks [2] from ranks [0]",
    ("embedding.weight", 2, 3): "ranks [3] from ranks [1]",
    # Partitioned over DP: ranks 2 and 3 hold the same part.
    ("norm.weight", 3, 3): "ranks [3] from ranks [2]",
}


@pytest.mark.parametrize("flipped", FLIPS, ids=str)
def test_one_flipped_bit_is_found_and_named(flipped: tuple[str, int, int], four_ranks: RankPool) -> None:
    name, stage, rank = flipped
    precision = "bf16" if stage == 2 else "fp32"
    config = case(parallel=dict(tensor_parallel=2, zero_stage=stage), train=dict(precision=precision))
    expected = [f"{name} differs: {FLIPS[flipped]}"]
    assert four_ranks.run(findings_after_a_flip, config, name, rank) == [expected] * 4


def held_of(config: Any, name: str) -> int:
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, torch.device("cpu"))
    numel = engine.local_weight(name).numel()
    engine.close()
    return numel


def test_the_padding_of_a_partition_is_not_held(four_ranks: RankPool) -> None:
    """DeepSpeed gives each of 4 ranks 2 of 6 elements, and leaves what is beyond them as it found it."""
    model = dict(d_model=6, n_head=1, n_kv_head=1, d_ff=8)
    config = case(model=model, parallel=dict(zero_stage=3))
    assert four_ranks.run(held_of, config, "norm.weight") == [2, 2, 2, 0]


def two_tables_findings(values: list[float]) -> list[str]:
    mesh = Mesh.create(ParallelConfig(), "cpu")
    table = nn.Parameter(torch.tensor([values[mesh.rank]]))
    engine: Any = SimpleNamespace(parameters={"table": table}, replicated=True, local_weight=lambda name: table)
    return [*map(str, compare_replicas(engine, mesh))]


def test_equal_nans_are_replicas(two_ranks: RankPool) -> None:
    assert two_ranks.run(two_tables_findings, [math.nan, math.nan]) == [[], []]
    assert two_ranks.run(two_tables_findings, [0.0, -0.0]) == [["table differs: ranks [1] from ranks [0]"]] * 2


def faulty_run(space: Workspace, name: str, **overrides: Any) -> Any:
    """A real run whose rank 1 suffers one flipped bit, in a norm's weight, after step 6; no hashes of state."""
    launcher = [*DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port())]
    script = Path(__file__).resolve().parents[1] / "faults/faulty_memory.py"
    overrides |= {"train__state_check_interval": 0}  # else they find it first
    return space.run([*launcher, str(script), *space.arguments(name=name, **overrides)])


@pytest.mark.slow
def test_a_run_stops_on_every_rank_and_saves_nothing_of_it(workspace: Workspace) -> None:
    """The guard's interval is 20; but step 8 is saved, and no checkpoint may hold what was not compared."""
    result = faulty_run(workspace, "guarded", train__guard_interval=20, train__max_steps=12)
    text = result.stdout + result.stderr
    assert result.returncode == 1, text[-3000:]
    assert text.count("error: step 8: weights that ranks should share") == 1
    assert "blocks.0.norm_1.weight differs: ranks [1] from ranks [0]" in text
    assert "Traceback" not in text and text.count("exits with return code = 1") == 1
    checkpoints = workspace.path / "runs/guarded/checkpoints"
    assert [p.name for p in checkpoints.iterdir() if p.is_dir()] == ["step-00000004"]
    shutil.rmtree(checkpoints.parent)


@pytest.mark.slow
def test_a_run_that_warns_goes_on(workspace: Workspace) -> None:
    settings = dict(train__guard_interval=5, train__guard_action="warn", train__max_steps=12, checkpoint__interval=12)
    result = faulty_run(workspace, "warned", **settings)
    succeeded(result)
    steps = [line.split()[2] for line in result.stdout.splitlines() if "blocks.0.norm_1.weight differs" in line]
    assert steps == ["10:", "12:"]
    shutil.rmtree(workspace.path / "runs/warned")
