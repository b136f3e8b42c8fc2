"""Finds out which rank this process is. No other module reads rank variables.

`deepspeed`, `torchrun`, `mpirun` (Open MPI, MPICH, Intel MPI, MVAPICH2), Cray's `mpiexec`, `flux run`, `srun`,
Kubeflow, AzureML and plain `python` start the same script; `discover_ranks` turns the variables that each sets into one
`Ranks`.
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

from llm.errors import BadHost, InputError, RendezvousError, require

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"
# Launcher -> its variables of rank, rank on this host, processes, processes on this host; `|`: the first that is set.
# The order counts: Flux and PALS set PMI_RANK too. tests/cluster/test_cluster_launchers.py names the sources.
LAUNCHERS = {
    "openmpi": [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")],
    "mvapich2": [f"MV2_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")],
    "flux": ["FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID", "FLUX_JOB_SIZE", "LOCAL_WORLD_SIZE"],
    "pals": ["PALS_RANKID", "PALS_LOCAL_RANKID", "PMI_SIZE|WORLD_SIZE", "PALS_LOCAL_SIZE|PMI_LOCAL_SIZE"],
    "mpich": ["PMI_RANK", "MPI_LOCALRANKID|PMI_LOCAL_RANK", "PMI_SIZE", "MPI_LOCALNRANKS|PMI_LOCAL_SIZE"],
}
# Ranks of launchers that are not known here (PMIx, IBM's jsrun, SGI's MPT, Cray's ALPS): none may train alone.
UNKNOWN = ("PMIX_RANK", "JSM_NAMESPACE_RANK", "MPT_LRANK", "ALPS_APP_PE")
SLURM_LAST_STEP = 0xFFFFFFF0  # SLURM_MAX_NORMAL_STEP_ID; above: batch script, salloc's shell, what is not srun's


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
    """deepspeed, torchrun, slurm, kubeflow, one of LAUNCHERS, environment (set by hand), or python (alone)."""

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
        require(
            re.fullmatch(r"(?!-)[\w.:%-]+", self.master_addr, re.ASCII) is not None,
            f"MASTER_ADDR is {self.master_addr!r}; expected a host name or an IP address without brackets",
        )


def discover_ranks(environ: Mapping[str, str]) -> Ranks:
    """The place of this process, from the variables that its launcher set in `environ`.

    The most explicit wins: RANK and its companions (`torchrun` under `srun` has both), then those of LAUNCHERS, then
    those of an `srun` step. None of these: one process, with a free port.

    Raises InputError, which names the variable and the remedy, when a set of variables is incomplete, contradicts
    itself or is not made of integers, and when they show a job of several processes but not which of them this is.
    """
    # `deepspeed --launcher mpich` gives WORLD_SIZE to MPICH's launcher, which sets the rest.
    launcher = _launcher(environ)
    alone = environ.get("WORLD_SIZE", "1") == "1" or launcher is not None
    if "RANK" in environ or "LOCAL_RANK" in environ or not alone:
        return _from_rank_variables(environ)
    if launcher == "slurm":
        return _from_slurm(environ)
    if launcher is not None:
        return _from_launcher(environ, launcher)
    # Kubeflow's Trainer sets PET_*, which only torchrun reads. In a Slurm job, PMIX_RANK may be that of salloc's shell.
    pods = [f"{name}={environ[name]}" for name in ("PET_NNODES", "PET_NPROC_PER_NODE") if environ.get(name, "1") != "1"]
    strange = [f"{name}={environ[name]}" for name in UNKNOWN if name in environ and "SLURM_JOB_ID" not in environ]
    require(
        not pods + strange,
        f"{', '.join(pods + strange)} shows a job of several processes, but not which of them this is; start with "
        "launch/torchrun.sh, or set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
    )
    return Ranks(0, 0, 1, 1, LOOPBACK, free_port(), "python")


def export(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Set in `environ` (os.environ) what torch and DeepSpeed read: once, by the launch script.

    DeepSpeed looks for MPI unless all of these are set. The folder of the Python in use comes first in PATH, because
    DeepSpeed compiles an operator with the `ninja` that pip put there, and neither ssh nor an environment that was not
    activated has it; another version of ninja would compile it anew. LOCAL_SIZE goes: where it equals the world size,
    DeepSpeed leaves 66 MB per rank in /dev/shm for an all-reduce that training does not use. What train.compile keeps
    goes to the user's own folder: torch would read it back, code included, from one in /tmp that anyone can make first.
    """
    for name in ("rank", "local_rank", "world_size", "local_world_size", "master_addr", "master_port"):
        environ[name.upper()] = str(getattr(ranks, name))
    environ.pop("LOCAL_SIZE", None)
    environ.setdefault("TORCH_EXTENSIONS_DIR", str(operator_folder()))
    environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache/ingot/inductor"))
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
    at, when the ranks do not all meet within that time, and at once when rank 0 cannot listen on its port.
    """
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    host = f"[{ranks.master_addr}]" if ":" in ranks.master_addr else ranks.master_addr  # an IPv6 address in a URL
    if ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else torchrun's agent listens
        _check_port(ranks.master_port)
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


def _check_port(port: int) -> None:
    # Bound but not listening: a rank that comes early is refused, and tries again.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a closed run's port is free
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RendezvousError(
                f"rank 0 cannot listen on port {port} of this host ({error.strerror}); choose another: MASTER_PORT=N "
                "before launch/deepspeed.sh, launch/torchrun.sh or srun, --master_port N of deepspeed and torchrun"
            ) from error


def choose_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU of a machine without one.

    A rank takes the GPU of its local number, or the only one it sees if Slurm, Flux or PALS has given each task its
    own. Raises BadHost when there are fewer GPUs than ranks.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and ranks.launcher in ("slurm", "flux", "pals"):
        return torch.device("cuda", 0)
    if ranks.local_world_size > count:  # not local_rank: every rank of the host is refused, before any waits
        raise BadHost(f"this host has {count} GPUs for {ranks.local_world_size} ranks; start at most {count} here")
    return torch.device("cuda", ranks.local_rank)


def strip_local_rank(argv: Sequence[str]) -> list[str]:
    """`argv` without the `--local_rank=N` or `--local-rank=N` that some launchers add."""
    return [word for word in argv if not re.fullmatch(r"--local[_-]rank=\d+", word)]


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _launcher(environ: Mapping[str, str]) -> str | None:
    """The one of LAUNCHERS, or `slurm`, whose variables are set."""
    for launcher, names in LAUNCHERS.items():
        own = [name for name in "|".join(names).split("|") if name.startswith(names[0][:4]) and name in environ]
        # `srun --mpi=pmi2` and `--mpi=cray_shasta` set PMI_* and PALS_*; MPICH's own launcher sets MPI_LOCALRANKID.
        of_srun = launcher in ("pals", "mpich") and "MPI_LOCALRANKID" not in environ and _in_srun_step(environ)
        if own and not of_srun:
            return launcher
    return "slurm" if _in_srun_step(environ) else None


def _integer(environ: Mapping[str, str], names: str) -> int:
    """The number in the first variable of `names`, such as "PMI_SIZE|WORLD_SIZE", that is set."""
    name = next((name for name in names.split("|") if name in environ), None)
    if name is None:
        raise InputError(
            f"{names.replace('|', ' or ')} is not set, but other rank variables are: set it for every process "
            "(mpiexec ... env NAME=N python ...), start with deepspeed, torchrun, mpirun or srun, or unset the others "
            "for a single process"
        )
    text = environ[name]
    require(re.fullmatch(r"[0-9]{1,10}", text) is not None, f"{name} is {text!r}; expected a whole number")
    return int(text)


def _master(environ: Mapping[str, str]) -> tuple[str, int]:
    require(bool(environ.get("MASTER_ADDR")), "MASTER_ADDR is not set; expected the host of rank 0")
    return environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")


def _from_rank_variables(environ: Mapping[str, str]) -> Ranks:
    local = [name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ]
    pod = "KUBERNETES_SERVICE_HOST" in environ or "PET_NNODES" in environ
    if pod and not local and "LOCAL_RANK" not in environ:
        # A PyTorchJob: RANK is the number of the pod, and WORLD_SIZE the number of pods times nprocPerNode.
        count = environ.get("PET_NPROC_PER_NODE", "")
        require(
            count == "1" or not count.isdecimal(),
            f"PET_NPROC_PER_NODE is {count}, and RANK is the number of this pod; start with launch/torchrun.sh",
        )
        return Ranks(_integer(environ, "RANK"), 0, _integer(environ, "WORLD_SIZE"), 1, *_master(environ), "kubeflow")
    require(
        bool(local) or "NODE_RANK" not in environ,
        "LOCAL_WORLD_SIZE is not set, but NODE_RANK is: set it to the processes on this host (AzureML: "
        "environment_variables of the job, to process_count_per_instance)",
    )
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


def _from_launcher(environ: Mapping[str, str], launcher: str) -> Ranks:
    if launcher == "flux" and "LOCAL_WORLD_SIZE" not in environ:
        size, nodes = _integer(environ, "FLUX_JOB_SIZE"), _integer(environ, "FLUX_JOB_NNODES")
        require(
            nodes > 0 and size % nodes == 0,
            f"FLUX_JOB_SIZE is {size} and FLUX_JOB_NNODES {nodes}; start as many tasks on every node: flux run "
            "--nodes=N --tasks-per-node=M",
        )
        environ = {**environ, "LOCAL_WORLD_SIZE": str(size // nodes)}
    rank, local_rank, world_size, local_world_size = (_integer(environ, names) for names in LAUNCHERS[launcher])
    # AzureML's MPI jobs have the host and a port of rank 0 there, "10.0.0.4:6000", if they have several hosts.
    host, _, port = environ.get("AZ_BATCH_MASTER_NODE", "").partition(":")
    known = {"MASTER_ADDR": host, "MASTER_PORT": port} if host else {}
    known |= {name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ}
    if len(known) == 2:
        address, number = _master(known)
    else:
        address, number = _agree_through_mpi(rank, world_size, one_host=local_world_size == world_size)
    return Ranks(rank, local_rank, world_size, local_world_size, address, number, launcher)


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
            "the launcher started this process without MASTER_ADDR and MASTER_PORT, and mpi4py, through which the "
            f"ranks would agree on them, does not work here ({str(error).partition(chr(10))[0]}); install mpi4py and "
            "an MPI library (Debian: apt-get install openmpi-bin), or set both variables for every process (Open MPI: "
            "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500)"
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
        f"the launcher started {world_size} processes but mpi4py's MPI library sees {found}; use the mpirun of the "
        "library that mpi4py loads, or set MASTER_ADDR and MASTER_PORT",
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
    # A batch script and a shell in an allocation have SLURM_NTASKS too, and SLURM_PROCID=0; only srun sets the step's.
    # The shell of `salloc` may be a step of its own (LaunchParameters=use_interactive_step): what is typed there is
    # one process, and `srun` typed there sets the number of its own step.
    step = environ.get("SLURM_STEP_ID", "")
    if re.fullmatch(r"[0-9]{1,10}", step) and int(step) >= SLURM_LAST_STEP:
        return False
    return "SLURM_STEP_NUM_TASKS" in environ or environ.get("SLURM_PROCID", "0") != "0"


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    node = _integer(environ, "SLURM_NODEID")
    here, total = _count_tasks(per_node, node)
    require(
        here > 0 and total == world_size,
        f"SLURM_NODEID is {node} and SLURM_STEP_NUM_TASKS {world_size}, which do not fit SLURM_STEP_TASKS_PER_NODE = "
        f"{per_node}",
    )
    # Below Linux's ephemeral ports; two steps of one job get two ports.
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    port = _integer(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 15000 + (31 * job + step) % 15000
    rank, local_rank = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_LOCALID")
    address = environ.get("MASTER_ADDR") or _first_host(nodes)
    return Ranks(rank, local_rank, world_size, here, address, port, "slurm")


def _first_host(nodes: str) -> str:
    """`node[07-09,12],login` -> `node07`. The package that reads such lists, python-hostlist, is under the GPL."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")
    require(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", host) is not None,
        f"SLURM_JOB_NODELIST is {nodes!r}; expected a list of hosts such as node[01-04]",
    )
    return host


def _count_tasks(text: str, node: int) -> tuple[int, int]:
    """The tasks on the node of this number, 0 if there is none, and on all: `2(x3),1` and 3 -> 1, 7."""
    nodes = here = total = 0
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise InputError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected counts such as 2(x3),1")
        tasks, times = int(match[1]), int(match[2] or 1)
        here = tasks if nodes <= node < nodes + times else here
        nodes, total = nodes + times, total + tasks * times
    return here, total
