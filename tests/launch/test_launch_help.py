"""Every script says how it is used at once: what takes seconds to import is imported after the arguments are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "launch").glob("*.py") if "__main__" in path.read_text())
HEAVY = (
    "torch",
    "triton",
    "deepspeed",
    "numpy",
    "tokenizers",
    "fsspec",
    "rich",
    "matplotlib",
    "safetensors",
    "lm_eval",
)
RUN = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*sys.modules.keys() & set({HEAVY}), file=sys.stderr)
"""


def test_the_scripts_are_found() -> None:
    assert {"pretrain", "verify", "generate", "prepare_data", "report", "evaluate"} <= {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_imports_nothing_heavy(script: Path, option: str) -> None:
    command = [sys.executable, "-c", RUN, str(script), option]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout
    assert result.stderr.split() == []
