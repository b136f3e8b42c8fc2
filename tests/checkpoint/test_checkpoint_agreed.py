"""Opening a checkpoint is shared work: each rank hashes a part, what one finds holds for all, and none is hurried."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoint_helpers import make_tensors, save
from thread_ranks import on_thread_ranks

from llm.checkpoint import reader
from llm.checkpoint.manifest import FileEntry, Manifest
from llm.checkpoint.reader import open_agreed
from llm.errors import Agreed
from pool import RankPool, with_default_group

OLD, NEW = make_tensors(1), make_tensors(2)
SHARDS = ["step-00000002/rank-00000-00000.safetensors", "step-00000002/rank-00001-00000.safetensors"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 (OLD) and 2 (NEW), each by two ranks."""
    save(tmp_path, 1, OLD, dp=2)
    save(tmp_path, 2, NEW, dp=2)
    return tmp_path


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def opened(root: Path) -> list[Any]:
    """What three ranks open, or raise."""
    return on_thread_ranks(3, lambda rank: open_agreed(root))


def test_every_rank_hashes_its_share(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file once over all ranks; damage that one rank finds is damage for all."""
    hashed: list[str] = []
    shares: set[tuple[int, int, int]] = set()
    check_hash, verify = reader._check_hash, reader.verify

    def recorded(path: Path, entry: FileEntry) -> None:
        hashed.append(f"{path.parent.name}/{path.name}")
        check_hash(path, entry)

    def verified(folder: Path, first: int = 0, of: int = 1) -> Manifest:
        shares.add((dist.get_rank(), first, of))
        return verify(folder, first, of)

    monkeypatch.setattr(reader, "_check_hash", recorded)
    monkeypatch.setattr(reader, "verify", verified)
    assert [found.state["step"] for found, _ in opened(root)] == [2, 2, 2]
    assert sorted(path for path in hashed if not path.endswith("state.json")) == SHARDS
    assert shares == {(rank, rank, 3) for rank in range(3)}
    damage(root / SHARDS[1])
    results = opened(root)
    assert [found.state["step"] for found, _ in results] == [1, 1, 1]
    (warning,) = results[0][1]
    assert f"rank 1: {root / SHARDS[1]} is damaged" in warning
    damage(root / "step-00000001/state.json")
    assert {type(result) for result in opened(root)} == {Agreed}


def resume_slowly(root: Path) -> int:
    """Open on this rank of a pool, whose group waits two seconds, where rank 1's share takes four. Collective."""
    real = reader.verify

    def slow(folder: Path, first: int = 0, of: int = 1) -> Manifest:
        time.sleep(4 if first else 0)
        return real(folder, first, of)

    dist.barrier()
    impatient = dist.new_group(timeout=timedelta(seconds=2), backend="gloo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "verify", slow)
        for name in ("together", "broadcast"):
            patch.setattr(reader, name, partial(with_default_group, getattr(reader, name), impatient))
        found, _ = open_agreed(root)
    assert found is not None
    return found.state["step"]


def test_a_slow_share_does_not_trip_the_time_out(root: Path, two_ranks: RankPool) -> None:
    assert two_ranks.run(resume_slowly, root) == [2, 2]
