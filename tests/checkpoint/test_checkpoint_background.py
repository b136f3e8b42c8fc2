"""A save beside the steps: it is of one moment, the next waits for it, and all ranks hear of what went wrong."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_helpers import make_tensors, pieces_of, same, save
from states import state_of

from llm import files
from llm.checkpoint import background, writer
from llm.checkpoint.background import Saver
from llm.checkpoint.manifest import Piece
from llm.checkpoint.reader import find_latest, open_checkpoint
from llm.errors import CheckpointError
from pool import RankPool, with_default_group
from runs import contents

OLD, NEW = make_tensors(1), make_tensors(2)


@contextmanager
def held(rank: int = 1) -> Iterator[threading.Event]:
    """A disk on which that rank writes no tensors before the event."""
    fast, gate = files.create_safetensors, threading.Event()

    def create_safetensors(*arguments: Any) -> tuple[int, str]:
        assert dist.get_rank() != rank or gate.wait(30)
        return fast(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "create_safetensors", create_safetensors)
        try:
            yield gate
        finally:
            gate.set()


def saver(root: Path, **options: Any) -> Saver:
    return Saver(root, **{"asynchronous": True, "keep_last": 9, "keep_every": None, "say": lambda text: None} | options)


def pieces(tensors: Any) -> Iterator[Piece]:
    return pieces_of(tensors, dist.get_rank(), 1, 2)


def train_on(root: Path) -> list[str]:
    """Save, and change all that was given while the save is under way. What was said. Collective."""
    said: list[str] = []
    ours, tensors, state = saver(root, say=said.append), make_tensors(1), {"scale": [1.0]}
    with held() as gate:
        ours.save(1, pieces(tensors), state)
        for tensor in tensors.values():
            tensor.add_(1)
        state["scale"][0] = 2.0
        assert said == [] and not (root / "step-00000001").exists()
        gate.set()
        ours.close()
    return said


def test_what_is_saved_is_of_one_moment(two_ranks: RankPool, tmp_path: Path) -> None:
    """Byte for byte what a save that the steps wait for has written."""
    said = two_ranks.run(train_on, tmp_path / "beside")
    assert said == [[f"step 1: saved {tmp_path / 'beside/step-00000001'}"]] * 2
    waited = save(tmp_path / "waited", 1, OLD, dp=2, state={"scale": [1.0]})
    assert waited == [tmp_path / "waited/step-00000001"] * 2
    found, expected = (contents(tmp_path / name) for name in ("beside", "waited"))
    assert [path.relative_to(tmp_path / "beside") for path in found] == [
        path.relative_to(tmp_path / "waited") for path in expected
    ]
    assert list(found.values()) == list(expected.values())


def save_twice(root: Path) -> bool:
    """Whether both saves took the same memory. The second finds the first whole. Collective."""
    ours = saver(root)

    def second() -> Iterator[Piece]:
        assert (root / "step-00000001").exists(), "the save before is not done"
        yield from pieces(NEW)

    with held() as gate:
        ours.save(1, pieces(OLD), state_of(1))
        before = [buffer.data_ptr() for buffer in ours.buffers]
        threading.Timer(0.5, gate.set).start()
        ours.save(2, second(), state_of(2))
    ours.close()
    held_bytes = sum(buffer.nbytes for buffer in ours.buffers)
    assert held_bytes == sum(piece.data.nbytes for piece in pieces(OLD)), "more or less than one copy"
    return before == [buffer.data_ptr() for buffer in ours.buffers]


def test_the_next_save_waits_for_the_last_and_takes_its_memory(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(save_twice, tmp_path) == [True, True]
    for step, tensors in ((1, OLD), (2, NEW)):
        assert same(open_checkpoint(tmp_path / f"step-{step:08}"), tensors)


def wait_for_rank_1(root: Path) -> bool:
    """Whether there was no checkpoint while rank 1 had written nothing. Collective."""
    ours = saver(root)
    with held() as gate:
        ours.save(1, pieces(OLD), state_of(1))
        deadline = time.monotonic() + 1
        early = False
        while time.monotonic() < deadline:
            early = early or (root / "step-00000001").exists()
            time.sleep(0.02)
        dist.barrier()
        gate.set()
        ours.close()
    return early


def test_no_commit_before_every_rank_has_written(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(wait_for_rank_1, tmp_path) == [False, False]
    assert find_latest(tmp_path) == (tmp_path / "step-00000001", [])


def full_disk(patch: pytest.MonkeyPatch) -> None:
    """On rank 1, half-way."""
    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if "rank-00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    patch.setattr(os, "write", full)


def no_room(patch: pytest.MonkeyPatch) -> None:
    """For what both ranks need; for one there would be."""
    needed = sum(piece.data.nbytes for piece in pieces(NEW))
    status = os.statvfs("/")

    class Small:
        f_bavail, f_frsize = needed + needed // 2, 1

    assert status.f_bavail > 0
    patch.setattr(os, "statvfs", lambda path: Small)
    patch.setattr(os, "write", None)  # nothing is begun


def no_memory(patch: pytest.MonkeyPatch) -> None:
    def empty(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("not enough memory")

    if dist.get_rank() == 1:
        patch.setattr(background.torch, "empty", empty)


def not_finite(patch: pytest.MonkeyPatch) -> None:
    if dist.get_rank() == 1:
        NEW["norm.weight", "master"][-1] = math.nan


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]] = {
    full_disk: ("the disk is full", "rank-00001-00000.safetensors", "bytes and"),
    no_room: ("the disk is full", "bytes and", "are free"),
    no_memory: ("step 2 cannot be copied", "not enough memory", "use checkpoint.asynchronous=false"),
    not_finite: ("rank 1 has values of norm.weight (master) that are not finite", "step-00000001"),
}


def save_both(ours: Saver) -> None:
    ours.save(2, pieces(NEW), state_of(2))
    ours.save(3, pieces(OLD), state_of(3))


def fail(root: Path, spoil: Callable[[pytest.MonkeyPatch], None]) -> tuple[str, int]:
    """The error of the second of two saves, and how often the run was told of a failure. Collective."""
    told: list[int] = []
    ours = saver(root, failed=lambda: told.append(1))
    ours.save(1, pieces(OLD), state_of(1))
    ours.wait()
    ours.buffers.clear()
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch)
        with pytest.raises(CheckpointError) as caught:
            save_both(ours)
    NEW["norm.weight", "master"].nan_to_num_()
    ours.close()  # it was told, and is over
    return str(caught.value), len(told)


@pytest.mark.parametrize("spoil", FAULTS)
def test_a_save_that_fails_on_one_rank_is_told_on_all(
    spoil: Callable[[pytest.MonkeyPatch], None], two_ranks: RankPool, tmp_path: Path
) -> None:
    results = two_ranks.run(fail, tmp_path, spoil)
    (message, told), other = results
    assert other == (message, told) and told == (0 if spoil is no_memory else 1)
    for words in FAULTS[spoil]:
        assert words in message
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "latest"}
    assert same(open_checkpoint(tmp_path / "step-00000001"), OLD)


def save_slowly(root: Path, asynchronous: bool) -> None:
    """Rank 1 takes three seconds longer than rank 0, while any other group waits one. Collective."""
    dist.barrier()
    impatient = dist.new_group(timeout=timedelta(seconds=1), backend="gloo")
    with held() as gate, pytest.MonkeyPatch.context() as patch:
        for module, name in ((background, "together"), (writer, "together"), (writer, "exchange")):
            patch.setattr(module, name, partial(with_default_group, getattr(module, name), impatient))
        ours = saver(root, asynchronous=asynchronous)
        threading.Timer(3, gate.set).start()
        ours.save(1, pieces(OLD), state_of(1))
        ours.close()


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_slow_save_does_not_trip_the_time_out(asynchronous: bool, two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(save_slowly, tmp_path, asynchronous)
    assert find_latest(tmp_path) == (tmp_path / "step-00000001", [])
