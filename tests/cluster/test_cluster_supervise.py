"""When a command is started again, with made-up commands: exit codes, waits, progress, hosts, signals, leftovers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from chosen import slow_but
from llm.cluster.failure import record_failure
from llm.cluster.supervise import Command, Hosts, Supervisor, ask
from llm.errors import InputError
from llm.train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
LIMITS: Any = dict(restarts=3, wait=5, host_wait=25)
Start = Callable[[RunFolder], int]


@dataclass
class Script(Command):
    """A command that ends at once, each time as the next of `ends` says; nothing waits."""

    ends: Iterator[Start | int]
    folder: RunFolder
    signal_in_sleep: int = 0
    waits: list[float] = field(default_factory=list)
    environs: list[dict[str, str]] = field(default_factory=list)
    signalled: int = 0

    def run(self, environ: Any, failed: Callable[[], bool]) -> int:
        self.environs.append(dict(environ))
        self.hostfiles = [*getattr(self, "hostfiles", []), Path(environ.get("HOSTFILE", os.devnull)).read_text()]
        end = next(self.ends)
        return end if isinstance(end, int) else end(self.folder)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.signalled = self.signal_in_sleep


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path, "run")
    made.checkpoints.mkdir(parents=True)
    return made


def trains_to(step: int, code: int = 1) -> Start:
    def start(folder: RunFolder) -> int:
        (folder.checkpoints / f"step-{step:08}").mkdir(exist_ok=True)
        return code

    return start


def fails(code: int, exits_with: int = 1, host: str | None = None, rank: int = 3) -> Start:
    def start(folder: RunFolder) -> int:
        record_failure(folder.failed, code, "the reason\nmore", rank=rank, host=host)
        return exits_with

    return start


def stops(reason: str, exits_with: int) -> Start:
    def start(folder: RunFolder) -> int:
        folder.stopped.write_text(json.dumps({"reason": reason, "step": 7, "starts": [None]}))
        return exits_with

    return start


def run(folder: RunFolder, *ends: Start | int, hosts: Hosts | None = None, **fields: Any) -> tuple[int, Script]:
    script = Script(iter(ends), folder, **fields)
    return Supervisor(script, folder, hosts, **LIMITS).run({"PATH": "/bin"}), script


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.restarts.read_text().splitlines()]


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        ([0], 0, 1),
        ([2], 2, 1),
        ([75], 75, 1),
        ([1, 0], 0, 2),
        ([139, 247, 0], 0, 3),
        ([fails(2)], 2, 1),
        ([fails(69), 0], 0, 2),
        ([fails(69), fails(69), fails(69), fails(69)], 69, 4),
        ([fails(1, exits_with=69), 0], 0, 2),
        ([fails(1), 0], 0, 2),
        ([stops("SIGTERM", 75)], 75, 1),
        ([stops("SIGTERM", 0)], 75, 1),  # torchrun
        ([stops("the death of its launcher", 75), 0], 0, 2),
    ],
)
def test_what_is_started_again(ends: list[Start | int], code: int, starts: int, folder: RunFolder) -> None:
    found, script = run(folder, *ends)
    assert (found, len(script.environs)) == (code, starts)
    assert len(lines(folder)) == starts
    assert script.environs[0] == {"PATH": "/bin", "MAX_RESTARTS": "0"}


def test_old_records_say_nothing_of_a_start(folder: RunFolder) -> None:
    stops("SIGTERM", 0)(folder)
    fails(2)(folder)
    assert run(folder, 1, 0)[0] == 0


def test_a_torn_record_is_none(folder: RunFolder) -> None:
    def start(folder: RunFolder) -> int:
        folder.failed.write_text('{"code": 2, "rea')
        return 1

    assert run(folder, start, 0)[0] == 0
    assert lines(folder)[0]["reason"] == "no rank has said why"


def test_waits_double_up_to_a_limit_and_progress_begins_anew(folder: RunFolder, capsys: Any) -> None:
    code, script = run(folder, trains_to(10), 1, 1, trains_to(20), 1, 1, trains_to(20), 0)
    assert code == 1
    assert script.waits == [5, 10, 20, 5, 10, 20]
    assert "given up: start 7 ended at step 20 with exit code 1" in (told := capsys.readouterr().err)
    assert "no progress between restarts, 3 in a row" in told
    assert [line["step"] for line in lines(folder)] == [10] * 3 + [20] * 4


def test_a_run_that_never_begins_is_given_up(folder: RunFolder) -> None:
    code, script = run(folder, *[1] * 9)
    assert (code, script.waits) == (1, [5, 10, 20])


def test_no_restart_is_a_limit_too(folder: RunFolder) -> None:
    script = Script(iter([trains_to(5), 0]), folder)
    assert Supervisor(script, folder, None, restarts=0, wait=0, host_wait=0).run({}) == 1


def test_the_longest_wait(folder: RunFolder) -> None:
    script = Script(iter([1] * 1100 + [0]), folder)
    assert Supervisor(script, folder, None, restarts=10**6, wait=50, host_wait=0).run({}) == 0
    assert script.waits == [50, 100, 200] + [300] * 1097


def test_older_checkpoints_and_strangers_are_no_progress(folder: RunFolder) -> None:
    trains_to(50)(folder)
    (folder.checkpoints / "step-00000090.tmp").mkdir()
    (folder.checkpoints / "step-00000080.aside-1").mkdir()

    def goes_back(folder: RunFolder) -> int:
        (folder.checkpoints / "step-00000050").rename(folder.checkpoints / "step-00000050.aside-1")
        return trains_to(45)(folder)

    code, script = run(folder, trains_to(40), goes_back, trains_to(48), trains_to(50), 0)
    assert (code, len(script.environs)) == (1, 4)


def test_each_start_is_a_line(folder: RunFolder, capsys: Any) -> None:
    run(folder, fails(1, exits_with=9, host="node-3"), trains_to(5, code=0))
    first, last = lines(folder)
    assert first | {"start": 0, "end": 0} == {
        "start": 0, "end": 0, "code": 9, "reason": "rank 3 on node-3: the reason", "host": "node-3", "stopped": False,
        "step": 0,
    }  # fmt: skip
    assert (last["code"], last["reason"], last["step"]) == (0, "finished", 5)
    assert first["start"] <= first["end"] <= last["start"] <= last["end"] <= time.time()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "start 1 ended at step 0 with exit code 9 (rank 3 on node-3: the reason)" in told[0]


def test_nothing_is_written_where_the_start_has_left_no_folder(tmp_path: Path) -> None:
    assert run(RunFolder(tmp_path, "refused"), 2)[0] == 2
    assert not (tmp_path / "refused").exists()


def test_a_disk_that_takes_no_line_ends_no_supervisor(folder: RunFolder) -> None:
    folder.restarts.symlink_to("/dev/full")
    assert run(folder, 1, 0)[0] == 0


def test_a_signal_between_starts_is_a_stop(folder: RunFolder) -> None:
    code, script = run(folder, 1, 0, signal_in_sleep=15)
    assert (code, len(script.environs)) == (75, 1)


@pytest.mark.parametrize(("ends", "code"), [(143, 75), (1, 1), (0, 0), (stops("the death of its launcher", 1), 75)])
def test_after_a_signal_nothing_is_started_again(ends: Start | int, code: int, folder: RunFolder) -> None:
    found, script = run(folder, ends, signalled=15)
    assert (found, len(script.environs)) == (code, 1)


class Cluster:
    """Four hosts of two slots; those in `silent` answer after so many questions."""

    def __init__(self, world_sizes: set[int], **silent: int) -> None:
        self.silent, self.world_sizes = silent, world_sizes
        self.hosts = Hosts(dict.fromkeys(("a", "me@b", "c", "d"), 2), self.fits, self.ask)

    def fits(self, world_size: int) -> None:
        if world_size not in self.world_sizes:
            raise InputError("does not fit")

    def ask(self, host: str) -> str | None:
        name = host.rpartition("@")[2]
        self.silent[name] = self.silent.get(name, 0) - 1
        return None if self.silent[name] >= 0 else f"node-{name}"


def hostfile(*hosts: str) -> str:
    return "".join(f"{host} slots=2\n" for host in hosts)


ANY = {2, 4, 6, 8}


@pytest.mark.parametrize(
    ("cluster", "ends", "expected", "code"),
    [
        (Cluster(ANY), [1, 0], [hostfile("a", "me@b", "c", "d")], 0),
        (Cluster(ANY, b=2), [1, 0], [hostfile("a", "me@b", "c", "d")], 0),
        (Cluster(ANY, b=99), [1, 0], [hostfile("a", "c", "d")], 0),
        (Cluster({4, 8}, b=99), [1, 0], [hostfile("a", "c")], 0),
        (Cluster({8}, b=99), [1, 0], [], 1),
        (Cluster(ANY, b=5), [1, 1, 0], [hostfile("a", "c", "d"), hostfile("a", "me@b", "c", "d")], 0),
        (Cluster(ANY), [fails(69, host="node-b"), 1, 0], [hostfile("a", "c", "d")] * 2, 0),
        (Cluster(ANY), [fails(1, host="node-b"), 0], [hostfile("a", "me@b", "c", "d")], 0),
        (Cluster(ANY), [fails(69, host="elsewhere"), 0], [hostfile("a", "me@b", "c", "d")], 0),
        (Cluster({8}), [fails(69, host="node-a")], [], 69),
    ],
)
def test_the_hosts_that_are_left(
    cluster: Cluster, ends: list[Start | int], expected: list[str], code: int, folder: RunFolder
) -> None:
    found, script = run(folder, *ends, hosts=cluster.hosts)
    assert (found, script.hostfiles[1:]) == (code, expected)
    assert script.waits[0] == 40, "ranks on other hosts have time to end"


def test_the_address_of_a_host_that_is_left_out_goes(folder: RunFolder) -> None:
    for silent, kept in (("b", True), ("a", False)):
        script = Script(iter([1, 0]), folder)
        Supervisor(script, folder, Cluster(ANY, **{silent: 99}).hosts, **LIMITS).run({"MASTER_ADDR": "10.0.0.1"})
        assert ("MASTER_ADDR" in script.environs[1]) == kept


def test_hosts_are_asked_over_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho "$@" >>"$0.log"\n[ "$6" = good ] && echo node-7\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert (ask("good"), ask("me@bad")) == ("node-7", None)
    asked = (tmp_path / "ssh.log").read_text().splitlines()
    assert asked[1] == "-o BatchMode=yes -o ConnectTimeout=10 -- me@bad hostname"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert ask("good") is None


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
TRAPS = 'for name in TERM INT USR1; do trap "sleep 0.5; echo $name; exit 75" $name; done; echo ready'


@pytest.mark.parametrize("number", slow_but([signal.SIGUSR1], SIGNALS))
def test_a_signal_is_handed_on_and_waited_for(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "torchrun.sh"
    script.write_text(f"#!/usr/bin/env bash\n{TRAPS}\nwhile :; do sleep 0.1; done\n")
    script.chmod(0o755)
    command = [sys.executable, str(ROOT / "launch/supervise.py"), "--", str(script), "--name=x"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.stdout.readline() == f"{number.name[3:]}\n"
            assert process.wait(timeout=30) == 75
        finally:
            process.kill()


# A process in a session of its own, as a rank of torchrun's is, that ignores what can be ignored.
LEAVES = r"""
setsid sh -c "trap '' TERM INT HUP; echo \$\$ >pid; exec sleep 600" &
until [ -s pid ]; do sleep 0.05; done
exit 3
"""
# In a process of its own, for it ends what is below that. Arguments: seconds until a rank fails, the command.
ONE_START = """
import os, sys, time
import llm.cluster.supervise as supervise
supervise.SAVE_SECONDS = supervise.DOOMED_SECONDS = 0.5
command, fails = supervise.Command(sys.argv[2:]), time.monotonic() + float(sys.argv[1])
command.listen()
sys.exit(command.run(os.environ, lambda: time.monotonic() > fails))
"""


def one_start(folder: Path, seconds: float, *words: str) -> int:
    command = [sys.executable, "-c", ONE_START, str(seconds), *words]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60).returncode


def test_what_a_start_leaves_is_ended_and_nothing_else(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            assert one_start(tmp_path, 100, "bash", "-c", LEAVES) == 3
            assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
            assert other.poll() is None
        finally:
            other.kill()


def test_a_command_that_outlives_a_failed_rank_is_killed(tmp_path: Path) -> None:
    assert one_start(tmp_path, 0.5, "sleep", "50") == 137


def test_a_command_has_a_session_of_its_own(tmp_path: Path) -> None:
    """So Ctrl-C reaches the supervisor alone, which hands it on once."""
    assert one_start(tmp_path, 100, sys.executable, "-c", "import os; assert os.getsid(0) == os.getpid()") == 0


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be started"):
        Command([str(tmp_path / "torchrun.sh")]).run({}, lambda: False)


WRONG = [
    (["--", "bash", "my.sh"], "expected one of pretrain.py"),
    (["--", "launch/torchrun.sh"], "no config is given to launch/torchrun.sh"),
    (["--", "launch/torchrun.sh", "--optim.lrr=1"], "optim.lrr"),
    (["launch/torchrun.sh", "--name=x"], "is no option"),
    (["--wait=1"], "no command is given"),
    (["--wait=soon", "--", "launch/torchrun.sh", "--name=x"], "--wait"),
    (["--wait=-1", "--", "launch/torchrun.sh", "--name=x"], "below 0"),
    (["--waits=1", "--", "launch/torchrun.sh", "--name=x"], "--waits"),
]


@pytest.mark.parametrize("wrong", slow_but(WRONG[:1], WRONG), ids=lambda wrong: wrong[1])
def test_a_wrong_command_is_refused(wrong: tuple[list[str], str], tmp_path: Path) -> None:
    words, told = wrong
    command = [sys.executable, str(ROOT / "launch/supervise.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert told in done.stderr
    assert not [*tmp_path.iterdir()]
