"""Runs whose checkpoints are written beside their steps, and copied elsewhere."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from llm import files
from llm.checkpoint.reader import find_latest, open_agreed
from llm.checkpoint.remote import Mirror, Remote, find_or_fetch
from llm.cluster.signals import Stop
from llm.config import RunConfig
from llm.config.sections import CheckpointConfig
from llm.errors import CheckpointError, Stopped
from llm.parallel.mesh import Mesh
from llm.train.build import build_engine
from llm.train.engines import base
from llm.train.engines.base import Engine
from llm.train.loop import Trainer
from pool import RankPool, with_default_group
from test_train_loop import CPU, config, lines, steps, trained
from tiny_run import case


def settings(**kept: Any) -> RunConfig:
    made = config(parallel=dict(zero_stage=3), train=dict(engine="fsdp"))
    return replace(made, checkpoint=CheckpointConfig(**{"interval": 2, "keep_last": 9} | kept))


def losses(root: Path) -> list[float]:
    return [line["loss"] for line in steps(root)]


def on_disk(root: Path) -> dict[str, bytes]:
    """The tensors of every checkpoint."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}


def with_disk(write: Callable[[Path], None], config: RunConfig, root: Path) -> tuple[str, float]:
    """Train where `write(path)` comes before each file of tensors; the error, and the seconds in saves. Collective."""
    fast, save, seconds = files.create_safetensors, Trainer.save, 0.0

    def create_safetensors(path: Path, *arguments: Any) -> tuple[int, str]:
        write(path)
        return fast(path, *arguments)

    def timed(trainer: Trainer, **options: Any) -> None:
        nonlocal seconds
        start = time.monotonic()
        save(trainer, **options)
        seconds += time.monotonic() - start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "create_safetensors", create_safetensors)
        patch.setattr(Trainer, "save", timed)
        try:
            trained(config, root, stop=Stop())
        except CheckpointError as error:
            return str(error), seconds
    return "", seconds


def slow(path: Path) -> None:
    time.sleep(0.3)


def broken(path: Path) -> None:
    """For rank 1, at step 2."""
    if path.parent.name == "step-00000002.tmp" and dist.get_rank() == 1:
        raise OSError(errno.EIO, "Input/output error")


def test_a_run_beside_whose_steps_is_saved_is_the_same(two_ranks: RankPool, tmp_path: Path) -> None:
    """Losses and checkpoints, to the bit; three saves of 0.3 s, of which two and the last one's end are waited for."""
    two_ranks.run(trained, settings(), tmp_path / "waited")
    results = two_ranks.run(with_disk, slow, settings(asynchronous=True), tmp_path / "beside")
    assert [error for error, _ in results] == ["", ""]
    assert on_disk(tmp_path / "beside") == on_disk(tmp_path / "waited") != {}
    assert losses(tmp_path / "beside") == losses(tmp_path / "waited")
    for step in (2, 4, 6):
        found, expected = (
            json.loads((tmp_path / f"{name}/run/checkpoints/step-{step:08}/state.json").read_text())
            for name in ("beside", "waited")
        )
        assert found.pop("config") != expected.pop("config")
        assert found == expected


def failing_early(config: RunConfig, root: Path) -> tuple[str, float]:
    """As with_disk, for `broken`, where a step begins once the save before it has ended, however busy the machine."""
    real = Trainer.step

    def step(trainer: Trainer) -> Any:
        if trainer.saver.pending is not None:
            futures.wait([trainer.saver.pending], timeout=60)
        return real(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        return with_disk(broken, config, root)


def test_a_save_that_failed_beside_the_steps_ends_all_ranks_after_the_next(two_ranks: RankPool, tmp_path: Path) -> None:
    (message, _), (other, _) = two_ranks.run(failing_early, settings(asynchronous=True), tmp_path)
    assert message == other and "Input/output error" in message
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3]
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def read_slowly() -> float:
    """Build an engine from weights that rank 1 reads for two seconds, where any other group waits one. Collective."""
    made = case(parallel=dict(zero_stage=3), train=dict(engine="fsdp"))
    mesh = Mesh.create(made.parallel, "cpu")
    dist.barrier()
    impatient: Any = dist.new_group(timeout=timedelta(seconds=1), backend="gloo")
    real, start = Engine._read_pieces, time.monotonic()

    def read(engine: Engine, *arguments: Any) -> None:
        time.sleep(2 * dist.get_rank())
        real(engine, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_read_pieces", read)
        patch.setattr(base, "together", partial(with_default_group, base.together, impatient))
        build_engine(made, mesh, CPU).close()
    return time.monotonic() - start


def test_reading_weights_slowly_does_not_trip_the_time_out(two_ranks: RankPool) -> None:
    assert min(two_ranks.run(read_slowly)) >= 2


def fetched(root: Path, url: str) -> tuple[int | None, list[str]]:
    """The step that a start finds in `root` or at `url`. Collective."""
    said: list[str] = []
    find = partial(find_or_fetch, remote=Remote(url, "run"), find=find_latest, wanted=None, say=said.append)
    reader, _ = open_agreed(root, find)
    return (None if reader is None else reader.state["step"]), said


def stopped_in_a_copy(config: RunConfig, root: Path) -> list[bool]:
    """Whether the stop of a run was recorded before rank 0 waited for its copy. Collective."""
    close, recorded = Mirror.close, list[bool]()

    def closing(mirror: Mirror) -> None:
        recorded.append((root / "run/stopped.json").exists())
        close(mirror)

    stop = Stop()
    stop.ask(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "close", closing)
        with pytest.raises(Stopped):
            trained(config, root, stop=stop)
    return recorded


def test_a_stop_is_recorded_before_the_copy_is_waited_for(two_ranks: RankPool, tmp_path: Path) -> None:
    """Whoever stops it may kill it then; the checkpoint is there."""
    made = settings(asynchronous=True, copy_to=f"file://{tmp_path}/copies")
    assert two_ranks.run(stopped_in_a_copy, made, tmp_path) == [[True], []]
    assert on_disk(tmp_path / "copies/run") == on_disk(tmp_path / "run/checkpoints") != {}


def test_a_run_goes_on_elsewhere_from_its_copies(two_ranks: RankPool, tmp_path: Path) -> None:
    url, here = f"file://{tmp_path}/copies", tmp_path / "here"
    made = settings(asynchronous=True, copy_to=url, keep_last=1, keep_every=4)
    two_ranks.run(trained, made, here)
    left = {path.name for path in (tmp_path / "copies/run").iterdir()}
    assert left == {"step-00000004", "step-00000006"}, "all is copied when the run ends, and kept as here"
    assert on_disk(tmp_path / "copies/run") == on_disk(here / "run/checkpoints")
    shutil.rmtree(tmp_path / "copies/run/step-00000006")
    there = tmp_path / "there"
    (step, said), (other, _) = two_ranks.run(fetched, there / "run/checkpoints", url)
    assert (step, other) == (4, 4) and said == [f"step-00000004 is copied from {url}/run"]
    two_ranks.run(trained, made, there, 4)
    assert losses(there) == losses(here)[4:]
    assert on_disk(there / "run/checkpoints") == on_disk(here / "run/checkpoints")
