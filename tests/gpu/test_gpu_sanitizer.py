"""NVIDIA's compute-sanitizer finds no fault in any kernel (`make test-gpu`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rounding import GPU_ONLY

ROOT = Path(__file__).resolve().parents[2]
FOUND = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
pytestmark = [
    *GPU_ONLY,
    pytest.mark.skipif(FOUND is None, reason="needs compute-sanitizer, a part of the CUDA toolkit"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_clean(tool: str) -> None:
    # Without the caching allocator, so that a byte past a tensor's end is past its allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(FOUND), "--tool", tool, "--error-exitcode", "99", sys.executable, "tests/gpu/every_kernel.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine's device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "every kernel ran" in done.stdout
