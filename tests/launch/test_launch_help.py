"""Every script says how it is used at once: what takes seconds to import is imported after the arguments are read."""

from __future__ import annotations

import re
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


def run_without(modules: set[str], *command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script where importing any of `modules` fails; it ends by os._exit, after which nobody could look."""
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({modules}); sys.argv = sys.argv[1:]; "
    command = (sys.executable, "-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')", *command)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_without_arguments_a_script_says_at_once_what_it_needs(script: Path) -> None:
    result = run_without(set(HEAVY), str(script))
    assert result.returncode == 2, result.stderr
    needed = "no config is given|usage: |the following arguments are required"
    assert re.search(needed, result.stdout + result.stderr)
    assert "Traceback" not in result.stderr


def test_how_to_start_names_files_that_are_there() -> None:
    script = ROOT / "launch/pretrain.py"
    told = run_without(set(HEAVY), str(script)).stderr
    named = {script, ROOT / "launch/prepare_data.py", ROOT / "launch/configs/tiny-cpu.yaml"}
    assert named == {path for path in map(Path, told.replace("'", "").split()) if path.is_absolute()} or " " in str(
        ROOT
    )
    assert all(path.is_file() for path in named)


def test_unprepared_data_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    words = ["--data.path=none", "--data.loader=numpy", "--train.engine=plain"]
    result = run_without(set(HEAVY) - {"numpy"}, str(ROOT / "launch/pretrain.py"), *words, folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert f"error: the data is not prepared: there is no {tmp_path}/none/manifest.json" in result.stderr
    assert list(tmp_path.iterdir()) == []
