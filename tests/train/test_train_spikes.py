"""Bad steps, not finite or spikes: left out on all ranks alike; too many, and the run goes back to a checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from chosen import slow_but
from llm.checkpoint.reader import open_checkpoint
from llm.checkpoint.writer import checkpoints
from llm.config import PhaseChange, RunConfig, TrainConfig
from llm.config.sections import CheckpointConfig
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from llm.train.console import Console
from llm.train.engines.base import MicroBatch, micro_batch
from llm.train.engines.deepspeed import DeepSpeedEngine
from llm.train.engines.fsdp import FSDPEngine
from llm.train.engines.plain import PlainEngine
from llm.train.loop import Trainer
from llm.train.optim import learning_rate
from llm.train.rollback import Setbacks
from llm.train.run_folder import truncate_metrics
from llm.train.spikes import Spikes
from pool import RankPool
from test_train_loop import MadeUp, config, lines, steps, trained
from tiny_run import batches, case, plain, target_count

CPU = torch.device("cpu")


def judged(spikes: Spikes, numbers: Sequence[tuple[float, float]]) -> list[bool]:
    return [bool(spikes.judge(torch.tensor(loss), torch.tensor(norm))) for loss, norm in numbers]


def watch(**train: Any) -> Spikes:
    return Spikes(TrainConfig(**dict(spike_window=8, spike_patience=99) | train), CPU)


CALM = [(3 + 0.1 * math.sin(i), 0.5 + 0.05 * math.cos(i)) for i in range(8)]


def test_a_spike_is_so_many_deviations_above_the_mean_of_a_full_window() -> None:
    window = torch.tensor(CALM, dtype=torch.float64)
    mean, deviation = window.mean(0), window.std(0)
    for which in (0, 1):
        for sigmas, bad in ((5.9, False), (6.1, True), (-50.0, False)):
            number = mean.clone()
            number[which] += sigmas * deviation[which]
            assert judged(watch(), [*CALM, tuple(number.tolist())]) == [*[False] * 8, bad]
            assert judged(watch(), [*CALM[:7], tuple(number.tolist())]) == [False] * 8  # not full
            assert not any(judged(watch(spike_sigmas=0), [*CALM, tuple(number.tolist())]))


def test_numbers_that_hardly_vary_have_a_least_deviation() -> None:
    """A thousandth of the mean: six of them are 0.6 %."""
    for which in (0, 1):
        for part, bad in ((0.005, False), (0.007, True)):
            numbers = [2.0, 0.5]
            numbers[which] *= 1 + part
            assert judged(watch(), [(2.0, 0.5)] * 8 + [tuple(numbers)]) == [*[False] * 8, bad]


@pytest.mark.parametrize("bad", [(math.nan, 0.5), (3.0, math.inf), (-math.inf, 0.5), (3.0, math.nan)])
def test_what_is_not_finite_is_bad_from_the_first_step_on(bad: tuple[float, float]) -> None:
    assert judged(watch(), [bad, *CALM, bad, CALM[0]]) == [True, *[False] * 8, True, False]
    assert judged(watch(spike_sigmas=0), [bad]) == [True]


def columns(spikes: Spikes) -> list[float]:
    """Loss and norm in turn."""
    return torch.tensor(spikes.state()).T.flatten().tolist()


def test_a_bad_step_does_not_join_the_window_and_a_good_one_replaces_the_oldest() -> None:
    spikes = watch()
    assert spikes.usual() == ""
    judged(spikes, CALM)
    assert spikes.usual() == " (of late 3.007 and 0.5092)"
    assert judged(spikes, [(9.0, 0.5), (9.0, 0.5), (math.nan, 0.5)]) == [True] * 3
    assert columns(spikes) == pytest.approx(sum(CALM, ()))
    judged(spikes, [(3.05, 0.51)])
    assert columns(spikes) == pytest.approx(sum([*CALM[1:], (3.05, 0.51)], ()))


def test_a_resumed_window_judges_as_the_whole_one() -> None:
    numbers = [(3 + math.sin(17 * i) ** 9, 0.5 + math.cos(13 * i) ** 9) for i in range(60)]
    whole = watch(spike_sigmas=1.5)
    expected = judged(whole, numbers)
    assert any(expected) and not all(expected)
    for cut in (3, 8, 31):
        first = watch(spike_sigmas=1.5)
        judged(first, numbers[:cut])
        again = Spikes(TrainConfig(spike_window=8, spike_sigmas=1.5, spike_patience=99), CPU, first.state())
        assert judged(again, numbers[cut:]) == expected[cut:]
    assert columns(Spikes(TrainConfig(spike_window=4), CPU, whole.state())) == columns(whole)[-8:]  # the newest


def test_after_too_many_bad_steps_all_are_left_out_until_the_run_resumes() -> None:
    spikes = watch(spike_patience=2)
    nan = (math.nan, 0.5)
    assert judged(spikes, [nan, CALM[0], nan, nan, CALM[0], CALM[1]]) == [True, False, True, True, True, True]
    assert len(spikes.state()[0]) == 1 and int(spikes.in_a_row) == 2  # those left out since then do not count
    spikes.resume(4)
    assert judged(spikes, [CALM[0], nan, CALM[0]]) == [False, True, False]
    assert judged(spikes, [nan, nan, CALM[0]]) == [True, True, True]  # one that is good ends the patience


def test_bad_steps_that_go_on_are_suffered_longer() -> None:
    spikes, nan = watch(spike_patience=2), (math.nan, 0.5)
    assert judged(spikes, [nan, nan, CALM[0]]) == [True, True, True]
    spikes.resume(4)
    assert judged(spikes, [nan, nan, nan, CALM[0], nan, CALM[1]]) == [True, True, True, False, True, False]
    again = watch(spike_patience=2)
    again.resume(4)
    assert judged(again, [nan] * 3) == [True] * 3
    saved = Spikes(TrainConfig(spike_window=8, spike_patience=2), CPU, again.state(), 3, 4)
    longer = Spikes(TrainConfig(spike_window=8, spike_patience=2), CPU, again.state(), 3, 5)
    for each in (again, saved):
        assert judged(each, [nan, CALM[0]]) == [True, True]
    assert judged(longer, [nan, CALM[0]]) == [True, False]


def test_overflows_in_fp16_are_the_loss_scales() -> None:
    spikes = watch(spike_patience=2, precision="fp16")
    assert judged(spikes, [(3.0, math.inf)] * 5 + [(3.0, 0.5)]) == [True] * 5 + [False]
    assert judged(spikes, [(math.nan, math.inf)] * 2 + [(3.0, 0.5)]) == [True] * 3


LAYOUTS = {
    "plain": dict(train=dict(engine="plain")),
    **{f"zero{stage}": dict(parallel=dict(zero_stage=stage)) for stage in range(4)},
    **{f"zero{stage}-bf16": dict(parallel=dict(zero_stage=stage), train=dict(precision="bf16")) for stage in (1, 2, 3)},
    "fsdp": dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
    "tp2": dict(parallel=dict(tensor_parallel=2, sequence_parallel=True)),
}
LAYOUTS |= {f"{name}-muon": LAYOUTS[name] | dict(optim=dict(name="muon")) for name in (*LAYOUTS,)}


def state_after(config: RunConfig, refused: Sequence[int], taken: Sequence[int]) -> list[Any]:
    """This rank's masters and moments after steps of which `refused` are refused, and the updates made. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine = build_engine(config, mesh, CPU)
    for step in taken:
        engine.forward_backward(batches(config, step, mesh.dp_rank, mesh.dp_size, False), target_count(False))
        refuse = torch.tensor(step in refused)
        result = engine.step(lambda norm, refuse=refuse: refuse)
        assert bool(result.left_out) == (step in refused) and not result.skipped
        assert math.isfinite(result.grad_norm)
    pieces = [(piece.name, piece.kind, piece.data.clone()) for piece in engine.state_pieces()]
    updates = engine.updates
    engine.close()
    return [updates, pieces]


