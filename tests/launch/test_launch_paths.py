"""Paths count from the folder that one is in, whatever starts the script, and may have spaces."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import SETTINGS, TORCHRUN, Workspace

ROOT = Path(__file__).resolve().parents[2]
# Stands for .venv/bin/python: says where it was started, and with what.
PYTHON = """#!/bin/sh
exec {python} -c 'import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1:]]))' "$@"
"""
ARGUMENTS = ["--config", "my config.yaml", "--data.path=../my data"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in a folder with a space, whose Python only tells how it is called."""
    root = tmp_path / "my code" / "ingot"
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "constraints.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=shlex.quote(sys.executable)))
    python.chmod(0o755)
    for name in (".packages", ".native"):
        (root / ".venv" / name).touch()
    return root


def called(command: list[str | Path], folder: Path, **environ: str) -> list[tuple[str, list[str]]]:
    """Where and with what Python was started by a command in `folder`."""
    # A make that was started by make would print the folders that it enters.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment = {**outside, "RANKS": "2", **environ}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return [(where, words) for where, words in map(json.loads, done.stdout.splitlines())]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launch_script_stays_in_the_folder(launcher: str, checkout: Path, tmp_path: Path) -> None:
    place = tmp_path / "my work"
    place.mkdir()
    module = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}[launcher]
    ((where, words),) = called([checkout / f"launch/{launcher}.sh", *ARGUMENTS], place)
    assert where == str(place)
    assert words[:2] == ["-m", module]
    assert words[-4:] == [str(checkout / "launch/pretrain.py"), *ARGUMENTS]


@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh"])
def test_a_launch_script_without_arguments_says_how_to_start(script: str) -> None:
    done = subprocess.run([ROOT / "launch" / script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no config is given" in done.stderr and "--prepare" in done.stderr


def test_make_calls_python_by_its_place_in_the_checkout(checkout: Path) -> None:
    settings = ["ARGS=--name=x --data.path='../my data'", "RANKS=2", "CONFIG=c.yaml"]
    prepared, trained = called(["make", "-o", "setup", "pretrain", *settings], checkout)
    words = ["--config", "c.yaml", "--name=x", "--data.path=../my data"]
    assert prepared == (str(checkout), ["launch/prepare_data.py", *words])
    assert trained[1][:2] == ["-m", "deepspeed.launcher.runner"]
    assert trained[1][-5:] == ["launch/pretrain.py", *words]


def test_make_starts_no_installed_script() -> None:
    """Their first line is broken in a folder whose path has a space."""
    assert set(re.findall(r"(?:\$\(BIN\)|/bin)/([\w.-]+)", (ROOT / "Makefile").read_text())) <= {"python", "bash"}


def test_several_hosts_refuse_a_path_that_a_shell_would_cut(tmp_path: Path) -> None:
    place = tmp_path / "my work"
    place.mkdir()
    (place / "hosts").write_text("node-1 slots=2\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HOSTFILE": "hosts"}
    command = [ROOT / "launch/deepspeed.sh", "--config", "c.yaml"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"'{place}' has a space" in done.stderr


RUNNER = r"""#!/bin/sh
case "$1" in */launch/check_hostfile.py) exit 0 ;; esac
printf '%s\n' 'a: [2026-01-01 00:00:00,000] [INFO] [launch.py:162:main] nnodes=1' 'a: step 1' \
  'a: [2026-01-01 00:00:00,000] [ERROR] [launch.py:335:sigkill_handler] exits with 1' '[INFO] of mine'
exit 3
"""


def test_several_hosts_show_the_errors_of_their_launchers_alone(checkout: Path) -> None:
    (checkout / ".venv/bin/python").write_text(RUNNER)
    environment = {**os.environ, "HOSTFILE": "hosts"}
    command = [checkout / "launch/deepspeed.sh", "--config", "c.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert [line.split("] ")[-1] for line in done.stdout.splitlines()] == ["a: step 1", "exits with 1", "of mine"]


@pytest.mark.ranks
@pytest.mark.slow
def test_prepare_then_train_where_paths_have_spaces(tmp_path: Path) -> None:
    """Without data a start says what mends it; with --prepare two ranks make the data, and train."""
    space = Workspace(tmp_path / "my work")
    (space.path / "corpus").rename(space.path / "my corpus")
    settings = {**SETTINGS, "data.source": "my corpus", "data.path": "my data", "name": "x", "train.max_steps": 2}
    words = [f"--{key}={value}" for key, value in (settings | {"train.engine": "plain"}).items()]
    script = os.path.relpath(ROOT / "launch/pretrain.py", space.path)
    refused = space.run([sys.executable, script, *words])
    assert refused.returncode == 2
    assert f"there is no {space.path}/my data/manifest.json; add --prepare to this command" in refused.stderr
    command = shlex.split(refused.stderr.split(", or run ")[1])
    assert command == ["python", str(Path(script).with_name("prepare_data.py")), *words]
    assert not (space.path / "runs").exists()
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
    done = space.run([*launcher, script, "--prepare", *words])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "my data: my corpus, vocabulary 300" in done.stdout
    assert (space.path / "runs/x/checkpoints/step-00000002").is_dir()
    shutil.rmtree(space.path / "my data")
    again = space.run([sys.executable, script, *words])
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-3000:]
    assert "runs/x is complete: 2 steps" in again.stdout
