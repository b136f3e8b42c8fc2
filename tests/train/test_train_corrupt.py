"""Bits that flip in masters and moments, and gradients that are computed wrongly: found, named, and not saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chosen import slow_but
from llm.checkpoint.writer import checkpoints
from llm.config import RunConfig
from llm.config.sections import CheckpointConfig
from llm.errors import CorruptError
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from llm.train.engines.base import Engine
from llm.train.loop import Trainer
from llm.train.replay import replay
from pool import RankPool
from test_train_loop import config, steps, trained
from test_train_spikes import LAYOUTS, equal, final
from tiny_run import batches, case, target_count

CPU = torch.device("cpu")


def made(layout: str, **train: Any) -> RunConfig:
    sections: dict[str, Any] = LAYOUTS[layout]
    base = config(**sections | dict(train=dict(eval_interval=6) | sections.get("train", {}) | train))
    return replace(base, checkpoint=CheckpointConfig(interval=3, keep_last=9))


def flipped(config: RunConfig, root: Path, at: int, kind: str, rank: int, where: str) -> tuple[str, list[int]]:
    """As `trained`, with a bit that flips on one rank after step `at`, before or after it is saved. Collective."""

    def flip(trainer: Trainer) -> None:
        if trainer.run.step == at and trainer.run.mesh.rank == rank:
            tensors = trainer.engine.optimizer_tensors()
            name = next(name for name in reversed(tensors) if name.startswith(f"{kind} of "))
            tensors[name].view(-1)[:1].view(torch.int32).bitwise_xor_(1)  # the lowest of the mantissa

    def then(healthy: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(trainer: Trainer, *args: Any, **options: Any) -> Any:
            result = healthy(trainer, *args, **options)
            flip(trainer)
            return result

        return faulty

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, where, then(getattr(Trainer, where)))
        try:
            trained(config, root)
        except CorruptError as error:
            return str(error), sorted(error.odd)
    return "", []


@pytest.mark.parametrize("kind", slow_but(["exp_avg_sq", "weights"], ["exp_avg", "exp_avg_sq", "weights"]))
@pytest.mark.parametrize("layout", slow_but(["zero1-bf16", "zero3"], LAYOUTS))
def test_a_bit_that_flips_between_two_steps_is_found_and_named(
    layout: str, kind: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    rank = 1
    found = two_ranks.run(flipped, made(layout), tmp_path, 3, kind, rank, "step")
    assert found[0] == found[1]
    message, odd = found[0]
    assert f"step 3: bits changed that no step has written, on rank {rank}: {kind} of " in message, message
    assert odd == [rank] and "no checkpoint" in message
    assert not checkpoints(tmp_path / "run/checkpoints")  # what was to be saved then is not


def test_a_bit_that_flips_after_a_save_is_found_by_the_next_reading(two_ranks: RankPool, tmp_path: Path) -> None:
    ours = made("zero2")
    ours = replace(ours, logging=replace(ours.logging, interval=5))
    (message, odd), _ = two_ranks.run(flipped, ours, tmp_path, 3, "exp_avg", 0, "save")
    assert message.startswith("step 5: bits changed") and odd == [0]
    assert "the last good checkpoint is" in message and "step-00000003" in message


def test_where_nothing_flips_nothing_is_found(two_ranks: RankPool, tmp_path: Path) -> None:
    for every in (1, 2, 3, 0):
        ours = made("zero1-bf16", state_check_interval=every)
        assert two_ranks.run(flipped, ours, tmp_path / str(every), 99, "exp_avg", 0, "step") == [("", [])] * 2
        assert equal(final(tmp_path / str(every)), final(tmp_path / "1"))
    assert two_ranks.run(flipped, ours, tmp_path / "off", 3, "exp_avg", 0, "step") == [("", [])] * 2


def hooked(engine: Engine) -> list[int]:
    """How many hooks wait for a step, and for the gradient of each parameter."""
    of_parameters = [parameter._backward_hooks or () for parameter in engine.parameters.values()]
    return [len(hooks) for hooks in (engine.optimizer._optimizer_step_pre_hooks, *of_parameters)]


def wrong_gradients(config: RunConfig, rank: int, wrong: list[int]) -> tuple[str, list[int] | None, bool]:
    """What a replay says when this rank's backward passes of these numbers are wrong, and whether it left a trace."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine, passes = build_engine(config, mesh, CPU), 0
    data = batches(config, 0, mesh.dp_rank, mesh.dp_size, False)
    engine.forward_backward(data, target_count(False))
    engine.step()

    def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal passes
        number, passes = passes // len(data), passes + 1
        if mesh.rank == rank and number in wrong:
            output.register_hook(lambda grad: grad * (1 + 2.0**-5 * (1 + number)))

    before = {key: tensor.clone() for key, tensor in engine.optimizer_tensors().items()}
    scalars, hooks = engine.scalar_state(), hooked(engine)
    handle = engine.model.norm.register_forward_hook(spoil)
    try:
        told, odd = replay(engine, data, target_count(False)) or "", None
    except CorruptError as error:
        told, odd = str(error), sorted(error.odd)
    handle.remove()
    same = all(torch.equal(tensor, before[key]) for key, tensor in engine.optimizer_tensors().items())
    same = same and engine.scalar_state() == scalars and hooked(engine) == hooks
    engine.close()
    return told, odd, same


WITH_FP16 = LAYOUTS | {"fp16": dict(train=dict(engine="plain", precision="fp16"))}


@pytest.mark.parametrize("layout", slow_but(["fp16", "zero1-bf16", "zero3", "fsdp"], WITH_FP16))
def test_a_wrong_gradient_is_found(layout: str, two_ranks: RankPool) -> None:
    ours, of = case(**WITH_FP16[layout]), layout.removesuffix("-muon")
    # Ranks of tp2 add up gradients within the backward pass.
    named = {"fsdp": "a rank, or the reduction,", "tp2": "ranks 0, 1"}.get(of, "rank 1")
    for wrong, expected in (
        ([], ""),
        ([0], f"{named} gave other gradients the second time, and the third and fourth agree: a passing fault"),
        ([1], f"{named} gave other gradients the second time, and the third and fourth agree: a passing fault"),
        ([0, 1, 2, 3], f"{named} gave other gradients each of four times"),
    ):
        found = two_ranks.run(wrong_gradients, ours, 1, wrong)
        assert found[0] == found[1]
        told, odd, same = found[0]
        assert told.startswith(expected) and bool(told) == bool(wrong), told
        assert same
        assert odd == (None if len(wrong) < 4 else {"fsdp": [], "tp2": [0, 1]}.get(of, [1]))


def test_a_run_with_replays_is_the_run_without(two_ranks: RankPool, tmp_path: Path) -> None:
    for every in (0, 2):
        made_ = made("zero2", replay_interval=every)
        two_ranks.run(trained, made_, tmp_path / str(every))
    assert equal(final(tmp_path / "2"), final(tmp_path / "0"))
    assert [line["loss"] for line in steps(tmp_path / "2")] == [line["loss"] for line in steps(tmp_path / "0")]
