"""The kernels compile for GPUs that this machine does not have, and fit their registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compile_for(arch: int, only: str, cache: Path) -> list[str]:
    """The report's lines; the mode is fixed on import, so compiling takes a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.aot", "--arch", str(arch), "--only", only],
        cwd=ROOT, env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def matrix_kernels(lines: list[str]) -> list[str]:
    return [line for line in lines if "attention" in line and " delta " not in line]


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma")])
def test_the_common_kernels_fit(arch: int, instruction: str, tmp_path: Path) -> None:
    names = r"attention (forward|dkdv|dq) bf16 D=64 (?!.*dropout)|layer_norm .* bf16 C=768 bias"
    lines = compile_for(arch, names, tmp_path)
    assert len(lines) == 5
    assert all(instruction in line for line in matrix_kernels(lines))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_fits(arch: int, tmp_path: Path) -> None:
    lines = compile_for(arch, "", tmp_path)
    assert all("mma" in line for line in matrix_kernels(lines) if "fp32" not in line)


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.aot"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "expected compiled kernels: unset it" in done.stderr
