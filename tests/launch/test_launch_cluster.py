"""The files for clusters pass their linters, and do what they say with stand-ins for srun and torchrun."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "launch/cluster"
BIN = Path(sys.executable).parent


def lint(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "launch").glob("*.sh")), CLUSTER / "slurm.sbatch"], ids=lambda p: p.name
)
def test_shell_scripts(path):
    lint(BIN / "shellcheck", "--external-sources", f"--source-path={ROOT}", path)


def test_dockerfile():
    lint(BIN / "hadolint", CLUSTER / "Dockerfile")


def manifests() -> list[dict]:
    return list(yaml.safe_load_all((CLUSTER / "k8s.yaml").read_text()))


@pytest.mark.parametrize("version", ["1.25", kubernetes_validate.latest_version()])
def test_kubernetes_schema(version):
    for document in manifests():
        kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_field_is_seen():
    job = manifests()[1]
    job["spec"]["completion"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="completion"):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def variables() -> dict[str, str]:
    """The environment that k8s.yaml gives the container of its second pod."""
    entries = manifests()[1]["spec"]["template"]["spec"]["containers"][0]["env"]
    return {entry["name"]: entry.get("value", "1") for entry in entries}


def test_pods_find_each_other():
    service, job = manifests()
    pod = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert variables()["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables()["NNODES"])
    assert (ROOT / pod["spec"]["containers"][0]["args"][1]).is_file()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts, and commands that print their arguments in the place of those of a cluster."""
    checkout = tmp_path / "check out"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    (tmp_path / "bin").mkdir()
    for name in ("python", "srun", "scontrol"):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*"\n')
        path.chmod(0o755)
    return checkout


def start(checkout: Path, script: str, *words: str, **environ: str) -> subprocess.Popen[str]:
    path = f"{checkout.parent / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", checkout / script, *words], cwd=checkout, env={"PATH": path, "HOME": "/", **environ},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def torchrun_options(checkout: Path, **environ: str) -> str:
    process = start(checkout, "launch/torchrun.sh", "--config", "a b.yaml", RANKS="8", **environ)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    script = f" {checkout}/launch/pretrain.py --config a b.yaml\n"
    stops = " --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 40"
    return out.removeprefix("python -m torch.distributed.run ").removesuffix(stops + script)


def test_torchrun_in_a_pod(checkout):
    place = "--nnodes 2 --node_rank 1 --master_addr ingot-0.ingot --master_port 29500"
    assert torchrun_options(checkout, **variables()) == f"--nproc_per_node 8 {place}"


def test_torchrun_with_kubeflows_variables(checkout):
    pod = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "1", "RANK": "1"}
    assert torchrun_options(checkout, **pod, PET_NPROC_PER_NODE="4") == "--nproc_per_node 4"
    assert torchrun_options(checkout, **pod) == "--nproc_per_node 8"


def test_torchrun_starts_ranks_again_on_one_host_alone(checkout):
    """As a whole: each torchrun of several hosts would count its own restarts."""
    alone = "--nproc_per_node 8 --standalone --local-addr localhost --max-restarts"
    assert torchrun_options(checkout) == f"{alone} 3"
    assert torchrun_options(checkout, MAX_RESTARTS="0") == f"{alone} 0"
    assert "--max-restarts" not in torchrun_options(checkout, **variables(), MAX_RESTARTS="3")


def test_torchrun_names_a_busy_port(checkout):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        place = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        process = start(checkout, "launch/torchrun.sh", "--config", "a b.yaml", NODE_RANK="0", **place)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, "")
        assert f"port {port}" in err and "MASTER_PORT=N" in err
        assert "--node_rank 1" in torchrun_options(checkout, NODE_RANK="1", **place)


def submit(checkout: Path, srun: str) -> subprocess.Popen[str]:
    """The batch script, as Slurm starts it: a copy elsewhere; `srun` is what its stand-in does."""
    (checkout.parent / "bin/srun").write_text(f'#!/bin/bash\necho "srun $*"\n{srun}\n')
    spool = checkout / "slurm_script"
    shutil.copy(CLUSTER / "slurm.sbatch", spool)
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(checkout), "SLURM_CPUS_PER_TASK": "4"}
    return start(checkout, "slurm_script", "--config", "a b.yaml", **job)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_slurm_requeues_what_asks_for_it(code, requeued, checkout):
    job = submit(checkout, f"exit {code}")
    out, err = job.communicate(timeout=60)
    assert job.returncode == code, err
    assert "srun --cpus-per-task=4 --kill-on-bad-exit=1 python launch/pretrain.py --config a b.yaml\n" in out
    assert ("scontrol requeue 7" in out) == requeued


@pytest.mark.parametrize(
    ("sent", "answer", "code", "requeued"),
    [
        ("USR1", "exit 75", 75, True), ("USR1", "sleep 0.3; exit 0", 0, False), ("USR1", None, 138, True),
        ("TERM", "exit 75", 75, False),
    ],
    ids=["saves and asks", "had finished", "does not know the signal", "is cancelled"],
)  # fmt: skip
def test_slurm_hands_the_signal_on(sent, answer, code, requeued, checkout):
    trap = f'trap "{answer}" {sent}\n' if answer else ""
    job = submit(checkout, f"{trap}touch ready\nwhile :; do sleep 0.05; done")
    while not (checkout / "ready").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(getattr(signal, f"SIG{sent}"))
    out, err = job.communicate(timeout=60)
    assert job.returncode == code, out + err
    assert ("scontrol requeue 7" in out) == requeued


def test_slurm_refuses_another_folder(checkout):
    (checkout / "launch/pretrain.py").unlink()
    job = submit(checkout, "exit 0")
    assert "submit in the checkout" in job.communicate(timeout=60)[1]
    assert job.returncode == 2
