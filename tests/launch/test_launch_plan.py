"""launch/plan.py as a program: its output, its refusals, and the epochs of prepared data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT}/launch/configs/tiny-cpu.yaml"


def plan(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/plan.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus=0"], "--gpus is 0; expected at least 1"),
        (["--gpus=x"], "argument --gpus: invalid int value: 'x'"),
        (["--gpus=3"], "train.global_batch_size 32 is not a multiple of 3 data-parallel ranks"),
        (["--mfu=0"], "--mfu is 0.0; expected above 0 and at most 1"),
        (["--mfu=nan"], "--mfu is nan; expected above 0 and at most 1"),
        (["--peak-tflops=-1"], "--peak-tflops is -1.0; expected above 0"),
        (["--gpu=Voodoo 2"], "the peak of Voodoo 2 in fp32 is not known; give --peak-tflops=X"),
        (["--model.n_layr=3"], "model.n_layr"),
        (["--logging.peak_tflops=0"], "logging.peak_tflops is 0.0; expected above 0, or null"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_request_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.plan import main
    from llm.errors import InputError

    with pytest.raises(InputError) as refused:
        main([CONFIG, *words])
    assert told in str(refused.value)


def test_the_peak_may_be_the_configs_or_the_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from launch.plan import main

    peaks = {"989": ["--train.precision=bf16", "--parallel.zero_stage=1"], "7 ": ["--logging.peak_tflops=7"]}
    peaks["8 "] = ["--logging.peak_tflops=7", "--peak-tflops=8"]
    for peak, words in peaks.items():
        main([CONFIG, *words])
        assert f"of {peak}" in capsys.readouterr().out


def test_the_docs_show_what_it_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    from launch.plan import main

    monkeypatch.chdir(tmp_path)
    main([f"--config={ROOT}/launch/configs/gpt2-124m.yaml", "--gpus=8"])
    assert f"```text\n{capsys.readouterr().out}```" in (ROOT / "docs/launching.md").read_text()


@pytest.mark.slow
def test_epochs_of_prepared_data_and_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / f"text/{i}.txt").write_text("".join(f"{i} and {j}, " for j in range(i, i + 400)))
    words = [CONFIG, "--data.source=text", "--data.path=prepared", "--model.vocab_size=300"]
    assert "epochs      not known: data.source text is not prepared" in plan(tmp_path, *words).stdout
    prepare = [sys.executable, str(ROOT / "launch/prepare_data.py"), *words]
    subprocess.run(prepare, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    done = plan(tmp_path, *words)
    assert done.returncode == 0 and " of prepared" in done.stdout, done.stderr
    (epochs,) = (float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("epochs"))
    assert epochs > 10
    refused = plan(tmp_path, CONFIG, "--gpus=3")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stdout == ""
