"""The training loop over made-up steps: phases, targets that do not count, samples that were skipped, resuming."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from chosen import slow_but
from llm.checkpoint.reader import find_latest, open_checkpoint
from llm.cluster.signals import Stop
from llm.config import PhaseChange, RunConfig
from llm.config.phases import consumed_samples
from llm.config.reports import LoggingConfig
from llm.config.sections import CheckpointConfig
from llm.data.batch import Batch, Step
from llm.errors import CheckpointError
from llm.parallel.mesh import Mesh
from llm.parity.batches import documents_of
from llm.train.ballot import Ballot
from llm.train.build import build_engine
from llm.train.engines.base import micro_batch
from llm.train.feed import Feed
from llm.train.loop import Trainer, train
from llm.train.run_folder import RunFolder
from llm.train.source import Pretraining
from llm.train.start import Run
from pool import RankPool
from tiny_run import V, case, plain

CPU = torch.device("cpu")
SAMPLES, TOKENS = [8, 16, 24, 40, 56, 60], [128, 256, 320, 448, 576, 608]


def config(**sections: Any) -> RunConfig:
    """6 steps: 2 of 8 samples of 16 tokens, then of 8 tokens 1 of 8 samples, 2 of 16, 1 of 4; saved after each second.

    So the micro-batches that a rank accumulates become more, and fewer, than in the first phase.
    """
    changes = (PhaseChange(16, seq_len=8), PhaseChange(24, global_batch_size=16), PhaseChange(56, global_batch_size=4))
    data = dict(phases=changes, document_masks=True, packing="best_fit", damaged="skip")
    train = dict(max_steps=6, eval_interval=6) | sections.pop("train", {})
    made = case(data=data, train=train, **sections)
    logging = LoggingConfig(interval=1, tensorboard=False)
    return replace(made, checkpoint=CheckpointConfig(interval=2, keep_last=9), logging=logging)


class MadeUp:
    """A rank's share of samples that are functions of their numbers; half of their targets count.

    Data-parallel rank r replaces r + 1 samples in every step, which gives it as many targets more than were planned.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, step: int) -> None:
        self.config, self.mesh, self.step = config, mesh, step
        self.consumed, self.wait_seconds, self.closed = 0, 0.0, False

    def next_step(self) -> Step:
        phase = [phase for phase in self.config.phases if phase.first_step <= self.step][-1]
        size = self.config.train.micro_batch_size
        share = phase.global_batch_size // self.mesh.dp_size
        first = consumed_samples(self.config.phases, self.step) + self.mesh.dp_rank * share
        self.step += 1
        starts = range(first, first + share, size)
        batches = [made_up_batch(range(start, start + size), phase.seq_len) for start in starts]
        planned = phase.global_batch_size * phase.seq_len // 2 - sum(range(self.mesh.dp_size + 1))
        return Step(batches, planned, skipped_samples=self.mesh.dp_rank + 1, replaced_targets=self.mesh.dp_rank + 1)

    def epochs(self) -> dict[str, float]:
        return {"made up": self.step / 10}

    def close(self) -> None:
        self.closed = True


def made_up_batch(samples: range, T: int) -> Batch:
    generators = [torch.Generator().manual_seed(sample) for sample in samples]
    tokens = torch.stack([torch.randint(V, (T + 1,), generator=generator) for generator in generators])
    documents = documents_of(torch.stack([torch.rand(T, generator=generator) < 0.3 for generator in generators]))
    counted = torch.arange(T).expand(len(samples), T) % 2
    ids = documents.position_ids.to(torch.int32)
    return Batch(tokens.to(torch.uint16), torch.tensor(samples), ids, documents.cu_seqlens, counted.to(torch.uint8))


