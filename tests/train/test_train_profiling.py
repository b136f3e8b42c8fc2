"""Profiles that a run takes: as configured, or when a file asks for one; what lies in the folder; nothing changes."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from chosen import slow_but
from llm.cluster.signals import Stop
from llm.config import RunConfig
from llm.config.matrices import is_hidden
from llm.config.reports import LoggingConfig, ProfileConfig
from llm.config.sections import CheckpointConfig
from llm.model.parts import GPT_PARTS
from llm.profile.record import Record
from llm.train.build import build_model
from llm.train.engines.plain import PlainEngine
from llm.train.loop import Trainer
from llm.train.profiling import MAX_STEPS, Profiler
from pool import RankPool
from test_train_loop import trained
from tiny_run import batches, case, plain, target_count

ENGINES: dict[str, dict[str, Any]] = {
    "plain": dict(train=dict(engine="plain")),
    "plain, recomputing": dict(train=dict(engine="plain", activation_checkpointing="full", micro_batch_size=4)),
    "TP 2, sequence parallel": dict(
        train=dict(engine="deepspeed"), parallel=dict(tensor_parallel=2, sequence_parallel=True)
    ),
    "ZeRO 0": dict(train=dict(engine="deepspeed")),
    "ZeRO 2, bf16": dict(train=dict(engine="deepspeed", precision="bf16"), parallel=dict(zero_stage=2)),
    "ZeRO 3": dict(train=dict(engine="deepspeed"), parallel=dict(zero_stage=3)),
    "FSDP": dict(train=dict(engine="fsdp"), parallel=dict(zero_stage=3)),
    "FSDP, recomputing": dict(
        train=dict(engine="fsdp", activation_checkpointing="selective"), parallel=dict(zero_stage=2)
    ),
}


def config(steps: tuple[int, int] | None, **sections: Any) -> RunConfig:
    """12 steps, of which nothing is saved before the end."""
    train = dict(max_steps=12, eval_interval=100) | sections.pop("train", {})
    made = case(train=train, **sections)
    logging = LoggingConfig(tensorboard=False)
    return replace(made, checkpoint=CheckpointConfig(interval=100), logging=logging, profile=ProfileConfig(steps))


def losses(root: Path) -> list[Any]:
    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("grad_norm"), line.get("val_loss")) for line in lines]


def run(config: RunConfig, root: Path, request: str | None = None) -> list[str]:
    """Train on this rank of a pool, and return what was said; request: the file `profile`, after step 2. Collective."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step

        def asking(trainer: Trainer) -> Any:
            patch.setattr(trainer.profiler, "say", said.append)
            if trainer.run.step == 2 and request is not None and dist.get_rank() == 0:
                trainer.run.folder.profile.write_text(request)
            return step(trainer)

        patch.setattr(Trainer, "step", asking)
        trained(config, root, stop=Stop())
    return said


