"""Weights & Biases, offline: the numbers of metrics.jsonl, one W&B run over restarts; its failures fail nothing."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from llm.config import DataConfig, RunConfig, TrainConfig
from llm.config.reports import LoggingConfig
from llm.errors import InputError
from llm.train import wandb_run
from llm.train.metrics import MetricsWriter
from llm.train.wandb_run import WandbRun, check_wandb

ROOT = Path(__file__).resolve().parents[2]
CONFIG = replace(RunConfig(), name="tiny", logging=LoggingConfig(wandb=True))


def sent(folder: Path) -> list[tuple[str, list[dict[str, float]], int]]:
    """The id, the logged numbers and the exit code of each W&B run of a folder, by their own files."""
    wandb.teardown()  # its service writes for a while after a run has ended
    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        rows, run_id, code = [], "", -1
        for data in messages(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                run_id = record.run.run_id
            elif record.HasField("exit"):
                code = record.exit.exit_code
            elif record.HasField("history"):
                items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
        found.append((run_id, rows, code))
    return found


def messages(data: bytes) -> Iterator[bytes]:
    """The messages of a .wandb file: seven bytes, then LevelDB's log format."""
    position, message = 7, b""
    while position + 7 <= len(data):
        if (left := -position % 32768) < 7:  # no header begins so near to a block's end
            position += left
        _, length, kind = struct.unpack_from("<IHB", data, position)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


@pytest.fixture(autouse=True)
def own_session() -> Iterator[None]:
    """W&B reads its variables once in a process, unless it is torn down."""
    yield
    wandb.teardown()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def open_run(folder: Path) -> Callable[[], WandbRun]:
    return lambda: WandbRun(folder, CONFIG)


@pytest.mark.usefixtures("offline")
def test_the_same_numbers_arrive_and_a_restart_goes_on_in_the_same_run(tmp_path: Path) -> None:
    for first in (1, 3):
        with MetricsWriter(tmp_path / "m.jsonl", None, wandb=open_run(tmp_path)) as writer:
            writer.write({"step": first, "loss": 1 / first, "mfu": None, "epochs": {"code": 0.25}})
            writer.write({"step": first, "val_loss": 2.0})
    (run, rows, code), (run_again, rows_again, _) = sent(tmp_path)
    assert rows == [{"step": 1, "train/loss": 1.0, "train/epochs/code": 0.25}, {"step": 1, "validation/val_loss": 2.0}]
    assert rows_again[0] == {"step": 3, "train/loss": 1 / 3, "train/epochs/code": 0.25}
    assert run == run_again == (tmp_path / "wandb_id").read_text()
    assert code == 0


@pytest.mark.usefixtures("offline")
def test_a_run_that_fails_is_marked_so(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError), MetricsWriter(tmp_path / "m.jsonl", None, wandb=open_run(tmp_path)):
        raise FloatingPointError
    assert [code for _, _, code in sent(tmp_path)] == [1]


def test_no_secret_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or Mock())
    section = {"monitor": {"api_key": "hunter2", "many": [{"token": "hunter2"}]}}
    data = DataConfig(path="s3://me:hunter2@host/x?sig=hunter2")
    WandbRun(tmp_path, replace(CONFIG, train=TrainConfig(engine="deepspeed"), deepspeed=section, data=data))
    assert "hunter2" not in repr(given) and given["config"]["name"] == "tiny"


def test_a_rank_that_does_not_report_opens_none(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl", None, wandb=open_run(tmp_path), enabled=False) as writer:
        writer.write({"step": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_what_wandb_refuses_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    said = []
    with MetricsWriter(tmp_path / "m.jsonl", None, wandb=open_run(tmp_path), say=said.append) as writer:
        writer.write({"step": 1, "loss": 1.0})
        writer.write({"step": 2, "loss": 0.5})
    assert len(said) == 1 and "Weights & Biases" in said[0] and "WANDB_API_KEY" in said[0]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


DIES = """
import sys
from pathlib import Path
from unittest.mock import Mock
import psutil
from llm.config import DataConfig, RunConfig, TrainConfig
from llm.train.metrics import MetricsWriter
from llm.train.wandb_run import WandbRun
folder = Path(sys.argv[1])
with MetricsWriter(folder / "m.jsonl", None, wandb=lambda: WandbRun(folder, RunConfig())) as writer:
    writer.write({"step": 1, "loss": 1.0})
    services = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
    assert services
    for service in services:
        service.kill()
        service.wait()
    for step in range(2, 6):
        writer.write({"step": step, "loss": 0.5})
"""


@pytest.mark.usefixtures("offline")
def test_a_service_that_dies_ends_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIES, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 5


def test_a_missing_package_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "distributions", lambda name: iter(()))
    check_wandb(replace(CONFIG, logging=LoggingConfig()))
    with pytest.raises(InputError, match=r"logging.wandb.*pip install -e '\.\[wandb\]'"):
        check_wandb(CONFIG)
