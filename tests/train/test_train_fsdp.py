"""FSDP2 behind the engine protocol: the plain engine's training, in shards, with everybody's checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from chosen import slow_but
from llm.checkpoint.reader import open_checkpoint
from llm.config import RunConfig
from llm.errors import InputError
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine, build_model
from llm.train.engines import fsdp
from llm.train.engines.fsdp import FSDPEngine
from llm.train.optim import decays
from pool import RankPool
from runs import Workspace, succeeded
from test_parity_reference import STEPS, check, check_low_precision
from test_train_engines import poisoned_step
from test_train_restart import first_half, save, second_half, steps, tensors
from tiny_run import batches, case, on_ranks, plain, target_count

CPU = torch.device("cpu")
# Rows that no number of ranks divides; of the 5 rows of `up` and the 9 of the norms the last of four ranks has none.
UNEVEN = dict(n_head=1, n_kv_head=1, d_model=9, d_ff=5, vocab_size=53, max_seq_len=17, position="learned")


def sharded(stage: int = 3, tp: int = 1, sp: bool = False, model: Any = None, **train: Any) -> RunConfig:
    return case(
        parallel=dict(zero_stage=stage, tensor_parallel=tp, sequence_parallel=sp),
        model=model or {},
        train=dict(engine="fsdp", **train),
    )


def built(config: RunConfig) -> tuple[FSDPEngine, Mesh]:
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    assert isinstance(engine, FSDPEngine)
    return engine, mesh


def forward_backward(engine: Any, config: RunConfig, mesh: Mesh, step: int = 0) -> float:
    data = batches(config, step, mesh.dp_rank, mesh.dp_size, False)
    return float(engine.forward_backward(data, target_count(False)))


# -- The same training --


CASES = {
    "fsdp3": sharded(3),
    "fsdp2": sharded(2),
    "fsdp2-untied-dropout": sharded(2, model=dict(tie_embeddings=False, dropout=0.1)),
    "fsdp3-untied-dropout-recompute": sharded(
        3, model=dict(tie_embeddings=False, dropout=0.1), activation_checkpointing="full"
    ),
    "fsdp2-recompute": sharded(2, activation_checkpointing="full"),
    "fsdp3-selective": sharded(3, model=dict(dropout=0.1), activation_checkpointing="selective"),
    "fsdp3-micro-1": sharded(3, micro_batch_size=1),
    "fsdp3-learned-rms-swiglu": sharded(
        3, model=dict(position="learned", norm="rmsnorm", activation="swiglu", bias=False)
    ),
}


@pytest.mark.parametrize(
    "name", slow_but(["fsdp3", "fsdp2-untied-dropout", "fsdp3-selective", "fsdp3-learned-rms-swiglu"], CASES)
)
def test_two_ranks(name: str, two_ranks: RankPool) -> None:
    check(CASES[name], two_ranks.run(on_ranks, CASES[name], STEPS))


@pytest.mark.parametrize("stage", [2, 3])
def test_unequal_counts_of_targets(stage: int, two_ranks: RankPool) -> None:
    config = sharded(stage, micro_batch_size=1)
    check(config, two_ranks.run(on_ranks, config, STEPS, True), ragged=True)


WIDE = {
    "tp2-fsdp3": sharded(3, 2),
    "tp2-fsdp2-untied-dropout-recompute": sharded(
        2, 2, model=dict(tie_embeddings=False, dropout=0.1), activation_checkpointing="full"
    ),
    "tp2-sp-fsdp3": sharded(3, 2, sp=True, model=dict(dropout=0.1, position="learned"), z_loss=1e-3),
    "tp2-fsdp3-padded-ragged": sharded(3, 2, model=dict(vocab_size=51), micro_batch_size=1),
    "fsdp3-uneven": sharded(3, model=UNEVEN, micro_batch_size=1),
    "fsdp2-uneven-untied": sharded(2, model=dict(UNEVEN, tie_embeddings=False)),
}


@pytest.mark.parametrize("name", slow_but(["fsdp3-uneven"], WIDE))
def test_four_ranks(name: str, four_ranks: RankPool) -> None:
    ragged = "ragged" in name
    check(WIDE[name], four_ranks.run(on_ranks, WIDE[name], STEPS, ragged), ragged=ragged)


def test_one_data_parallel_rank(two_ranks: RankPool) -> None:
    check(sharded(3, 2), two_ranks.run(on_ranks, sharded(3, 2), STEPS))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", slow_but([3], [2, 3]))
def test_low_precision_accumulates_and_reduces_in_fp32(stage: int, precision: str, two_ranks: RankPool) -> None:
    """From the same micro-batches it gives the plain engine's gradients, but for the order of an fp32 sum."""
    config = sharded(stage, precision=precision, micro_batch_size=1)
    exact = case(train=dict(engine="plain", precision=precision, micro_batch_size=1))
    got, expected = (two_ranks.run(on_ranks, c, 1)[0] for c in (config, exact))
    assert got["losses"] == pytest.approx(expected["losses"], abs=1e-7)
    assert got["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    for name, reference in expected["gradients"].items():
        np.testing.assert_allclose(got["gradients"][name], reference, rtol=1e-5, atol=1e-8, err_msg=name)


def test_bf16_with_tensor_parallelism(four_ranks: RankPool) -> None:
    config = sharded(3, 2, precision="bf16")
    check_low_precision(config, four_ranks.run(on_ranks, config, STEPS))


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 2), ("bf16", 3)])
def test_a_lost_gradient_is_not_skipped_in_silence(precision: str, stage: int, two_ranks: RankPool) -> None:
    for norm, skipped in two_ranks.run(poisoned_step, sharded(stage, precision=precision)):
        assert not math.isfinite(norm)
        assert not skipped


