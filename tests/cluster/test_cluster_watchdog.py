"""Which ancestors count as the launcher, and that real ranks do not outlive theirs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import runs
from llm.cluster.ranks import free_port
from llm.cluster.watchdog import is_launcher, launcher_chain, lost, orphaned

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
RUNNER = ["/v/bin/python", "/v/bin/deepspeed", "--num_gpus", "2", "launch/pretrain.py"]
LAUNCH = ["/v/bin/python3", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30="]
TORCHRUN = ["/v/bin/python", "/v/bin/torchrun", "launch/pretrain.py"]
RANK = ["/v/bin/python", "-u", "launch/pretrain.py"]
REMOTE_SHELL = ["bash", "-c", f"export PYTHONPATH=/w; cd /w; {' '.join(LAUNCH)}"]
SESSION = ["sshd: root@notty"]


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up /proc, which psutil reads."""
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    (tmp_path / "stat").write_text("btime 1700000000\n")
    return tmp_path


def write_proc(folder: Path, *argvs: list[str]) -> psutil.Process:
    """A /proc in which each process is the child of the next, the last of pid 1; the first of them."""
    entries = [(100 + i, 101 + i, argv) for i, argv in enumerate(argvs)]
    entries[-1] = (entries[-1][0], 1, entries[-1][2])
    for pid, parent, argv in [*entries, (1, 0, ["/sbin/init"])]:
        write_process(folder, pid, parent, argv)
    return psutil.Process(100)


def write_process(folder: Path, pid: int, parent: int, argv=(), state="S", start=5000) -> None:
    (folder / str(pid)).mkdir(exist_ok=True)
    fields = [str(pid), "(a) (b c)", state, str(parent), *["0"] * 17, str(start), *["0"] * 30]
    (folder / str(pid) / "stat").write_text(" ".join(fields))
    (folder / str(pid) / "cmdline").write_bytes(b"".join(w.encode() + b"\0" for w in argv))


@pytest.mark.parametrize(
    "argv",
    [
        *(RUNNER, LAUNCH, TORCHRUN, ["python3.11", "-m", "torch.distributed.run", "a.py"]),
        ["/usr/bin/mpirun", "-np", "2", "python", "a.py"],
        ["orted", "--hnp"],
        ["slurmstepd: [4242.0]"],
    ],
)
def test_launchers(argv):
    assert is_launcher(argv)


@pytest.mark.parametrize(
    "argv",
    [
        *(RANK, REMOTE_SHELL, SESSION, ["-bash"], ["vim", "deepspeed"], ["make", "torchrun"]),
        ["python", "launch/pretrain.py", "-m", "deepspeed"],
        ["python", "-m", "pytest", "deepspeed"],
        [""],
    ],
)
def test_not_launchers(argv):
    assert not is_launcher(argv)


@pytest.mark.parametrize(
    ("ancestors", "watched"),
    [
        ([["-bash"]], 0),
        ([["bash", "-c", "python launch/pretrain.py"], ["make"]], 0),
        ([TORCHRUN, ["-bash"]], 1),
        ([TORCHRUN, ["bash", "-c", "torchrun launch/pretrain.py & sleep 9"], ["cron"]], 1),
        ([LAUNCH, RUNNER, ["bash", "launch/deepspeed.sh"], ["-bash"], ["sshd: me@pts/0"]], 3),
        ([TORCHRUN, ["bash", "/w/launch/torchrun.sh", "--config", "c.yaml"], ["make"]], 2),
        ([TORCHRUN, ["bash", "launch/torchrun.sh"], ["python", "launch/supervise.py", "--", "launch/torchrun.sh"]], 3),
        ([["python3.12", "/w/launch/supervise.py", "--", "python", "launch/pretrain.py"], ["-bash"]], 1),
        ([LAUNCH, REMOTE_SHELL, SESSION, ["sshd: /usr/sbin/sshd [listener]"]], 3),
        ([LAUNCH, SESSION, ["sshd: /usr/sbin/sshd [listener]"]], 2),
        ([["orted", "--hnp"], ["bash", "-c", "orted --hnp"], ["sshd-session: me@notty"]], 3),
        ([["bash", "job.sh"], ["slurmstepd: [4242.0]"], ["slurmd"]], 2),
        # A command typed into ssh may end before the job that it put into the background.
        ([TORCHRUN, ["bash", "-c", "nohup torchrun a.py & sleep 9"], SESSION], 1),
    ],
)
@linux
def test_chain(ancestors, watched, proc):
    chain = launcher_chain(write_proc(proc, RANK, *ancestors))
    assert [process.pid for process in chain] == list(range(101, 101 + watched))
    assert lost(chain) is None


