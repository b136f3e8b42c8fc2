"""The kernels compile for GPUs that this machine does not have, and fit their registers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def compile_for(arch: int, only: str, cache: Path) -> list[str]:
    """The report's lines; the mode is fixed on import, so compiling takes a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.aot", "--arch", str(arch), "--only", only],
        cwd=ROOT, env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def matrix_kernels(lines: list[str]) -> list[str]:
    return [line for line in lines if re.search(r"attention (forward|dkdv|dq|fused)", line)]


# At the commonest head width: plain, in both ways to load; and everything at once, in the smallest tiles.
COMMON = r"attention \w+ bf16 D=64 \S+ w\d s\d( tma)?$|attention forward bf16 D=64 .* sparse documents softcap dropout$"


@pytest.mark.parametrize(
    ("arch", "names", "count", "instruction"),
    [
        (80, COMMON, 5, "mma.sync"),
        (90, COMMON, 10, "wgmma"),
        (100, r"attention forward bf16 D=64 \S+ w\d s\d( tma)?$", 2, "tcgen05"),
    ],
)
def test_the_common_kernels_fit(arch: int, names: str, count: int, instruction: str, tmp_path: Path) -> None:
    """No spills, the matrix instructions of the architecture, and bulk copies where the tiles ask for them."""
    lines = compile_for(arch, f"{names}|attention bounds|layer_norm .* bf16 C=768 bias$", tmp_path)
    attention = matrix_kernels(lines)
    assert len(attention) == count
    assert len(lines) > count + 1
    for line in attention:
        assert instruction in line
        assert (" tma " in line) == ("cp.async.bulk" in line)
    assert any(" tma " in line for line in attention) == (arch >= 90)


OTHERS = (
    r"norm .* bf16 C=768( add dropout)?( bias)?$|dropout bf16 C=768|embedding .* bf16 C=768|adamw fp32 gradient bf16$"
    r"|(gelu|swiglu) .* bf16 1x2048|rope qkv .* bf16 D=64|cross_entropy fused bf16 V=2048$"
)


def test_the_common_others_fit(tmp_path: Path) -> None:
    families = {line.split()[1] for line in compile_for(90, OTHERS, tmp_path)}
    expected = {"layer_norm", "rms_norm", "dropout", "embedding", "adamw", "gelu", "swiglu", "rope"}
    assert families == expected | {"cross_entropy"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_fits(arch: int, tmp_path: Path) -> None:
    lines = compile_for(arch, "", tmp_path)
    assert all("mma" in line for line in matrix_kernels(lines) if "fp32" not in line)


def test_the_interpreter_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.aot"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "expected compiled kernels: unset it" in done.stderr