@pytest.mark.parametrize("name", slow_but(["plain", "zero0", "zero2", "zero1-bf16", "zero3", "tp2-muon"], LAYOUTS))
def test_a_refused_step_leaves_no_trace(name: str, two_ranks: RankPool) -> None:
    made = case(**LAYOUTS[name])
    found = two_ranks.run(state_after, made, (1, 3), (0, 1, 2, 3, 4))
    expected = two_ranks.run(state_after, made, (), (0, 2, 4))
    for (updates, pieces), (expected_updates, expected_pieces) in zip(found, expected, strict=True):
        assert updates == expected_updates == 3
        for (*key, tensor), (*expected_key, other) in zip(pieces, expected_pieces, strict=True):
            assert key == expected_key and torch.equal(tensor, other), key


def poisoned(config: RunConfig, root: Path, step: int, bad: Sequence[int], factor: float, end: int = 99) -> str:
    """As `trained`, with losses and gradients `factor` times as large where a sample of `bad` is; its end or warnings.

    Killed, without a word, before it does step `end`. Collective.
    """

    def ill(healthy: Any) -> Any:
        def forward_backward(engine: Any, micro_batches: list[MicroBatch], target_count: Any) -> Any:
            sick = torch.tensor(any(set(batch.samples.tolist()) & set(bad) for batch in micro_batches)).int()
            torch.distributed.all_reduce(sick)
            return healthy(engine, micro_batches, target_count) * (factor if sick else 1)

        return forward_backward

    class Killed(BaseException):
        """As by a signal."""

    healthy_step = Trainer.step

    def mortal(trainer: Trainer) -> None:
        if trainer.run.step + 1 == end:
            trainer.finish_saving()
            raise Killed
        assert trainer.run.feed.steps == config.train.max_steps - trainer.run.step
        healthy_step(trainer)

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Console, "say", lambda console, text: said.append(text))
        patch.setattr(Trainer, "step", mortal)
        for kind in (PlainEngine, DeepSpeedEngine, FSDPEngine):
            patch.setattr(kind, "forward_backward", ill(kind.forward_backward))
        try:
            trained(config, root, step)
        except Killed:
            return "killed"
        except FloatingPointError as error:
            return str(error)
    return "\n".join(text for text in said if text.startswith("warning"))


