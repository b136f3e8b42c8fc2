"""Ranks end themselves when their launcher dies; a run that trains saves first.

`kill -9` of `deepspeed` leaves its child `deepspeed.launcher.launch` and all ranks running, with nobody to stop them
and the GPUs taken. So each rank watches the processes that started it. A thread polls: it is visible, needs no signal,
and works where the launcher is not the direct parent, which PR_SET_PDEATHSIG does not. A rank that hangs while it holds
the interpreter's lock cannot poll; the other ranks end, and then `deepspeed.launcher.launch` ends it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llm.cluster.signals import LAUNCHER_DIED, Stop

POLL_SECONDS = 1.0
SAVE_SECONDS = 30.0
PROC = Path("/proc")
SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "ash"}
SCRIPTS = ("launch/deepspeed.sh", "launch/torchrun.sh", "launch/supervise.py")
PROGRAMS = {
    *("deepspeed", "deepspeed.pt", "torchrun", "torchrun.exe"),
    *("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "orted", "prterun", "prte", "prted"),
    *("hydra_pmi_proxy", "hydra_bstrap_proxy", "srun", "slurmstepd"),
}
MODULES = {
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torch.distributed.run", "torch.distributed.launch"),
}
# What launchers run on other hosts through ssh. Users do not type these, so an ssh session whose command holds one
# belongs to the job, while `ssh host 'nohup deepspeed ... &'` may end before it.
REMOTE = ("deepspeed.launcher.launch", "orted", "prted", "hydra_pmi_proxy", "hydra_bstrap_proxy")


@dataclass(frozen=True)
class Process:
    """A process as /proc shows it; `start` (ticks since boot) tells it from a reuse of its pid."""

    pid: int
    parent: int
    start: int
    state: str
    argv: tuple[str, ...]


def read_process(pid: int, proc: Path = PROC) -> Process | None:
    """The process `pid`, or None when there is none. psutil would split a title, such as `sshd: me@pts/0`, in two."""
    try:
        stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        argv = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may hold anything.
    fields = stat[stat.rindex(")") + 2 :].split()
    words = argv.decode(errors="replace").rstrip("\0").split("\0")
    return Process(pid, int(fields[1]), int(fields[19]), fields[0], tuple(words))


def _program(process: Process) -> str:
    return process.argv[0].split("/")[-1]


def is_launcher(argv: Sequence[str]) -> bool:
    """Whether a command line is that of deepspeed, torchrun, one of SCRIPTS, an MPI launcher or a Slurm step."""
    # slurmstepd and sshd write a title over their command line: "slurmstepd: [1234.0]".
    program = argv[0].split(":")[0].split("/")[-1]
    if program in PROGRAMS or (program in SHELLS and argv[1:] and argv[1].endswith(SCRIPTS)):
        return True
    if not program.startswith(("python", "pypy")):
        return False
    for word, following in pairwise([*argv[1:], ""]):
        if word == "-m":
            return following in MODULES
        if not word.startswith("-"):
            return word.split("/")[-1] in PROGRAMS or word.endswith(SCRIPTS)
    return False


def launcher_chain(pid: int, proc: Path = PROC) -> list[Process]:
    """The ancestors of `pid` up to the launcher that the user started, nearest first.

    Climbs while the ancestor is a launcher, or a shell between two of them; over ssh, up to the session (sshd) that
    runs the launcher's part on this host. Empty: no launcher started it.
    """
    chain: list[Process] = []
    shells: list[Process] = []
    child = read_process(pid, proc)
    while child is not None and (ancestor := read_process(child.parent, proc)) is not None:
        remote = any(name in word for word in child.argv for name in REMOTE)
        session = remote and ancestor.argv[0].startswith(("sshd:", "sshd-session:"))
        if session or is_launcher(ancestor.argv):
            chain += [*shells, ancestor]
            shells = []
        elif _program(ancestor) in SHELLS:
            shells.append(ancestor)
        else:
            break
        child = ancestor
    return chain


def orphaned(chain: Sequence[Process], proc: Path = PROC) -> bool:
    """Whether `deepspeed`, above its launcher on this host, had died before `chain` was read."""
    if not chain or "deepspeed.launcher.launch" not in chain[-1].argv:
        return False
    parent = read_process(chain[-1].parent, proc)
    return parent is not None and (parent.pid == 1 or _program(parent) == "systemd")


def lost(chain: Sequence[Process], proc: Path = PROC) -> Process | None:
    """The first of `chain` that is gone, is a zombie, or whose pid now names another process."""
    for process in chain:
        now = read_process(process.pid, proc)
        if now is None or now.start != process.start or now.state in "ZX":
            return process
    return None


def watch_launcher(stop: Stop | None = None) -> threading.Event:
    """From now until the event is set: end this process, with exit code 1, when its launcher has died.

    With `stop`, ask for the stop, and end the process only if it is still there SAVE_SECONDS later.
    Call it first in the launch script: a launcher that dies before this call is noticed only when it is DeepSpeed's.
    Plain `python` starts no thread. Without /proc (macOS) the parent is watched, whatever it is.
    """
    has_proc = PROC.joinpath("self/stat").exists()
    chain = launcher_chain(os.getpid()) if has_proc else []
    parent, done = os.getppid(), threading.Event()
    if orphaned(chain):
        _end("the launcher that started this process")

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            process, who = lost(chain), f"process {parent}, which started this one,"
            if process is not None:
                who = f"the launcher (process {process.pid}: {' '.join(process.argv)[:80]})"
            elif os.getppid() == parent:
                continue
            if stop is not None:
                stop.ask(LAUNCHER_DIED)
                done.wait(SAVE_SECONDS)
            _end(who)

    if chain or not has_proc:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
    return done


def _end(who: str) -> None:
    with contextlib.suppress(OSError):  # whoever read stderr may have died with the launcher
        os.write(2, f"error: {who} has died; process {os.getpid()} ends too\n".encode())
    os._exit(1)