@linux
def test_a_title_without_zero_bytes(proc):
    """As sshd and slurmstepd write it; psutil cuts it into words."""
    rank = write_proc(proc, LAUNCH, SESSION, ["slurmstepd: [4242.0]"], ["slurmd"])
    for pid in (101, 102):
        path = proc / str(pid) / "cmdline"
        path.write_bytes(path.read_bytes().rstrip(b"\0"))
    assert psutil.Process(101).cmdline() == ["sshd:", "root@notty"]
    assert [process.pid for process in launcher_chain(rank)] == [101, 102]


@pytest.mark.parametrize("change", ["gone", "zombie", "reused"])
@linux
def test_lost(change, proc):
    chain = launcher_chain(write_proc(proc, RANK, LAUNCH, RUNNER, ["-bash"]))
    if change == "gone":
        shutil.rmtree(proc / "102")
    elif change == "zombie":
        write_process(proc, 102, 1, state="Z")
    else:
        write_process(proc, 102, 1, RUNNER, start=5001)
    missing = lost(chain)
    assert missing is not None
    assert missing.pid == 102


@linux
def test_runner_that_died_before_the_rank_looked(proc):
    assert orphaned(launcher_chain(write_proc(proc, RANK, LAUNCH)))


@pytest.mark.parametrize("ancestors", [[LAUNCH, RUNNER], [LAUNCH, ["-bash"]], [TORCHRUN], [RANK]])
@linux
def test_not_orphaned(ancestors, proc):
    assert not orphaned(launcher_chain(write_proc(proc, RANK, *ancestors)))


@linux
def test_a_process_that_may_not_be_read_is_no_launcher(proc, monkeypatch):
    def denied(process):
        raise psutil.AccessDenied(process.pid)

    rank = write_proc(proc, RANK, LAUNCH, RUNNER)
    monkeypatch.setattr(psutil.Process, "cmdline", denied)
    assert launcher_chain(rank) == []


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + 60  # generous: a busy machine, not a promise
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ranks_end_when_their_launcher_is_killed(launcher, tmp_path):
    port = str(free_port())
    command = {
        "deepspeed": [*runs.DEEPSPEED, "--num_gpus", "2", "--master_port", port],
        "torchrun": [*runs.TORCHRUN, "--nproc_per_node", "2", "--master_port", port],
    }[launcher]
    log = tmp_path / "log"
    with log.open("w") as stream:
        runner = subprocess.Popen(
            [*command, "tests/cluster/rank_probe.py", tmp_path, "--stay"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    started: set[int] = {runner.pid}
    try:
        wait_until(lambda: len(list(tmp_path.glob("rank-*.json"))) == 2, log.read_text())
        for path in tmp_path.glob("rank-*.json"):
            report = json.loads(path.read_text())
            started |= {report["pid"], *report["watched"]}
            assert runner.pid in report["watched"]
        assert len(started) == (4 if launcher == "deepspeed" else 3)
        runner.kill()
        runner.wait()
        wait_until(lambda: not any(alive(pid) for pid in started), log.read_text())
        assert f"process {runner.pid}" in log.read_text()
    finally:
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)
