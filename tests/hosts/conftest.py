"""Two hosts on one machine: network namespaces joined by a cable, each with an address and sshd.

Needs root, iproute2, openssh-server and pdsh. Without them the tests are skipped with the reason;
with --require-cluster (`make test-cluster`) they fail instead. Nothing of the user's is touched:
keys, configuration and what is else ~/.deepspeed_env live in a temporary folder.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
INTERFACE = "ingot0"  # the same in both hosts: .deepspeed_env has one GLOO_SOCKET_IFNAME for all
SETTINGS = {"GLOO_SOCKET_IFNAME": INTERFACE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin:/sbin"])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-cluster", action="store_true", help="fail, not skip, where no hosts can be made")


class TwoHosts:
    """Two network namespaces; `run(0, command)` runs a command on the first."""

    def __init__(self, folder: Path) -> None:
        # Numbers of this process, so that two runs of the tests on one machine do not meet.
        number = os.getpid() % 60000
        self.folder = folder
        self.names = [f"ingot-{number}-{end}" for end in "ab"]
        network = f"10.{200 + number // 250 % 50}.{number % 250}"
        self.addresses = [f"{network}.1", f"{network}.2"]
        self.bin = folder / "bin"
        self.env_file = folder / "deepspeed_env"
        self.hostfile = folder / "hostfile"
        self.sshds: list[subprocess.Popen] = []

    def up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        peer = ["peer", "name", INTERFACE, "netns", second]
        ip("-n", first, "link", "add", INTERFACE, "type", "veth", *peer)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        self._write_files()
        for host in range(2):
            self._start_sshd(host)

    def _write_files(self) -> None:
        folder = self.folder
        self.bin.mkdir()
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in self.addresses))
        lines = [f"{name}={value}\n" for name, value in SETTINGS.items()]
        self.env_file.write_text("".join(lines))
        for key in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key]
            subprocess.run(command, check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        public = " ".join((folder / "host_key.pub").read_text().split()[:2])
        known = [f"{address} {public}\n" for address in self.addresses]
        (folder / "known_hosts").write_text("".join(known))
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nBatchMode yes\n"
            f"UserKnownHostsFile {folder}/known_hosts\nLogLevel ERROR\n"
        )
        # DeepSpeed's runner takes no options for ssh: the one that it finds on PATH has them.
        shim = self.bin / "ssh"
        shim.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        shim.chmod(0o755)

    def _start_sshd(self, host: int) -> None:
        config = self.folder / f"sshd_config_{host}"
        config.write_text(
            f"ListenAddress {self.addresses[host]}:22\nHostKey {self.folder}/host_key\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPidFile none\nStrictModes no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = shutil.which("sshd", path=SEARCH) or "sshd"
        log = (self.folder / f"sshd_{host}.log").open("w")
        command = [*self._on(host), sshd, "-D", "-e", "-f", config]
        self.sshds.append(subprocess.Popen(command, stdout=log, stderr=log))
        deadline = time.monotonic() + 30
        while "listening" not in Path(log.name).read_text():
            assert self.sshds[-1].poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, "sshd did not start listening"
            time.sleep(0.05)

    def _on(self, host: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[host]]

    def start(self, host: int, command: list, log: Path, **environ: str) -> subprocess.Popen:
        """Start `command` on host 0 or 1 in the checkout; its output goes to the file `log`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
        environ = {**inherited, **SETTINGS, "DS_ENV_FILE": str(self.env_file), **environ}
        environ["PATH"] = f"{self.bin}{os.pathsep}{SEARCH}"
        with log.open("w") as stream:
            return subprocess.Popen(
                [*self._on(host), *map(str, command)],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def run(self, host: int, command: list, **environ: str) -> str:
        """Run `command` to its end on one host; its output, once it has succeeded."""
        return self.run_all({host: command}, **environ)[host]

    def run_all(self, commands: dict[int, list], **environ: str) -> dict[int, str]:
        """Run a command on each host named, at the same time; their outputs."""
        logs = {host: self.folder / f"output_{host}" for host in commands}
        jobs = {h: self.start(h, command, logs[h], **environ) for h, command in commands.items()}
        for host, job in jobs.items():
            code = job.wait(timeout=300)
            output = "\n".join(path.read_text() for path in logs.values())
            assert code == 0, f"host {host} exits with {code}:\n{output}"
        return {host: path.read_text() for host, path in logs.items()}

    def plug(self, state: str) -> None:
        """Pull the cable out of the second host, `down`, or put it in again, `up`."""
        ip("-n", self.names[1], "link", "set", INTERFACE, state)

    def down(self) -> None:
        """End every process of the two namespaces, all of which were started here; remove them."""
        for name in self.names:
            for _ in range(50):
                found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
                pids = [pid for pid in map(int, found.stdout.split()) if pid != os.getpid()]
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if not pids:
                    break
                time.sleep(0.1)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for sshd in self.sshds:
            sshd.wait()


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def obstacle() -> str | None:
    """Why no hosts can be made here, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    missing = {tool for tool in TOOLS if shutil.which(tool, path=SEARCH) is None}
    if missing:
        packages = " ".join(sorted(TOOLS[tool] for tool in missing))
        return f"{', '.join(sorted(missing))} not found: apt-get install {packages}"
    name = f"ingot-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    ip("netns", "del", name)
    return None


@pytest.fixture(scope="session")
def two_hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts that reach each other by address and by ssh without a password."""
    reason = obstacle()
    if reason is not None:
        if request.config.getoption("--require-cluster", default=False):
            pytest.fail(reason)
        pytest.skip(reason)
    hosts = TwoHosts(tmp_path_factory.mktemp("two-hosts"))
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()


@pytest.fixture
def port() -> str:
    """A port that is likely free in every namespace, and not one that a test before used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
