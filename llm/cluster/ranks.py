"""Finds out which rank this process is. No other module reads rank variables.

`deepspeed`, `torchrun`, `mpirun` (Open MPI, MPICH, Intel MPI), `srun` and plain `python` start the same script;
`discover_ranks` turns the variables that each sets into one `Ranks`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llm.errors import InputError, RendezvousError, require

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"
# Rank, rank on this host, processes, processes on this host.
OPENMPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))
MPICH = ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run, and the address at which all of its processes meet."""

    rank: int
    """Number of this process, 0 .. world_size - 1."""
    local_rank: int
    """Number of this process on its host, 0 .. local_world_size - 1."""
    world_size: int
    """Processes in the run."""
    local_world_size: int
    """Processes of the run on this host."""
    master_addr: str
    """Host of rank 0."""
    master_port: int
    """Port on that host where the processes meet."""
    launcher: str
    """deepspeed, torchrun, openmpi, mpich, slurm, environment (set by hand), or python (alone)."""

    def __post_init__(self) -> None:
        numbers = (("rank", self.rank, self.world_size), ("local rank", self.local_rank, self.local_world_size))
        for name, number, size in numbers:
            expected = f"expected 0 to {size - 1}"
            require(0 <= number < size, f"{self.launcher}: {name} {number} of {size} processes; {expected}")
        require(
            self.local_world_size <= self.world_size,
            f"{self.launcher}: {self.local_world_size} processes on this host but a world size of "
            f"{self.world_size}; unset the rank variable that is left over from another run",
        )
        require(0 < self.master_port < 65536, f"MASTER_PORT is {self.master_port}; expected a port from 1 to 65535")


def discover_ranks(environ: Mapping[str, str]) -> Ranks:
    """The place of this process, from the variables that its launcher set in `environ`.

    The most explicit wins: RANK and its companions (`torchrun` under `srun` has both), then Open MPI's, MPICH's, then
    those of an `srun` step. None of these: one process, with a free port.

    Raises InputError, which names the variable, when a set of variables is incomplete, contradicts itself or is not
    made of integers.
    """
    # `deepspeed --launcher mpich` gives WORLD_SIZE to MPICH's launcher, which sets the rest.
    of_mpi_or_slurm = any(name in environ for name in (*OPENMPI, *MPICH, "SLURM_PROCID"))
    if "RANK" in environ or "LOCAL_RANK" in environ or ("WORLD_SIZE" in environ and not of_mpi_or_slurm):
        return _from_rank_variables(environ)
    if any(name in environ for name in OPENMPI):
        return _from_mpi(environ, "openmpi", OPENMPI)
    # `srun --mpi=pmi2` sets PMI_RANK too, but only MPICH's own launcher sets MPI_LOCALRANKID.
    if "PMI_RANK" in environ and ("MPI_LOCALRANKID" in environ or not _in_srun_step(environ)):
        return _from_mpi(environ, "mpich", MPICH)
    if _in_srun_step(environ):
        return _from_slurm(environ)
    return Ranks(0, 0, 1, 1, LOOPBACK, free_port(), "python")


