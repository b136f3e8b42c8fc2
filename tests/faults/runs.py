"""Real runs of launch/pretrain.py in a folder of their own, for tests that kill them or feed them nonsense."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

from pool import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Not the scripts of those names: in a folder whose path has a space their first line is broken.
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SETTINGS = {
    "model.n_layer": 2,
    "model.n_head": 4,
    "model.n_kv_head": 2,
    "model.d_model": 32,
    "model.vocab_size": 300,
    "model.max_seq_len": 32,
    "data.seq_len": 32,
    "data.validation_fraction": 0.3,
    "data.validation_samples": 8,
    "optim.warmup_steps": 4,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.max_steps": 40,
    "train.eval_interval": 20,
    "checkpoint.interval": 4,
    "parallel.timeout_seconds": 30,
    "logging.sample_tokens": 0,
    "logging.tensorboard": "false",
}


class Resumed(NamedTuple):
    """How a start has gone on."""

    seconds: float
    """Until the checkpoint was loaded."""
    step: int
    output: str


class Workspace:
    """A folder with a small corpus, where runs are started as a user starts them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        corpus = path / "corpus"
        corpus.mkdir(parents=True)
        stdlib = Path(sysconfig.get_path("stdlib"))
        for name in (
            "abc",
            "bisect",
            "calendar",
            "cmd",
            "colorsys",
            "copy",
            "fnmatch",
            "glob",
            "heapq",
            "queue",
        ):
            (corpus / f"{name}.txt").write_text((stdlib / f"{name}.py").read_text())

    def arguments(self, **overrides: Any) -> list[str]:
        settings = {
            "data.source": "corpus",
            **SETTINGS,
            **{k.replace("__", "."): v for k, v in overrides.items()},
        }
        return [f"--{key}={value}" for key, value in settings.items()]

    def environment(self, **changes: str) -> dict[str, str]:
        ours = {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        return inherited | ours | changes

    def prepare(self, **overrides: Any) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(ROOT / "launch/prepare_data.py"),
            *self.arguments(**overrides),
        ]
        return self.run(command)

    def python(self, env: dict[str, str] | None = None, **overrides: Any) -> subprocess.CompletedProcess[str]:
        """One process, without a launcher."""
        command = [sys.executable, str(ROOT / "launch/pretrain.py"), *self.arguments(**overrides)]
        return self.run(command, env or self.environment())

    def deepspeed_command(self, ranks: int, **overrides: Any) -> list[str]:
        launcher = [
            *DEEPSPEED,
            "--num_gpus",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
        return [*launcher, str(ROOT / "launch/pretrain.py"), *self.arguments(**overrides)]

    def torchrun_command(self, ranks: int, **overrides: Any) -> list[str]:
        launcher = [
            *TORCHRUN,
            "--nproc_per_node",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
        return [*launcher, str(ROOT / "launch/pretrain.py"), *self.arguments(**overrides)]

    def faulty(self, launcher: str, script: str, fault: str = "", ranks: int = 2, **overrides: Any) -> list[str]:
        """A command of python, torchrun or deepspeed that starts tests/faults/<script>.py with FAULT=<fault>."""
        launch = {
            "python": [sys.executable],
            "torchrun": [*TORCHRUN, "--nproc_per_node", str(ranks), "--master_port", str(free_port())],
            "deepspeed": [*DEEPSPEED, "--num_gpus", str(ranks), "--master_port", str(free_port())],
        }[launcher]
        return ["env", f"FAULT={fault}", *launch, str(ROOT / f"tests/faults/{script}.py"), *self.arguments(**overrides)]

    def deepspeed(self, ranks: int, **overrides: Any) -> subprocess.CompletedProcess[str]:
        return self.run(self.deepspeed_command(ranks, **overrides))

    def torchrun(self, ranks: int, **overrides: Any) -> subprocess.CompletedProcess[str]:
        return self.run(self.torchrun_command(ranks, **overrides))

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        log = (self.path / "started.log").open("wb")
        return subprocess.Popen(command, cwd=self.path, env=self.environment(), stdout=log, stderr=log)

    def run(self, command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.path, env=env or self.environment(), capture_output=True, text=True, timeout=300
        )

    def resume(self, command: list[str]) -> Resumed:
        """Start a run that has a checkpoint, and let it end well."""
        log = self.path / "resumed.log"
        begin, seconds, found = time.monotonic(), 0.0, None
        with log.open("wb") as stream:
            environment = self.environment(PYTHONUNBUFFERED="1")
            process = subprocess.Popen(command, cwd=self.path, env=environment, stdout=stream, stderr=stream)
        while process.poll() is None:
            now = time.monotonic() - begin
            assert now < 300, log.read_text()[-3000:]
            if found is None and (found := re.search(r"resumed from step (\d+)", log.read_text())):
                seconds = now
            time.sleep(0.02)
        output = log.read_text()
        assert process.returncode == 0 and found is not None, output[-3000:]
        return Resumed(seconds, int(found[1]), output)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.path / "runs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def losses(self, name: str) -> dict[int, float]:
        """Training loss by step; every step exactly once."""
        records = [r for r in self.metrics(name) if "loss" in r]
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        return {r["step"]: r["loss"] for r in records}

    def wait_for_step(self, name: str, step: int, seconds: float = 120) -> None:
        path = self.path / "runs" / name / "metrics.jsonl"
        deadline = time.monotonic() + seconds
        while not (path.exists() and path.read_bytes().count(b'"loss"') >= step):
            assert time.monotonic() < deadline, (self.path / "started.log").read_text()[-3000:]
            time.sleep(0.005)


def succeeded(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file below a folder with its bytes, and every folder; empty where there is none."""
    return {
        path: None if path.is_dir() else path.read_bytes() for path in [folder, *folder.rglob("*")] if path.exists()
    }