def trained(config: RunConfig, root: Path, step: int = 0, stop: Stop | None = None) -> bool:
    """Train on this rank of a pool, from a checkpoint if step > 0; whether the loader was closed. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    folder = RunFolder(root, config.name)
    reader = open_checkpoint(folder.checkpoints / f"step-{step:08}") if step else None
    skipped = reader.state["skipped_samples"] if reader is not None else 0
    if dist.get_rank() == 0:
        folder.create()
    dist.barrier()
    loader, engine = MadeUp(config, mesh, step), build_engine(config, mesh, CPU, reader)
    feed = Feed(loader, CPU, config.train.max_steps - step, mesh.dp_group, skipped_samples=skipped)
    due = reader is not None and reader.state.get("validation_due", False)
    source, state = MadeUpSource(config, mesh), reader.state if reader is not None else {}
    run = MadeUpRun(config, folder, source, mesh, CPU, step, feed, engine, Ballot(stop), validation_due=due)
    run.resumed = state
    train(run)
    engine.close()
    return loader.closed


class MadeUpSource(Pretraining):
    """Text whose bytes were not counted."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        """Without a corpus."""
        self.config, self.mesh = config, mesh

    def loader(self, *, consumed: int, **ranks: Any) -> MadeUp:
        steps = range(self.config.train.max_steps + 1)
        return MadeUp(
            self.config,
            self.mesh,
            next(step for step in steps if consumed_samples(self.config.phases, step) == consumed),
        )

    def bits_per_byte(self, loss: float) -> None:
        return None

    def identity(self) -> dict[str, str]:
        return {"made up": "1"}


class MadeUpRun(Run):
    def validation_batches(self) -> Any:
        return iter([micro_batch(made_up_batch(range(2), 16), CPU)])


def spoil_a_moment(trainer: Trainer) -> None:
    """One of the numbers that this rank alone keeps, as a bit flip leaves it, after its step."""
    if trainer.run.step == 4 and trainer.run.mesh.rank == trainer.run.mesh.world_size - 1:
        next(iter(trainer.engine.optimizer.state.values()))["exp_avg"].view(-1)[0] = math.nan


def spoil_a_weight(trainer: Trainer) -> None:
    """Of the forward pass, alike on all ranks; not of the masters, which are saved."""
    if trainer.run.step == 4:
        trainer.engine.local_weight("blocks.0.norm_1.weight").view(-1)[0] = math.nan


def stopped(config: RunConfig, root: Path, step: int, spoil: Callable[[Trainer], None]) -> tuple[str, str]:
    """As `trained`, with a fault after each step: the error that ends the run on this rank. Collective."""
    healthy = Trainer.step

    def faulty(trainer: Trainer) -> Any:
        result = healthy(trainer)
        spoil(trainer)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", faulty)
        try:
            trained(config, root, step)
        except (CheckpointError, FloatingPointError) as error:
            return type(error).__name__, str(error)
    return "", ""


def lines(root: Path, name: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def steps(root: Path) -> list[dict[str, Any]]:
    return [line for line in lines(root) if "loss" in line]


@pytest.fixture(scope="module")
def whole(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two data-parallel ranks."""
    root = tmp_path_factory.mktemp("whole")
    assert two_ranks.run(trained, config(parallel=dict(zero_stage=2)), root) == [True, True]
    return root


def test_samples_and_tokens_follow_the_phases(whole: Path) -> None:
    found = steps(whole)
    assert [line["samples"] for line in found] == SAMPLES
    assert [line["tokens"] for line in found] == TOKENS
    assert [line["epochs"] for line in found] == [{"made up": step / 10} for step in range(1, 7)]
    for step, samples in ((2, 16), (4, 40), (6, 60)):
        assert open_checkpoint(whole / f"run/checkpoints/step-{step:08}").state["consumed_samples"] == samples


def test_a_line_of_metrics_is_complete(whole: Path) -> None:
    expected = {"step", "samples", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "tflops", "mfu",
                "mfu_formula", "mfu_non_causal", "hfu", "data_wait_seconds", "data_wait_share", "memory_bytes",
                "skipped_steps", "step_seconds", "epochs",
                "skipped_samples"}  # fmt: skip
    for line in steps(whole):
        assert line.keys() == expected and line["skipped_steps"] == 0
        assert line["data_wait_seconds"] == pytest.approx(line["data_wait_share"] * line["step_seconds"])
        assert 0 <= line["data_wait_share"] < 1 and line["memory_bytes"] > 2**20


def test_the_loss_is_the_mean_over_the_targets_that_count(whole: Path) -> None:
    assert steps(whole)[0]["loss"] == pytest.approx(math.log(V), abs=0.1)
    for line in steps(whole):
        assert line["loss"] == pytest.approx(math.log(V), abs=0.5)


