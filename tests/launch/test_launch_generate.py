"""launch/generate.py takes whatever is typed: each try ends in text or in one line that says what is wrong."""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llm.trained
from llm.cluster.ranks import discover_ranks
from llm.errors import InputError
from llm.trained import Trained, load_trained
from test_generate import CONFIG
from trained_run import write_run

SCRIPT = Path(__file__).resolve().parents[2] / "launch/generate.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one", CONFIG)


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return load_trained(run, CPU)


@pytest.fixture(scope="module")
def main() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])  # whose first entry the script replaces
        return runpy.run_path(str(SCRIPT))["main"]


bytes_typed = st.binary(max_size=60).map(lambda raw: raw.decode("utf-8", "surrogateescape"))  # as Python makes argv
prompts = st.lists(st.text(max_size=60) | bytes_typed | st.text("x ", min_size=30, max_size=60), min_size=1, max_size=3)
odd = st.sampled_from(["1e-39", "1e-300", "5e-324", "1e308", "-0", "1_0", "", "x", "٣", "nan"])
number = st.one_of(st.integers(), st.floats(), odd).map(str)
names = st.sampled_from(
    [
        "max-new-tokens",
        "temperature",
        "top-k",
        "top-p",
        "repetition-penalty",
        "seed",
        "min-p",
        "samples",
        "no-repeat-ngram",
        "presence-penalty",
        "frequency-penalty",
    ]
)
options = st.dictionaries(names, number, max_size=4)


@given(prompts, options)
@settings(max_examples=150, deadline=None)
@example(["\udcff\udc80"], {"temperature": "1e-39"})
@example([""], {"temperature": "1e-300", "top-p": "1e-300", "top-k": "1"})
@example(["\ud800", ""], {"seed": "18446744073709551615", "max-new-tokens": str(10**30)})
def test_text_or_one_clear_error(
    run: Path, trained: Trained, main: Any, texts: list[str], typed: dict[str, str]
) -> None:
    argv = [f"--checkpoint={run}", *(f"--prompt={text}" for text in texts)]
    argv += [f"--{name}={value}" for name, value in typed.items() if name != "samples" or len(value) < 2]
    said, stopped = list[str](), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate.py", *argv])
        patch.setattr(os, "environ", dict(os.environ))  # which the script adds to
        patch.setattr(llm.trained, "load_trained", lambda *args: trained)
        patch.setattr("builtins.print", lambda *words, **options: said.append(" ".join(map(str, words))))
        try:
            main(discover_ranks({}))
        except (InputError, SystemExit) as error:
            stopped = error
    if isinstance(stopped, SystemExit):
        assert stopped.code == 2  # argparse has said why
    elif stopped is not None:
        assert "expected" in str(stopped) or "model.max_seq_len" in str(stopped)
    else:
        assert "".join(said).encode()  # it is text, and no half of a character


def typed(run: Path, *arguments: str | bytes, **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, SCRIPT, f"--checkpoint={run}", "--max-new-tokens=4", *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, check=False)


def test_bytes_on_a_terminal_that_is_not_utf_8(run: Path) -> None:
    posix = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    result = typed(run, b"--prompt=d\xc3\xa9 \xff", "--temperature=1e-39", **posix)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(rb"d\xe9 \ufffd") and result.stdout.isascii()


@pytest.mark.slow
def test_text_for_a_full_disk_is_a_failure_and_for_a_closed_pipe_is_none(run: Path) -> None:
    command = shlex.join([sys.executable, str(SCRIPT), f"--checkpoint={run}", "--prompt=a"])
    for redirection, code in (("> /dev/full", 1), ("| true; exit ${PIPESTATUS[0]}", 0)):
        result = subprocess.run(["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True, check=False)
        assert result.returncode == code, result.stderr
        assert "standard output is left out from here on" in result.stderr and "Traceback" not in result.stderr


def test_prompts_come_from_files_and_stdin(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("import")
    command = [sys.executable, SCRIPT, f"--checkpoint={run}", "--max-new-tokens=4", "--prompt-file=-"]
    command += [f"--prompt-file={tmp_path / 'prompt'}", "--speed"]
    result = subprocess.run(command, input=b"def f", capture_output=True, check=False)
    assert result.returncode == 0 and b"1 of 2\ndef f" in result.stdout and b"2 of 2\nimport" in result.stdout
    assert b"speed: prefill" in result.stderr


@pytest.mark.slow
def test_a_wrong_prompt_is_one_clear_error(run: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--chat", "--prompt=a"], [f"--prompt-file={tmp_path / 'none'}"], ["--prompt=" + "ab" * 60]):
        result = typed(run, *arguments)
        assert result.returncode == 2 and result.stdout == b"" and result.stderr.count(b"\n") == 1
        assert b"expected" in result.stderr or b"longest sequence" in result.stderr