@pytest.mark.parametrize("name", slow_but(["plain, recomputing"], ENGINES))
def test_a_profile_is_whole_and_changes_nothing(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    settings = ENGINES[name]
    settings = settings | {"train": settings["train"] | {"max_steps": 7}}
    two_ranks.run(run, config((5, 6), **settings), tmp_path / "profiled")
    two_ranks.run(run, config(None, **settings), tmp_path / "plain")
    assert losses(tmp_path / "profiled") == losses(tmp_path / "plain")
    folder = tmp_path / "profiled/run/profile-5-6"
    traces = {f"trace-rank-{rank}.json.gz" for rank in range(2)}
    assert {path.name for path in folder.iterdir()} == {"rank-0.json", "rank-1.json", "timeline.json.gz", *traces}
    for rank in range(2):
        check(Record.load(folder / f"rank-{rank}.json"), rank, settings)
    with gzip.open(folder / "timeline.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [name.split(" on ")[0] for name in names] == ["rank 0", "rank 1"]
    starts = [event["ts"] for event in events if event["name"] == "ingot/step 5"]
    assert len(starts) == 2 and all(start > 0 for start in starts)  # microseconds after the barrier


def check(record: Record, rank: int, settings: dict[str, Any]) -> None:
    """What holds of every layout's record."""
    assert (record.rank, record.world, record.steps, record.device) == (rank, 2, (5, 6), "cpu")
    assert record.layout["engine"] == settings["train"]["engine"]
    assert record.tokens_per_step.world == 8 * 16
    parts = {part.name: part for part in record.parts}
    total = sum(part.forward_ms + part.backward_ms + part.recompute_ms for part in parts.values())
    assert total + record.unattributed_ms == pytest.approx(record.step_ms, rel=0.03)
    assert all(parts[name].forward_ms > 0 for name in (*GPT_PARTS, "data", "gradients", "clip", "optimizer"))
    assert all(parts[name].backward_ms > 0 for name in GPT_PARTS)
    recomputes = settings["train"].get("activation_checkpointing", "none")
    assert (parts["attention"].recompute_ms > 0) == (recomputes != "none")
    assert (parts["feed_forward"].recompute_ms > 0) == (recomputes == "full")
    names = {collective.name for collective in record.collectives}
    assert "vote" in names and len(names) > 1
    sizes = {record.layout["tp"], record.layout["dp"], 2}
    assert {collective.group_size for collective in record.collectives} <= sizes
    assert [collective.count for collective in record.collectives if collective.name == "vote"] == [1]
    assert all(0 <= collective.exposed_ms <= collective.ms * 1.001 for collective in record.collectives)
    memory = record.memory
    assert abs(memory.unattributed_bytes) <= 0.03 * memory.peak_bytes, memory
    assert min(memory.categories[name] for name in ("weights", "moments", "activations")) > 0
    assert record.machine.matmul_tflops > 0 and record.machine.copy_gbs > 0
    assert record.unprofiled_step_ms > 0 and record.host_time.launches > 0 and record.ops


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_bear_the_name_of_their_optimizer(name: str) -> None:
    config = plain(case(optim=dict(name=name)), micro_batch_size=8)
    engine = PlainEngine(config, build_model(config, None), None, torch.device("cpu"))
    engine.forward_backward(batches(config, 0, 0, 1, False), target_count(False))
    engine.step()
    profiler = SimpleNamespace(run=SimpleNamespace(engine=engine))
    numbers = Counter[str]()
    for category, owner, tensor in Profiler._known(profiler):
        numbers[owner] += tensor.numel() * (category == "moments" and tensor.dim() > 0)
    hidden = sum(weight.numel() for name, weight in engine.parameters.items() if is_hidden(name))
    total = sum(weight.numel() for weight in engine.parameters.values())
    muon = hidden if name == "muon" else 0
    assert (numbers["Muon"], numbers["AdamW"]) == (muon, 2 * (total - muon))


def test_a_file_asks_a_running_job_for_a_profile(one_rank: RankPool, tmp_path: Path) -> None:
    (said,) = one_rank.run(run, config(None, train=dict(engine="plain")), tmp_path, "2\n")
    # The file is seen after step 3, voted on in step 4; 5 and 6 are timed, 7 and 8 profiled.
    assert Record.load(tmp_path / "run/profile-7-8/rank-0.json").steps == (7, 8)
    assert not (tmp_path / "run/profile").exists()
    assert [line.partition(":")[0] for line in said] == ["profiling steps 7 to 8, as asked", "profile of steps 7 to 8"]


@pytest.mark.slow
def test_a_file_asks_all_ranks_for_a_profile_of_three_steps(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(run, config(None, train=dict(engine="plain")), tmp_path, "")
    folder = tmp_path / "run/profile-8-10"
    assert [Record.load(folder / f"rank-{rank}.json").steps for rank in range(2)] == [(8, 10)] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    slow_but(
        [("many", ["'many'", "1 to 100"])],
        [
            ("many", ["'many'", "1 to 100"]),
            ("0", ["'0'"]),
            ("-1", ["'-1'"]),
            (str(MAX_STEPS + 1), ["'101'"]),
            ("\u0663", ["'\u0663'"]),
            ("9" * 200, ["'...'"]),
            ("5", ["12 steps of the run", "9 are left"]),
        ],
        several=True,
    ),
)
def test_a_request_that_cannot_be_met_is_answered_and_removed(
    content: str, words: list[str], one_rank: RankPool, tmp_path: Path
) -> None:
    (said,) = one_rank.run(run, config(None, train=dict(engine="plain")), tmp_path, content)
    (line,) = said
    assert "warning: " in line and all(word in line for word in words), line
    assert not (tmp_path / "run/profile").exists() and not [*tmp_path.glob("run/profile-*")]


@pytest.mark.slow
def test_a_profile_that_cannot_be_written_is_given_up(two_ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile-5-6").write_text("a file is in the way")
    said, _ = two_ranks.run(run, config((5, 6), train=dict(engine="plain")), tmp_path)
    assert [line.split(":")[0] for line in said] == ["warning"] and "profile-5-6" in said[0]
    assert losses(tmp_path)[-1][0] == 12


@pytest.mark.slow
def test_a_start_beyond_the_steps_says_that_it_profiles_none(one_rank: RankPool, tmp_path: Path) -> None:
    made = config((5, 6), train=dict(engine="plain", max_steps=8))
    one_rank.run(run, made, tmp_path)
    [said] = one_rank.run(printed, replace(made, train=replace(made.train, max_steps=10)), tmp_path, 8)
    assert "profile.steps [5, 6]: the run is at step 8 already" in said


def printed(config: RunConfig, root: Path, step: int) -> str:
    """What a run prints that goes on from a checkpoint."""
    with redirect_stdout(io.StringIO()) as text:
        trained(config, root, step)
    return text.getvalue()
