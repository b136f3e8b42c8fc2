"""Training over two hosts gives the losses of one process; a job does not outlive its launcher."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", "launch/configs/tiny-cpu.yaml"]
SETTINGS = [
    *CONFIG,
    *("--optim.lr=1e-3", "--train.max_steps=6", "--data.validation_samples=8"),
    *("--logging.tensorboard=false", "--logging.sample_tokens=0", "--parallel.timeout_seconds=120"),
]


@pytest.fixture(scope="module")
def corpus(two_hosts) -> None:
    """The shards that every run here reads; made once, and kept for the next time."""
    two_hosts.run(0, ["python", "launch/prepare_data.py", *CONFIG])


@pytest.fixture
def name(request, corpus) -> Iterator[str]:
    """A run's name; its folder is removed before and after."""
    chosen = f"cluster-{os.getpid()}-{request.node.name.replace('[', '-').rstrip(']')}"
    yield chosen
    shutil.rmtree(ROOT / "runs" / chosen, ignore_errors=True)


@pytest.fixture(scope="module")
def expected(two_hosts, corpus) -> dict[int, float]:
    """Loss by step of one process, started with plain python."""
    chosen = f"cluster-{os.getpid()}-python"
    two_hosts.run(0, ["python", "launch/pretrain.py", *SETTINGS, f"--name={chosen}"])
    found = losses(chosen)
    shutil.rmtree(ROOT / "runs" / chosen)
    return found


def losses(name: str) -> dict[int, float]:
    lines = (ROOT / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def check(name: str, expected: dict[int, float]) -> None:
    found = losses(name)
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert sorted(found) == sorted(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5), f"step {step}"


@pytest.mark.parametrize(
    "layout",
    [["--parallel.zero_stage=1"], ["--parallel.tensor_parallel=2"]],
    ids=["zero-1", "tensor-parallel-2"],
)
def test_deepspeed_over_two_hosts(layout, two_hosts, expected, name, port):
    command = ["launch/deepspeed.sh", *SETTINGS, *layout, f"--name={name}"]
    told = two_hosts.run(0, command, HOSTFILE=str(two_hosts.hostfile), MASTER_PORT=port)
    assert "step 1/" in told and "[INFO]" not in told
    check(name, expected)


def by_torchrun(hosts, port: str, name: str, *settings: str) -> dict[int, list]:
    """The command of each host."""
    commands = {}
    for host in (0, 1):
        place = ["NNODES=2", f"NODE_RANK={host}", f"MASTER_ADDR={hosts.addresses[0]}", f"MASTER_PORT={port}"]
        commands[host] = ["env", *place, "RANKS=1", "launch/torchrun.sh", *SETTINGS, *settings, f"--name={name}"]
    return commands


def test_torchrun_over_two_hosts(two_hosts, expected, name, port):
    two_hosts.run_all(by_torchrun(two_hosts, port, name))
    check(name, expected)


def working(hosts) -> list[int]:
    """The processes of both hosts that belong to a training job."""
    found = []
    for netns in hosts.names:
        listed = subprocess.run(["ip", "netns", "pids", netns], capture_output=True, text=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                if "launch/pretrain.py" in command:
                    found.append(int(pid))
    return found


def test_no_host_outlives_a_killed_runner(two_hosts, corpus, name, port, tmp_path):
    command = ["launch/deepspeed.sh", *SETTINGS, "--train.max_steps=100000", f"--name={name}"]
    log = tmp_path / "log"
    environ = {"HOSTFILE": str(two_hosts.hostfile), "MASTER_PORT": port}
    script = two_hosts.start(0, command, log, **environ)
    metrics = ROOT / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert script.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    (runner,) = (child for child in psutil.Process(script.pid).children() if child.name() != "sed")
    assert len(working(two_hosts)) > 4
    runner.kill()
    assert script.wait(timeout=60) == 137, log.read_text()
    deadline = time.monotonic() + 60
    while working(two_hosts):
        assert time.monotonic() < deadline, f"{working(two_hosts)} are left:\n{log.read_text()}"
        time.sleep(0.2)


@pytest.mark.row(5)
def test_a_cut_link_ends_the_run_on_both_hosts(two_hosts, corpus, name, port, tmp_path, row: Callable[..., None]):
    settings = ["--train.max_steps=60", "--checkpoint.interval=10", "--parallel.timeout_seconds=20"]
    commands = by_torchrun(two_hosts, port, name, *settings)
    logs = [tmp_path / f"log-{host}" for host in (0, 1)]
    jobs = [two_hosts.start(host, commands[host], logs[host]) for host in (0, 1)]
    metrics, deadline = ROOT / "runs" / name / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 15):
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs), logs[0].read_text()
        time.sleep(0.05)
    two_hosts.plug("down")
    cut = time.monotonic()
    try:
        for host, job in enumerate(jobs):
            assert job.wait(timeout=150) not in (0, 2, 75), logs[host].read_text()
        detected, last = time.monotonic() - cut, len(losses(name))
        assert last < 60 and not working(two_hosts)
    finally:
        two_hosts.plug("up")
    begin = time.monotonic()
    told = two_hosts.run_all(commands)[0]
    resumed = int(told.split("resumed from step ", 1)[1].split()[0])
    row(5, "torchrun", detected=detected, lost=last - resumed, restart=time.monotonic() - begin)
    again = losses(name)
    shutil.rmtree(ROOT / "runs" / name)
    two_hosts.run_all(commands)
    assert again == losses(name) and len(again) == 60
