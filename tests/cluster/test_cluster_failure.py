"""What a failure is told by: its exit code, the record in the run's folder, and the file of the start."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from llm.cluster.failure import exit_code, record_error, start_is_over, tell_start
from llm.errors import Agreed, BadHost, CheckpointError, InputError, PeerError, ReplicaError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong"), 2),
        (Agreed("wrong"), 2),
        (BadHost("this host has 7 GPUs"), 69),
        (ReplicaError("differ"), 1),
        (ReplicaError("differ", {3}), 69),
        (CheckpointError("disk full"), 1),
        (OSError("uncorrectable ECC error"), 1),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ..."), 69),
        (PeerError("rank 3: AcceleratorError: CUDA error: uncorrectable ECC error encountered"), 1),
        (RuntimeError("CUDA error: no CUDA-capable device is detected"), 69),
        (RuntimeError("No CUDA GPUs are available"), 69),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), 69),
        (RuntimeError("CUDA error: device-side assert triggered"), 1),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), 1),
        (RuntimeError("CUDA out of memory"), 1),
        (RuntimeError("Connection closed by peer"), 1),
    ],
)
def test_exit_codes_tell_faults_apart(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_the_first_failure_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "failed.json"
    record_error(path, CheckpointError("disk full"), rank=2)
    record_error(path, InputError("later"), rank=0)
    expected = {"code": 1, "reason": "CheckpointError: disk full", "rank": 2, "host": socket.gethostname()}
    assert json.loads(path.read_text()) == expected
    assert path.stat().st_mode & 0o777 == 0o600


def test_who_is_to_blame_is_recorded_and_not_the_others(tmp_path: Path) -> None:
    path = tmp_path / "failed.json"
    record_error(path, PeerError("rank 3: ..."), rank=0)
    record_error(path, ReplicaError("differ", {3}), rank=0)
    assert not path.exists()
    record_error(path, ReplicaError("differ", {3}), rank=3)
    assert json.loads(path.read_text())["code"] == 69


def test_where_there_is_no_folder_nothing_is_recorded(tmp_path: Path) -> None:
    record_error(tmp_path / "none" / "failed.json", RuntimeError(), rank=0)
    tell_start(2, {"INGOT_START": str(tmp_path / "none" / "start")})
    tell_start(2, {})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("codes", "over"),
    [([], None), ([1], None), ([1, 1, 2], 2), ([2, 1], 2), ([69, 1], None), ([75], 75), ([75, 1], 75), ([1, 75, 2], 2)],
)
def test_a_start_is_over(codes: list[int], over: int | None, tmp_path: Path) -> None:
    environ = {"INGOT_START": str(tmp_path / "start"), "TORCHELASTIC_RESTART_COUNT": "1"}
    for code in codes:
        tell_start(code, environ)
    assert start_is_over(environ) == over
    assert start_is_over(environ | {"TORCHELASTIC_RESTART_COUNT": "0"}) is None, "ranks of the first start speak"
    assert start_is_over({"INGOT_START": environ["INGOT_START"]}) is None
    assert start_is_over({"TORCHELASTIC_RESTART_COUNT": "1", "INGOT_START": os.devnull}) is None