def made(**sections: Any) -> RunConfig:
    """12 steps of 8 samples; saved after each fifth."""
    train = dict(max_steps=12, eval_interval=12, spike_window=4, spike_patience=2) | sections.pop("train", {})
    base = replace(config(**sections), checkpoint=CheckpointConfig(interval=5, keep_last=9))
    return replace(base, data=replace(base.data, phases=()), train=replace(base.train, **train))


def samples(*steps: int) -> list[int]:
    """Those of some steps, counted from 1."""
    return [8 * (step - 1) + i for step in steps for i in range(8)]


def final(root: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Masters and moments of the last checkpoint."""
    reader = open_checkpoint(checkpoints(root / "run/checkpoints")[0])
    return {key: reader.read(*key) for key in reader.manifest.tensors}


def without(config: RunConfig, steps: Sequence[int]) -> dict[tuple[str, str], torch.Tensor]:
    """What the plain engine ends with when some steps, counted from 1, are never made. Collective."""
    mesh = Mesh.create(config.parallel, "cpu")
    engine, loader = build_engine(config, mesh, CPU), MadeUp(config, mesh, 0)
    for step in range(1, config.train.max_steps + 1):
        read = loader.next_step()
        if step not in steps:
            engine.set_lr(learning_rate(config.optim, step - 1, config.train.max_steps))
            engine.forward_backward(
                [micro_batch(batch, CPU) for batch in read.batches], read.target_count + read.replaced_targets
            )
            engine.step()
    return {(piece.name, piece.kind): piece.data.view(piece.slice.shape).clone() for piece in engine.state_pieces()}


def equal(found: dict[tuple[str, str], torch.Tensor], expected: dict[tuple[str, str], torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_spike_is_left_out(one_rank: RankPool, tmp_path: Path) -> None:
    ours = plain(made(), micro_batch_size=4)
    (told,) = one_rank.run(poisoned, ours, tmp_path, 0, samples(7), 100.0)
    assert re.fullmatch(
        r"warning: step 7 is left out: loss 39[\d.]+, gradient norm [\d.]+ \(of late 3.\d+ and [\d.]+\)", told
    )
    assert [line["skipped_steps"] for line in steps(tmp_path)] == [0] * 6 + [1] * 6
    assert equal(final(tmp_path), one_rank.run(without, ours, (7,))[0])


GONE_BACK = (6, 7, 8, 9)  # to step 5, when 8 and 9 are bad


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("killed", "optimizer"),
    slow_but([(None, "muon"), (9, "adamw")], product([None, 7, 9, 10, 12], ["adamw", "muon"]), several=True),
)
def test_a_stretch_of_bad_data_is_passed_over(
    killed: int | None, optimizer: str, ranks: int, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    """From the last checkpoint on; and so it is when the run is killed before, between, or after it went back."""
    optim = dict(name=optimizer)
    alone = plain(made(optim=optim), micro_batch_size=4)
    pool, ours = (one_rank, alone) if ranks == 1 else (two_ranks, made(optim=optim, parallel=dict(zero_stage=2)))
    bad = samples(8, 9)
    if killed is not None:
        assert pool.run(poisoned, ours, tmp_path, 0, bad, math.nan, killed) == ["killed"] * ranks
    start = max((int(path.name[5:]) for path in checkpoints(tmp_path / "run/checkpoints")), default=0)
    assert start == {None: 0, 7: 5, 9: 5, 10: 9, 12: 10}[killed]
    truncate_metrics(tmp_path / "run/metrics.jsonl", start)
    told = pool.run(poisoned, ours, tmp_path, start, bad, math.nan)
    back = "step 9 is bad, as were those before: loss nan"
    assert (back in told[0]) == (start < 9) and all(text == told[0] for text in told)
    state = open_checkpoint(tmp_path / "run/checkpoints/step-00000012").state
    assert state["setbacks"]["passed_samples"] == [[40, 72]] and state["setbacks"]["in_a_row"] == 0
    assert state["engine"]["optimizer_step"] == 8
    last = steps(tmp_path)[-1]
    assert last["skipped_steps"] == 4 and last["skipped_samples"] == 12 * sum(range(ranks + 1))
    expected = one_rank.run(without, alone, GONE_BACK)[0]
    for key, tensor in final(tmp_path).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0 if ranks == 1 else 1e-5)


def test_setbacks_come_back_from_a_checkpoint() -> None:
    setbacks = Setbacks(2, 4, ((40, 72), (80, 96)), ((3.0, 3.1), (0.5, 0.4)))
    state = json.loads(json.dumps({"setbacks": setbacks._asdict()}))
    found = Setbacks.of(state)
    assert found._replace(recent=setbacks.recent) == setbacks
    assert [tuple(each) for each in found.recent] == [*setbacks.recent]
    assert Setbacks.of({}) == Setbacks()


def test_a_run_that_goes_back_too_often_ends(one_rank: RankPool, tmp_path: Path) -> None:
    for most, bad, step, last in ((0, (8, 9), 9, 5), (1, (8, 9, 11, 12), 12, 10)):
        ours = plain(made(train=dict(rollbacks=most)), micro_batch_size=4)
        (message,) = one_rank.run(poisoned, ours, tmp_path / str(most), 0, samples(*bad), math.nan)
        assert f"step {step}: loss nan" in message and f"step-{last:08}: lower optim.lr" in message
        assert open_checkpoint(tmp_path / f"{most}/run/checkpoints/step-{last:08}")


def test_numbers_that_stay_large_are_no_spikes_in_the_end(one_rank: RankPool, tmp_path: Path) -> None:
    """Steps 6 and 7 lead back to step 5, and 8 to 11, a whole window, to what was saved after 7; 12 is made."""
    ours = plain(made(), micro_batch_size=4)
    (told,) = one_rank.run(poisoned, ours, tmp_path, 0, samples(*range(6, 13)), 50.0)
    assert "step 7 is bad, as were those before" in told and "return 1 of 10)" in told
    assert "step 11 is bad, as were those before" in told and "such numbers are no spikes from here on" in told
    assert steps(tmp_path)[-1]["skipped_steps"] == 6
    assert equal(final(tmp_path), one_rank.run(without, ours, range(6, 12))[0])
    (told,) = one_rank.run(poisoned, ours, tmp_path / "nan", 0, samples(*range(6, 13)), math.nan)
    assert told.startswith("step 11: loss nan") and "step-00000010" in told


def test_without_a_checkpoint_a_run_ends(one_rank: RankPool, tmp_path: Path) -> None:
    (message,) = one_rank.run(poisoned, plain(made(), micro_batch_size=4), tmp_path, 0, samples(2, 3), math.nan)
    assert "step 3: loss nan" in message and lines(tmp_path)[-1]["step"] == 2


def test_a_new_phase_is_no_spike(one_rank: RankPool, tmp_path: Path) -> None:
    """Though its losses are: it begins a window of its own."""
    ours = plain(made(train=dict(spike_window=3)), micro_batch_size=4)
    ours = replace(ours, data=replace(ours.data, phases=(PhaseChange(40, seq_len=8),)))
    assert one_rank.run(poisoned, ours, tmp_path, 0, samples(*range(6, 13)), 3.0) == [""]
    assert steps(tmp_path)[-1]["skipped_steps"] == 0