def overflow(config: RunConfig) -> tuple[int, int, float, bool, bool]:
    """Start from a scale that overflows: skipped steps, updates, last scale; were weights kept, then changed?"""
    engine, mesh = built(config)
    assert engine.scale is not None
    engine.scale = type(engine.scale)(scale=2.0**40)
    before = {name: engine.local_weight(name).clone() for name in engine.parameters}
    skipped, kept = 0, True
    for step in range(60):
        forward_backward(engine, config, mesh, step)
        if not engine.step().skipped:
            break
        skipped += 1
        kept &= all(torch.equal(engine.local_weight(name), value) for name, value in before.items())
    changed = not all(torch.equal(engine.local_weight(name), value) for name, value in before.items())
    return skipped, engine.updates, engine.scalar_state()["loss_scale"]["scale"], kept, changed


def test_fp16_skips_an_overflow_and_goes_on(two_ranks: RankPool) -> None:
    results = two_ranks.run(overflow, sharded(3, precision="fp16"))
    assert results[0] == results[1]
    skipped, updates, scale, kept, changed = results[0]
    assert 1 < skipped < 59 and updates == 1 and scale < 2.0**40
    assert kept and changed


def test_decay_goes_by_name(one_rank: RankPool) -> None:
    for group in one_rank.run(decay_groups, sharded()):
        assert group and all(decays(name) == (decay > 0) for name, decay in group.items())


def decay_groups(config: RunConfig) -> dict[str, float]:
    engine, _ = built(config)
    decay = {id(p): group["weight_decay"] for group in engine.optimizer.param_groups for p in group["params"]}
    return {name: decay[id(master)] for name, master in engine.masters.items()}


# -- In shards --


def residents(config: RunConfig) -> dict[str, Any]:
    """What this rank holds after a step and a validation: elements of each weight and of all first moments, the names
    of weights that are still gathered, and the rows that pad its part of the vocabulary."""
    engine, mesh = built(config)
    forward_backward(engine, config, mesh)
    engine.step()
    engine.evaluate(batches(config, 1, mesh.dp_rank, mesh.dp_size, False))
    held = {name: engine.local_weight(name).numel() for name in engine.parameters}
    moments = sum(s["exp_avg"].numel() for s in engine.optimizer.state.values())
    gathered = [name for name, p in engine.model.named_parameters() if not isinstance(p, DTensor)]
    table = engine.parameters["embedding.weight"].full_tensor()
    part = engine.slices["embedding.weight"]
    return dict(held=held, moments=moments, gathered=gathered, padding=table[part.stop - part.start :].detach().numpy())


