"""Rank discovery: each launcher's variables, what is refused, and the real launchers."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runs
from llm.cluster.ranks import Ranks, discover_ranks, export, free_port, initialize, strip_local_rank
from llm.errors import InputError, RendezvousError

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PLACE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}
TORCHRUN = {
    **PLACE,
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    **PLACE,
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ALLOCATION = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
BATCH_SCRIPT = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SLURM = {
    **ALLOCATION,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def place(ranks: Ranks) -> tuple:
    return ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (DEEPSPEED, "deepspeed"),
        ({**OPENMPI, **PLACE}, "openmpi"),
        ({**MPICH, **PLACE}, "mpich"),
        ({**SLURM, **PLACE}, "slurm"),
        # One inside the other: the innermost launcher is the one that counts.
        ({**SLURM, **TORCHRUN}, "torchrun"),
        ({**SLURM, "SLURM_PROCID": "0", **OPENMPI, **PLACE}, "openmpi"),
        ({**SLURM, "SLURM_PROCID": "0", **MPICH, **PLACE}, "mpich"),
        ({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4", **PLACE}, "slurm"),
        ({**MPICH, **PLACE, "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, "mpich"),
    ],
)
def test_each_launcher(environ, launcher):
    ranks = discover_ranks(environ)
    assert place(ranks) == (3, 1, 4, 2)
    assert (ranks.master_addr, ranks.master_port) == ("10.0.0.1", 29511)
    assert ranks.launcher == launcher


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"},
        {"LOCAL_SIZE": "4"},
        ALLOCATION,
        BATCH_SCRIPT,
    ],
)
def test_one_process_whatever_lies_around(environ):
    ranks = discover_ranks(environ)
    assert place(ranks) == (0, 0, 1, 1)
    assert ranks.launcher == "python"
    assert ranks.master_addr == "127.0.0.1"


def test_slurm_without_master_variables():
    ranks = discover_ranks(SLURM)
    assert ranks.master_addr == "node07"
    assert 15000 <= ranks.master_port < 30000
    other_step = discover_ranks({**SLURM, "SLURM_STEP_ID": "1"})
    assert ranks.master_port != other_step.master_port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("node[07-09,12],login", "node07"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]node[003,005]", "rack1node003"),
    ],
)
def test_slurm_first_host(nodes, first):
    assert discover_ranks({**SLURM, "SLURM_STEP_NODELIST": nodes}).master_addr == first


@pytest.mark.parametrize(
    ("environ", "changes", "named"),
    [
        *((TORCHRUN, {name: None}, name) for name in TORCHRUN if name != "TORCHELASTIC_RUN_ID"),
        *((TORCHRUN, {name: "two"}, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")),
        (TORCHRUN, {"RANK": "-1"}, "RANK"),
        (TORCHRUN, {"RANK": "4"}, "rank 4 of 4"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "8"}, "world size of 4"),
        (TORCHRUN, {"LOCAL_SIZE": "4"}, "LOCAL_SIZE is 4"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "MASTER_PORT"),
        (TORCHRUN, {"MASTER_PORT": ""}, "MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, {}, "is not set"),
        *(({**OPENMPI, **PLACE}, {name: None}, name) for name in OPENMPI),
        *(({**MPICH, **PLACE}, {name: None}, name) for name in MPICH if name != "PMI_RANK"),
        (SLURM, {"SLURM_LOCALID": None}, "SLURM_LOCALID"),
        (SLURM, {"SLURM_STEP_NUM_TASKS": "5"}, "SLURM_STEP_NUM_TASKS"),
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE"),
        (SLURM, {"SLURM_STEP_NODELIST": "-oProxyCommand=x"}, "SLURM_JOB_NODELIST"),
    ],
)
def test_partial_or_contradictory_variables_are_named(environ, changes, named):
    changed = {**environ, **changes}
    with pytest.raises(InputError, match=named):
        discover_ranks({name: value for name, value in changed.items() if value is not None})


def test_missing_mpi_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InputError, match=r"mpi4py.*MASTER_ADDR"):
        discover_ranks(OPENMPI)


def test_export_is_what_discovery_reads():
    ranks = discover_ranks({**OPENMPI, **PLACE})
    environ = {"PATH": "/bin", "LOCAL_SIZE": "2"}
    export(ranks, environ)
    assert "LOCAL_SIZE" not in environ  # DeepSpeed would leave 66 MB per rank in /dev/shm
    assert place(discover_ranks(environ)) == place(ranks)
    assert environ["PATH"].split(":") == [str(BIN), "/bin"]
    assert environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(Path.home()))  # never in /tmp, which others share
    export(ranks, environ)
    assert environ["PATH"].split(":") == [str(BIN), "/bin"]


def test_strip_local_rank():
    argv = ["--local_rank=3", "--config", "c.yaml", "--local-rank=0", "--a.local_rank=1"]
    assert strip_local_rank(argv) == ["--config", "c.yaml", "--a.local_rank=1"]


def test_rendezvous_failure_says_where_and_what_to_look_at():
    ranks = Ranks(1, 0, 2, 1, "127.0.0.1", free_port(), "environment")
    with pytest.raises(RendezvousError, match=r"rank 1 of 2 .*127\.0\.0\.1.*SOCKET_IFNAME"):
        initialize(ranks, timeout_seconds=1, device=torch.device("cpu"))


def test_a_busy_port_is_named_at_once():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        ranks = Ranks(0, 0, 2, 2, "127.0.0.1", port, "environment")
        with pytest.raises(RendezvousError, match=rf"port {port} .*MASTER_PORT=N before launch/deepspeed\.sh"):
            initialize(ranks, timeout_seconds=3600, device=torch.device("cpu"))


def test_torchruns_agent_listens_for_rank_0(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks = Ranks(0, 0, 1, 1, "127.0.0.1", store.port, "torchrun")
    initialize(ranks, timeout_seconds=60, device=torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_one_process_in_a_job_of_several_says_so(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {path: /none}\n")
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", "--config", tmp_path / "c.yaml"],
        cwd=ROOT, env={**os.environ, **BATCH_SCRIPT}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "note: one process, in a Slurm job of 4 tasks; start with srun" in done.stderr


@pytest.mark.parametrize(
    ("command", "launcher", "code"),
    [
        ([sys.executable], "python", 75),
        ([*runs.TORCHRUN, "--standalone", "--nproc_per_node", "2"], "torchrun", 0),
        ([*runs.DEEPSPEED, "--num_gpus", "2", "--master_port", "PORT"], "deepspeed", 75),
        (
            ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable],
            "openmpi",
            75,
        ),
    ],
    ids=["python", "torchrun", "deepspeed", "mpirun"],
)
def test_real_launchers(command, launcher, code, tmp_path):
    """Ranks meet, arguments arrive, and the exit code of a run that stopped early comes back."""
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    command = [str(free_port()) if word == "PORT" else word for word in command]
    done = subprocess.run(
        [*command, "tests/cluster/rank_probe.py", tmp_path, "--a.b=c d", "--exit", str(code)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.json"))]
    world = 1 if launcher == "python" else 2
    assert [report["rank"] for report in reports] == list(range(world))
    assert {report["launcher"] for report in reports} == {launcher}
    assert {report["world_size"] for report in reports} == {world}
    assert {report["sum"] for report in reports} == {1.0 if world == 1 else 3.0}
    assert all(report["arguments"][1] == "--a.b=c d" for report in reports)