def test_skipped_samples_are_counted_over_the_ranks_and_kept(whole: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    assert [line["skipped_samples"] for line in steps(whole)] == [3, 6, 9, 12, 15, 18]
    seldom = config(parallel=dict(zero_stage=2))
    seldom = replace(seldom, logging=replace(seldom.logging, interval=3))
    two_ranks.run(trained, seldom, tmp_path)
    assert [line["skipped_samples"] for line in steps(tmp_path)] == [9, 18]
    for root in (whole, tmp_path):  # whether or not its step is logged
        state = open_checkpoint(root / "run/checkpoints/step-00000004").state
        assert (state["skipped_samples"], state["data"]) == (12, {"made up": "1"})


def test_bits_per_byte_are_left_out_where_bytes_are_not_known(whole: Path) -> None:
    (validation,) = (line for line in lines(whole) if "val_loss" in line)
    assert validation.keys() == {"step", "val_loss"}


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_goes_on_as_the_whole_one_did(
    step: int, whole: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    checkpoint = f"run/checkpoints/step-{step:08}"
    shutil.copytree(whole / checkpoint, tmp_path / checkpoint)
    two_ranks.run(trained, config(parallel=dict(zero_stage=2)), tmp_path, step)
    timed = {"tokens_per_second", "tflops", "data_wait_seconds", "data_wait_share", "memory_bytes", "step_seconds"}
    for found, expected in zip(steps(tmp_path), steps(whole)[step:], strict=True):
        assert {key: found[key] for key in found.keys() - timed} == {key: expected[key] for key in found.keys() - timed}


TP_SP = dict(tensor_parallel=2, sequence_parallel=True)
LAYOUTS = {
    **{f"zero{stage}": dict(parallel=dict(zero_stage=stage)) for stage in (0, 1, 3)},
    "zero2-selective": dict(parallel=dict(zero_stage=2), train=dict(activation_checkpointing="selective")),
    "fsdp": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
    "tp2-sp": dict(parallel=TP_SP, train=dict(activation_checkpointing="full")),
}


@pytest.fixture(scope="module")
def alone(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the plain engine on one rank."""
    root = tmp_path_factory.mktemp("alone")
    one_rank.run(trained, plain(config(), micro_batch_size=4), root)
    return root


@pytest.mark.parametrize("name", slow_but(["zero3", "zero2-selective", "tp2-sp"], LAYOUTS))
def test_no_layout_changes_a_run_with_phases_and_documents(
    name: str, alone: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(trained, config(**LAYOUTS[name]), tmp_path)
    for quantity in ("loss", "grad_norm"):
        found, expected = ([line[quantity] for line in steps(root)] for root in (tmp_path, alone))
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-4 if quantity == "grad_norm" else 0)
    ranks = 1 if name == "tp2-sp" else 2
    assert [line["skipped_samples"] for line in steps(tmp_path)] == [step * (2 * ranks - 1) for step in range(1, 7)]


@pytest.mark.parametrize("ranks", slow_but([2], [1, 2]))
@pytest.mark.parametrize("spoil", [spoil_a_moment, spoil_a_weight])
def test_what_is_not_finite_rotates_no_good_checkpoint_out(
    spoil: Callable[[Trainer], None], ranks: int, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    """Started again and again with keep_last=1; of two ranks, one alone has the number that is not finite."""
    pool = one_rank if ranks == 1 else two_ranks
    made = config(parallel=dict(zero_stage=2), train=dict(eval_interval=2, state_check_interval=0))
    made = replace(made, checkpoint=CheckpointConfig(interval=2, keep_last=1))
    folder = tmp_path / "run/checkpoints"
    for start in (0, 2, 2):
        results = pool.run(stopped, made, tmp_path, start, spoil)
        (kind, message) = results[0]
        assert results == [(kind, message)] * ranks
        assert f"the last good checkpoint is {folder / 'step-00000002'}" in message
        if spoil is spoil_a_moment:
            assert kind == "CheckpointError" and f"step 4 is not saved: rank {ranks - 1} has values of" in message
            assert "(exp_avg) that are not finite" in message
        else:
            assert kind == "FloatingPointError" and "step 4: validation loss nan" in message
            assert lines(tmp_path)[-1]["val_loss"] == "nan"
        assert {path.name for path in folder.iterdir()} == {"step-00000002", "latest"}
        assert find_latest(folder) == (folder / "step-00000002", [])
    assert pool.run(trained, made, tmp_path, 2) == [True] * ranks
    assert {path.name for path in folder.iterdir()} == {"step-00000006", "latest"}


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(one_rank: RankPool, tmp_path: Path) -> None:
    made = replace(
        config(train=dict(rollbacks=0, spike_patience=1, state_check_interval=0)),
        checkpoint=CheckpointConfig(interval=3),
    )
    ((kind, message),) = one_rank.run(stopped, made, tmp_path, 0, spoil_a_weight)
    assert kind == "FloatingPointError" and "step 5: loss nan" in message
    assert f"the last good checkpoint is {tmp_path / 'run/checkpoints/step-00000003'}: lower optim.lr" in message