@pytest.mark.parametrize("stage", [2, 3])
def test_each_rank_holds_its_rows(stage: int, four_ranks: RankPool) -> None:
    config = sharded(stage, model=UNEVEN)
    results = four_ranks.run(residents, config)
    total = {name: p.numel() for name, p in build_model(config, None).named_parameters()}
    assert {name: sum(r["held"][name] for r in results) for name in total} == total
    assert sum(r["moments"] for r in results) == sum(total.values())
    assert results[3]["held"]["blocks.0.up.weight"] == 0, "the case has an empty shard"
    assert all(r["held"][name] <= -(-n // 2) for r in results for name, n in total.items())
    assert [r["gathered"] for r in results] == [[]] * 4, "weights stay gathered after a validation"


def test_padding_rows_stay_zero(two_ranks: RankPool) -> None:
    results = two_ranks.run(residents, sharded(3, 2, model=dict(vocab_size=51)))
    assert [len(r["padding"]) for r in results] == [0, 1]
    assert not results[1]["padding"].any()


def gathered_at_the_head(config: RunConfig) -> list[bool]:
    """Whether each block's weights are whole when the forward pass has come to the head."""
    engine, mesh = built(config)
    found: list[bool] = []

    def look(*_: Any) -> None:
        found[:] = [not isinstance(block.qkv.weight, DTensor) for block in engine.model.blocks.values()]  # pyright: ignore

    engine.model.head.register_forward_hook(look)
    forward_backward(engine, config, mesh)
    return found


def test_stage_says_how_long_weights_stay_gathered(two_ranks: RankPool) -> None:
    assert two_ranks.run(gathered_at_the_head, sharded(2))[0] == [True, True]
    assert two_ranks.run(gathered_at_the_head, sharded(3))[0] == [False, False]


def whole_units(config: RunConfig) -> list[int]:
    """Elements of uncut parameters right before each unit is cut, while the engine is built."""
    found: list[int] = []
    cut = fsdp.fully_shard

    def counted(unit: Any, **options: Any) -> Any:
        found.append(sum(p.numel() for p in models[0].parameters() if not p.is_meta and not isinstance(p, DTensor)))
        return cut(unit, **options)

    models: list[torch.nn.Module] = []
    shard = fsdp.shard
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(fsdp, "fully_shard", counted)
        patched.setattr(fsdp, "shard", lambda model, *rest: models.append(model) or shard(model, *rest))
        built(config)
    return found


def test_the_whole_model_never_exists(two_ranks: RankPool) -> None:
    model = build_model(sharded(), None)
    block = sum(p.numel() for p in model.blocks["0"].parameters())
    rest = sum(p.numel() for p in model.parameters()) - 2 * block
    assert two_ranks.run(whole_units, sharded())[0] == [block, block, rest]


def test_offload_is_refused_where_there_is_nothing_to_offload_from(one_rank: RankPool) -> None:
    config = case(parallel=dict(zero_stage=3, offload="all"), train=dict(engine="fsdp"))
    assert "use parallel.offload=none" in one_rank.run(refusal, config)[0]


def refusal(config: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        built(config)
    return str(error.value)


# -- Checkpoints --


RESTARTS = {
    "fsdp2": sharded(2),
    "fsdp3-bf16": sharded(3, precision="bf16"),
    "fsdp3-fp16": sharded(3, precision="fp16"),
    "tp2": sharded(3, 2, model=dict(vocab_size=51)),
}


@pytest.mark.parametrize("name", slow_but(["fsdp2", "fsdp3-bf16"], RESTARTS))
def test_restart_is_exact(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    same_again(RESTARTS[name], two_ranks, tmp_path)


WIDE_RESTARTS = {"tp2": sharded(3, 2, model=dict(vocab_size=51)), "uneven": sharded(3, model=UNEVEN)}


@pytest.mark.parametrize("name", slow_but(["tp2"], WIDE_RESTARTS))
def test_restart_of_four_ranks_is_exact(name: str, four_ranks: RankPool, tmp_path: Path) -> None:
    same_again(WIDE_RESTARTS[name], four_ranks, tmp_path)


def same_again(config: RunConfig, pool: RankPool, folder: Path) -> None:
    whole = pool.run(first_half, config, folder / "a")
    resumed = pool.run(second_half, config, folder / "a", folder / "b")
    assert resumed == whole
    same(tensors(folder / "a"), tensors(folder / "b"))
    scalars = [open_checkpoint(folder / run / "step-00000006").state["engine"] for run in "ab"]
    assert scalars[0] == scalars[1]
    assert {name for name, _ in tensors(folder / "a")} == {n for n, _ in build_model(config, None).named_parameters()}


def same(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert np.array_equal(value, after[key]), key


def copied(config: RunConfig, root: Path, other: Path) -> list[float]:
    """Read the checkpoint of step 3 under `config`, save it again under `other`, and train 3 steps (returned)."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU, open_checkpoint(root / "step-00000003"))
    save(engine, mesh, other, 3)
    losses = steps(engine, config, mesh, 3, 3)
    engine.close()
    return losses


OTHERS = {
    "plain": case(train=dict(engine="plain"), model=UNEVEN),
    "zero1": case(parallel=dict(zero_stage=1), model=UNEVEN),
    "fsdp2": sharded(2, model=UNEVEN),
}


@pytest.mark.parametrize("name", slow_but(["zero1"], OTHERS))
def test_checkpoints_pass_between_engines(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """There and back: what the other engine reads of FSDP's and FSDP of the other's is what was written."""
    ours, other = sharded(3, model=UNEVEN), OTHERS[name]
    whole = two_ranks.run(first_half, ours, tmp_path / "ours")[0]
    there = two_ranks.run(copied, other, tmp_path / "ours", tmp_path / "there")[0]
    back = two_ranks.run(copied, ours, tmp_path / "there", tmp_path / "back")[0]
    written = at_step_3(tmp_path / "ours")
    same(written, at_step_3(tmp_path / "there"))
    same(written, at_step_3(tmp_path / "back"))
    assert back == whole
    np.testing.assert_allclose(there, whole, atol=1e-5)


def test_four_ranks_to_one(four_ranks: RankPool, one_rank: RankPool, tmp_path: Path) -> None:
    wide = sharded(3, 2, model=dict(vocab_size=51))
    whole = four_ranks.run(first_half, wide, tmp_path / "wide")[0]
    alone = one_rank.run(copied, plain(wide, micro_batch_size=8), tmp_path / "wide", tmp_path / "alone")[0]
    np.testing.assert_allclose(alone, whole, atol=1e-5)
    back = four_ranks.run(copied, wide, tmp_path / "alone", tmp_path / "back")[0]
    same(at_step_3(tmp_path / "wide"), at_step_3(tmp_path / "back"))
    assert back == whole


def at_step_3(root: Path) -> dict[tuple[str, str], Any]:
    reader = open_checkpoint(root / "step-00000003")
    names, kinds = {name for name, _ in reader.manifest.tensors}, ("master", "exp_avg", "exp_avg_sq")
    return {(name, kind): reader.read(name, kind).numpy() for name in names for kind in kinds}


# -- As users start it --


@pytest.mark.slow
def test_runs_under_torchrun_and_resumes_under_another_engine(workspace: Workspace) -> None:
    layout = dict(name="fsdp", train__engine="fsdp", parallel__zero_stage=3, train__eval_interval=3)
    # No compiler: that is DeepSpeed's need.
    env = workspace.environment(CXX="none-such")
    command = workspace.torchrun_command(2, **layout, train__max_steps=3)
    succeeded(workspace.run(command, env))
    succeeded(workspace.python(name="fsdp", train__engine="plain", train__max_steps=5))
    losses = workspace.losses("fsdp")
    assert len(losses) == 5 and losses[5] < losses[1]
