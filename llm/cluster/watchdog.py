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
from itertools import pairwise

import psutil

from llm.cluster.signals import LAUNCHER_DIED, Stop

POLL_SECONDS = 1.0
SAVE_SECONDS = 30.0
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


def _argv(process: psutil.Process) -> list[str]:
    """Its command line, [""] where that cannot be read. A title, such as `sshd: me@pts/0`, is split at its spaces."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline() or [""]
    return [""]


def _parent(process: psutil.Process) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        return process.parent()
    return None


def _program(argv: Sequence[str]) -> str:
    return argv[0].split("/")[-1]


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


def launcher_chain(process: psutil.Process) -> list[psutil.Process]:
    """The ancestors of `process` up to the launcher that the user started, nearest first.

    Climbs while the ancestor is a launcher, or a shell between two of them; over ssh, up to the session (sshd) that
    runs the launcher's part on this host. Empty: no launcher started it.
    """
    chain: list[psutil.Process] = []
    shells: list[psutil.Process] = []
    child, ancestor = _argv(process), _parent(process)
    while ancestor is not None:
        argv = _argv(ancestor)
        remote = any(name in word for word in child for name in REMOTE)
        session = remote and argv[0].startswith(("sshd:", "sshd-session:"))
        if session or is_launcher(argv):
            chain += [*shells, ancestor]
            shells = []
        elif _program(argv) in SHELLS:
            shells.append(ancestor)
        else:
            break
        child, ancestor = argv, _parent(ancestor)
    return chain


def orphaned(chain: Sequence[psutil.Process]) -> bool:
    """Whether `deepspeed`, above its launcher on this host, had died before `chain` was read."""
    if not chain or "deepspeed.launcher.launch" not in _argv(chain[-1]):
        return False
    parent = _parent(chain[-1])
    return parent is not None and (parent.pid == 1 or _program(_argv(parent)) == "systemd")


def lost(chain: Sequence[psutil.Process]) -> psutil.Process | None:
    """The first of `chain` that is gone, is a zombie, or whose pid now names another process."""
    for process in chain:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return process
        except psutil.NoSuchProcess:
            return process
    return None


def watch_launcher(stop: Stop | None = None) -> threading.Event:
    """From now until the event is set: end this process, with exit code 1, when its launcher has died.

    With `stop`, ask for the stop, and end the process only if it is still there SAVE_SECONDS later.
    Call it first in the launch script: a launcher that dies before this call is noticed only when it is DeepSpeed's.
    Plain `python` starts no thread.
    """
    chain, done = launcher_chain(psutil.Process()), threading.Event()
    if orphaned(chain):
        _end("the launcher that started this process")
    names = {process.pid: " ".join(_argv(process))[:80] for process in chain}

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            process = lost(chain)
            if process is None:
                continue
            if stop is not None:
                stop.ask(LAUNCHER_DIED)
                done.wait(SAVE_SECONDS)
            _end(f"the launcher (process {process.pid}: {names[process.pid]})")

    if chain:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
    return done


def _end(who: str) -> None:
    with contextlib.suppress(OSError):  # whoever read stderr may have died with the launcher
        os.write(2, f"error: {who} has died; process {os.getpid()} ends too\n".encode())
    os._exit(1)
