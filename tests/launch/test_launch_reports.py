"""Real runs whose reports cannot be shown or made: they train, save, and end with exit code 0."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from runs import ROOT, Workspace, succeeded

POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SHORT = {"train.engine": "plain", "train.max_steps": 3, "checkpoint.interval": 3, "logging.sample_tokens": 4}


@pytest.mark.slow
def test_an_ascii_terminal_and_then_data_that_has_moved(workspace: Workspace) -> None:
    env = workspace.environment(**POSIX)
    (workspace.path / "prompt.yaml").write_text('logging: {sample_prompt: "é\u2588"}\n', encoding="utf-8")
    first = workspace.python(env, name="ascii", **SHORT, config="prompt.yaml")
    succeeded(first)
    assert r"\xe9\u2588" in first.stdout and (first.stdout + first.stderr).isascii()
    assert "step 3/3" in first.stdout and "Traceback" not in first.stderr
    run = workspace.path / "runs/ascii"
    assert (run / "checkpoints/step-00000003").is_dir() and (run / "loss.png").is_file()

    (run / "loss.png").unlink()
    (workspace.path / "data/corpus-300").rename(workspace.path / "data/moved")
    again = workspace.python(env, name="ascii", **SHORT, config="prompt.yaml")
    (workspace.path / "data/moved").rename(workspace.path / "data/corpus-300")
    succeeded(again)
    assert "runs/ascii is complete: 3 steps" in again.stdout
    assert "warning: what is known of the data is left out from here on: " in again.stdout
    assert "validation loss" in again.stdout and (run / "loss.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| head -n 1; exit ${PIPESTATUS[0]}", "> /dev/full", ">&- 2>&-"])
def test_a_terminal_that_takes_nothing(workspace: Workspace, redirection: str) -> None:
    name = f"takes-nothing-{len(redirection)}"
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), *workspace.arguments(name=name, **SHORT)]
    succeeded(workspace.run(["bash", "-c", f"{shlex.join(command)} {redirection}"]))
    assert (workspace.path / "runs" / name / "loss.png").is_file()
    assert len(workspace.losses(name)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_the_help_of_every_script_can_be_cut_short(script: str) -> None:
    command = f"{sys.executable} {ROOT / 'launch' / script} --help | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