def export(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Set in `environ` (os.environ) what torch and DeepSpeed read: once, by the launch script.

    DeepSpeed looks for MPI unless all of these are set. The folder of the Python in use comes first in PATH, because
    DeepSpeed compiles an operator with the `ninja` that pip put there, and neither ssh nor an environment that was not
    activated has it; another version of ninja would compile it anew. LOCAL_SIZE goes: where it equals the world size,
    DeepSpeed leaves 66 MB per rank in /dev/shm for an all-reduce that training does not use.
    """
    for name in ("rank", "local_rank", "world_size", "local_world_size", "master_addr", "master_port"):
        environ[name.upper()] = str(getattr(ranks, name))
    environ.pop("LOCAL_SIZE", None)
    environ.setdefault("TORCH_EXTENSIONS_DIR", str(operator_folder()))
    python = str(Path(sys.executable).parent)
    others = [folder for folder in environ.get("PATH", os.defpath).split(os.pathsep) if folder != python]
    environ["PATH"] = os.pathsep.join([python, *others])


def operator_folder() -> Path:
    """Where the operator that DeepSpeed compiles lies, unless TORCH_EXTENSIONS_DIR is set.

    Each host has its own, so that llm.cluster.preflight can tell the lock of a build that was killed.
    """
    return Path.home() / f".cache/torch_extensions/ingot-{os.uname().nodename}-{sys.implementation.cache_tag}"


def initialize(ranks: Ranks, *, timeout_seconds: float, device: torch.device) -> None:
    """Make the default process group: NCCL when `device` is a CUDA device, else Gloo.

    Every later collective on it ends with an error after `timeout_seconds`. Raises RendezvousError, with what to look
    at, when the ranks do not all meet within that time.
    """
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    host = f"[{ranks.master_addr}]" if ":" in ranks.master_addr else ranks.master_addr  # an IPv6 address in a URL
    url, limit = f"tcp://{host}:{ranks.master_port}", timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, url, rank=ranks.rank, world_size=ranks.world_size, timeout=limit)
    except (RuntimeError, OSError) as error:  # torch's DistError classes are RuntimeErrors
        hint = "that no other program listens on the port"
        if ranks.world_size > ranks.local_world_size:
            hint += (
                ", that every host was started, reaches that address, and has GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME "
                "set to its interface on that network"
            )
        raise RendezvousError(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {ranks.master_addr}:"
            f"{ranks.master_port} within {timeout_seconds:g} s; check {hint}. Cause: {error}"
        ) from error


def choose_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU of a machine without one.

    A rank takes the GPU of its local number, or the only one it sees if Slurm has given each task its own. Raises
    InputError when there are fewer GPUs than ranks.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and ranks.launcher == "slurm":
        return torch.device("cuda", 0)
    require(
        ranks.local_rank < count,
        f"this host has {count} GPUs for {ranks.local_world_size} ranks; start at most {count} here",
    )
    return torch.device("cuda", ranks.local_rank)


def strip_local_rank(argv: Sequence[str]) -> list[str]:
    """`argv` without the `--local_rank=N` or `--local-rank=N` that some launchers add."""
    return [word for word in argv if not re.fullmatch(r"--local[_-]rank=\d+", word)]


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None:
        raise InputError(
            f"{name} is not set, but other rank variables are; start with deepspeed, torchrun, mpirun or srun, or "
            "unset RANK, LOCAL_RANK, WORLD_SIZE for a single process"
        )
    require(re.fullmatch(r"[0-9]{1,9}", text) is not None, f"{name} is {text!r}; expected a whole number")
    return int(text)


def _master(environ: Mapping[str, str]) -> tuple[str, int]:
    require(bool(environ.get("MASTER_ADDR")), "MASTER_ADDR is not set; expected the host of rank 0")
    return environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")


def _from_rank_variables(environ: Mapping[str, str]) -> Ranks:
    local = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ]
    sizes = {_integer(environ, name) for name in local or ["LOCAL_WORLD_SIZE"]}
    require(
        len(sizes) == 1,
        f"LOCAL_WORLD_SIZE is {environ.get('LOCAL_WORLD_SIZE')} but LOCAL_SIZE is {environ.get('LOCAL_SIZE')}; "
        "expected the same number: unset the stray one",
    )
    marks = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
    launcher = next((launcher for name, launcher in marks.items() if name in environ), "environment")
    rank, local_rank, world_size = (_integer(environ, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return Ranks(rank, local_rank, world_size, sizes.pop(), *_master(environ), launcher)


def _from_mpi(environ: Mapping[str, str], launcher: str, names: Sequence[str]) -> Ranks:
    rank, local_rank, world_size, local_world_size = (_integer(environ, name) for name in names)
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        address, port = _master(environ)
    else:
        address, port = _agree_through_mpi(rank, world_size, one_host=local_world_size == world_size)
    return Ranks(rank, local_rank, world_size, local_world_size, address, port, launcher)


def _agree_through_mpi(rank: int, world_size: int, *, one_host: bool) -> tuple[str, int]:
    """Rank 0's address and a free port there, told to all by an MPI broadcast.

    MPI is closed again at once: a process that left it open would wait at its exit for the others, and an error on one
    rank would hang.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        raise InputError(
            "mpirun started this process without MASTER_ADDR and MASTER_PORT, and mpi4py, through which the ranks "
            f"would agree on them, does not work here ({error}); install mpi4py and an MPI library (Debian: apt-get "
            "install openmpi-bin), or set both variables (Open MPI: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500)"
        ) from error
    MPI.Init()
    found = MPI.COMM_WORLD.Get_size()
    message = bytearray(256)
    if rank == 0:
        address = LOOPBACK if one_host else _own_address()
        message = bytearray(f"{address} {free_port()}".encode().ljust(len(message), b"\0"))
    MPI.COMM_WORLD.Bcast(message, root=0)
    MPI.Finalize()
    require(
        found == world_size,
        f"mpirun started {world_size} processes but mpi4py's MPI library sees {found}; use the mpirun of the library "
        "that mpi4py loads",
    )
    address, port = message.rstrip(b"\0").decode().split(" ")
    require(address != "", "the host of rank 0 has only loopback addresses; set MASTER_ADDR and MASTER_PORT")
    return address, int(port)


def _own_address() -> str:
    """An IPv4 address of this host that is not loopback, or "" where there is none."""
    addresses = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: asks the routing table which address would be the source.
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]
    with contextlib.suppress(OSError):
        addresses = socket.gethostbyname_ex(socket.gethostname())[2]
    return next((address for address in addresses if not address.startswith("127.")), "")


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    # A batch script and a shell in an allocation have SLURM_NTASKS too; only srun sets the step's.
    return "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    per_node = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", ""))
    node = _integer(environ, "SLURM_NODEID")
    require(
        node < len(per_node) and sum(per_node) == world_size,
        f"SLURM_NODEID is {node} and SLURM_STEP_NUM_TASKS {world_size}, which do not fit SLURM_STEP_TASKS_PER_NODE = "
        f"{per_node}",
    )
    # Below Linux's ephemeral ports; two steps of one job get two ports.
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    port = _integer(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 15000 + (31 * job + step) % 15000
    rank, local_rank = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_LOCALID")
    address = environ.get("MASTER_ADDR") or _first_host(nodes)
    return Ranks(rank, local_rank, world_size, per_node[node], address, port, "slurm")


def _first_host(nodes: str) -> str:
    """`node[07-09,12],login` -> `node07`. The package that reads such lists, python-hostlist, is under the GPL."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")
    require(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", host) is not None,
        f"SLURM_JOB_NODELIST is {nodes!r}; expected a list of hosts such as node[01-04]",
    )
    return host


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            raise InputError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected counts such as 2(x3),1")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks
