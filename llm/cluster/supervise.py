"""Starts a run again until it is finished: after faults that pass, ever later, and on the hosts that are left."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from llm.cluster.failure import BAD_HOST, BAD_INPUT, PASSING, STOPPED
from llm.cluster.signals import LAUNCHER_DIED, REASONS, SIGNALS
from llm.errors import CheckpointError, InputError, ReadError
from llm.files import open_own, read_json

POLL_SECONDS = 0.5
SAVE_SECONDS = 40.0  # ranks whose launcher has died save, and end within 30 s
# A launcher may wait for a host that is gone, or for a rank that hangs, long after another rank has failed.
DOOMED_SECONDS = 120.0
ASK_SECONDS = 10
LONGEST_WAIT = 300.0
PR_SET_CHILD_SUBREAPER = 36


class Folder(Protocol):
    """The run's folder (llm/train/run_folder.py)."""

    failed: Path
    stopped: Path
    checkpoints: Path
    restarts: Path

    def forget_the_end(self) -> None: ...


class End(NamedTuple):
    """How a start ended."""

    code: int
    reason: str
    host: str | None = None
    """Of the rank that failed first, as it calls itself."""
    stopped: bool = False


class Command:
    """The command, in a session of its own, which signals from the terminal do not reach; and waits between starts."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.signalled = words, 0
        self.process: subprocess.Popen[bytes] | None = None

    def listen(self) -> None:
        """Hand SIGNALS on from now on, and be the parent of every process below whose own parent ends."""
        for number in SIGNALS:
            signal.signal(number, self._hand_on)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def _hand_on(self, number: int, frame: object) -> None:
        self.signalled = number
        if self.process is not None:
            self.process.send_signal(number)

    def sleep(self, seconds: float) -> None:
        """Until a signal comes, at most."""
        deadline = time.monotonic() + seconds
        while not self.signalled and time.monotonic() < deadline:
            time.sleep(min(seconds, POLL_SECONDS))

    def run(self, environ: Mapping[str, str], failed: Callable[[], bool]) -> int:
        """The command's exit code, once nothing is left of what it has started.

        It is killed DOOMED_SECONDS after `failed`, a rank has. Raises InputError where it cannot be started.
        """
        try:
            self.process = subprocess.Popen(self.words, env=environ, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            raise InputError(f"the command cannot be started: {error}") from error
        if self.signalled:  # before there was a process
            self.process.send_signal(self.signalled)
        good, code = time.monotonic(), None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = self.process.wait(POLL_SECONDS)
            if not failed():
                good = time.monotonic()
            elif time.monotonic() - good > DOOMED_SECONDS:
                self.process.kill()
        _, left = psutil.wait_procs(psutil.Process().children(recursive=True), SAVE_SECONDS)
        for process in left:
            process.kill()
        psutil.wait_procs(left, ASK_SECONDS)
        return 128 - code if code < 0 else code


def ask(host: str) -> str | None:
    """The name that a host, or user@host, gives itself over ssh; None: it does not answer."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={ASK_SECONDS}", "--", host, "hostname"]
    with suppress(OSError, subprocess.SubprocessError):
        null = subprocess.DEVNULL
        found = subprocess.check_output(command, stdin=null, stderr=null, timeout=2 * ASK_SECONDS)
        return found.decode(errors="replace").strip()
    return None


class Hosts:
    """The hosts of a hostfile, and which of them a start can have."""

    def __init__(self, slots: Mapping[str, int], fits: Callable[[int], None], ask: Callable[[str], str | None] = ask):
        """slots: by host, as read_hostfile gives them. fits: raises InputError for a number of ranks that cannot be."""
        self.slots, self.fits, self.ask = dict(slots), fits, ask

    def left(
        self, bad: str | None, limit: float, sleep: Callable[[float], None], say: Callable[[str], None]
    ) -> list[str]:
        """Those that answer, now or within `limit` seconds, as many as the layout can use; there may be none.

        bad: how a host calls itself that is left out from now on.
        """
        waited = 0.0
        while True:
            with ThreadPoolExecutor(32) as pool:
                names = dict(zip(self.slots, pool.map(self.ask, self.slots), strict=True))
            for host in [host for host, name in names.items() if bad is not None and name == bad]:
                say(f"{host} is left out from now on: it cannot be used, or computes wrongly")
                del self.slots[host]
            silent = [host for host in self.slots if names[host] is None]
            if not silent or waited >= limit:
                break
            if not waited:
                say(f"waiting up to {limit:g} s for {', '.join(silent)}, which ssh does not reach")
            sleep(ASK_SECONDS)
            waited += ASK_SECONDS
        hosts = [host for host in self.slots if host not in silent]
        while hosts:
            with suppress(InputError):
                self.fits(sum(self.slots[host] for host in hosts))
                break
            hosts.pop()
        return hosts


class Supervisor:
    """Starts a command until its run is finished, is stopped, or cannot go on."""

    def __init__(
        self, command: Command, folder: Folder, hosts: Hosts | None, *, restarts: int, wait: float, host_wait: float
    ) -> None:
        """hosts: those of HOSTFILE, which launch/deepspeed.sh reads; host_wait: seconds for one that does not answer.

        restarts: in a row that bring no newer checkpoint, after which the run is given up. wait: seconds before one,
        twice as long before each that follows one without progress, up to LONGEST_WAIT.
        """
        self.command, self.folder, self.hosts = command, folder, hosts
        self.restarts, self.wait, self.host_wait = restarts, wait, host_wait

    def run(self, environ: Mapping[str, str]) -> int:
        """Start, and start again; returns the exit code of the last start, 128 + n where signal n ended it."""
        environ = {"MAX_RESTARTS": "0", **environ}  # else torchrun's own restarts would not be seen here
        best, idle, attempt = self.step(), 0, 0
        with tempfile.TemporaryDirectory(prefix="ingot-") as scratch:
            while True:
                attempt, began = attempt + 1, time.time()
                end, step = self._start(environ), self.step()
                idle = 0 if step > best or attempt == 1 else idle + 1  # restarts in a row that brought nothing
                best = max(best, step)
                self._write(began, end, step)
                what = f"start {attempt} ended at step {step} with exit code {end.code} ({end.reason})"
                if end.stopped or end.code in (0, BAD_INPUT):
                    return end.code
                if idle >= self.restarts:
                    self.say(f"given up: {what}: no progress between restarts, {self.restarts} in a row")
                    return end.code
                wait = min(self.wait * 2.0 ** min(idle, 32), LONGEST_WAIT)
                if self.hosts is not None:
                    wait = max(wait, SAVE_SECONDS)  # ranks on other hosts may hold the folder's lock until then
                self.say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {what}; start {attempt + 1} in {wait:g} s")
                self.command.sleep(wait)
                if self.hosts is not None and not self.command.signalled:
                    environ = self._choose(self.hosts, end, environ, Path(scratch) / f"hostfile-{attempt}")
                if self.command.signalled:
                    self.say("stopped before the next start; the same command goes on")
                    return STOPPED
                if not environ:
                    self.say("given up: no hosts are left that the layout can use")
                    return end.code

    def step(self) -> int:
        """That of the newest checkpoint, whole or not; 0: there is none."""
        steps = [path.name[len("step-") :] for path in self.folder.checkpoints.glob("step-*")]
        return max((int(step) for step in steps if step.isdecimal()), default=0)

    @staticmethod
    def say(text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)

    def _start(self, environ: Mapping[str, str]) -> End:
        failed, stopped = self.folder.failed, self.folder.stopped
        self.folder.forget_the_end()  # a start that ends early would not
        code = self.command.run(environ, failed.exists)
        asked = self.command.signalled > 0
        if stopped.exists():
            reason = str(_read(stopped).get("reason"))
            died = reason == REASONS[LAUNCHER_DIED] and not asked
            return End(PASSING if died else STOPPED, f"stopped by {reason}", stopped=not died)
        if code == 0:
            return End(0, "finished")
        found = _read(failed)
        if found.get("code") in (BAD_INPUT, BAD_HOST):  # else the launcher's code may tell more
            code = found["code"]
        host, reason = found.get("host"), str(found.get("reason", "no rank has said why")).partition("\n")[0]
        where = f"rank {found.get('rank')} on {host}: " if found else ""
        code = STOPPED if asked and code > 128 else code
        return End(code, where + reason, host, stopped=asked or code == STOPPED)

    def _write(self, began: float, end: End, step: int) -> None:
        line = {"start": began, "end": time.time(), **end._asdict(), "step": step}
        with suppress(OSError), open_own(self.folder.restarts, "a") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _choose(self, hosts: Hosts, end: End, environ: Mapping[str, str], path: Path) -> dict[str, str]:
        """The environment with a hostfile of the hosts that are left; nothing: there are none."""
        before = [*hosts.slots]
        bad = end.host if end.code == BAD_HOST else None
        left = hosts.left(bad, self.host_wait, self.command.sleep, self.say)
        path.write_text("".join(f"{host} slots={hosts.slots[host]}\n" for host in left), encoding="utf-8")
        if left != before:
            self.say(f"the next start has {len(left)} hosts of {len(before)}: {', '.join(left)}")
        environ = {**environ, "HOSTFILE": str(path)}
        if left[:1] != before[:1]:
            environ.pop("MASTER_ADDR", None)  # was that of a host which is left out: DeepSpeed finds the new one
        return environ if left else {}


def _read(path: Path) -> dict[str, Any]:
    """What a rank has written there; nothing where it died as it wrote."""
    with suppress(CheckpointError, ReadError):
        return read_json(path)
    return {}
