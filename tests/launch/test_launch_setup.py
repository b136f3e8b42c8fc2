"""`make setup`: what it shows of pip, and that it hides no error. pip itself is played by a script."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
case "$*" in
  *"pip install"*setuptools*)
    echo "Requirement already satisfied: wheel in place"
    [ -e broken ] && { echo "ERROR: No matching distribution found for pybind11" >&2; exit 1; }
    echo "Collecting pybind11==3.1.0 (from -c constraints.txt (line 1))"
    echo "  Downloading pybind11-3.1.0-py3-none-any.whl (300 kB)"
    echo "Installing collected packages: pybind11";;
  *"pip install"*torch*) echo "Collecting torch==2.13.0"; echo "WARNING: the disk is slow" >&2;;
esac
echo "$*" >> calls
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that `make setup` reads, and an environment whose interpreter does nothing."""
    for name in ("Makefile", "constraints.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def make_setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", "setup"], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


def test_every_stage_and_package_is_shown_once(checkout: Path) -> None:
    result = make_setup(checkout)
    assert result.returncode == 0, result.stderr
    stages = [line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("setup ")]
    assert stages == ["setup 1/3", "setup 2/3", "setup 3/3"]
    packages = [line for line in result.stdout.splitlines() if line.startswith("  ")]
    assert packages == ["  torch==2.13.0", "  pybind11==3.1.0", "  unpacking them"]
    assert "build_ext" in (checkout / "calls").read_text().splitlines()[-1]
    again = make_setup(checkout)
    assert (again.returncode, again.stderr) == (0, "")
    assert not [line for line in again.stdout.splitlines() if not line.startswith("make: ")]


def test_an_error_of_pip_is_shown_and_ends_setup(checkout: Path) -> None:
    (checkout / "broken").touch()
    result = make_setup(checkout)
    assert result.returncode != 0
    assert "ERROR: No matching distribution found for pybind11" in result.stderr
    assert "setup 3/3" not in result.stdout
    (checkout / "broken").unlink()
    assert "setup 2/3" in make_setup(checkout).stdout  # and it is not taken for done
