"""benchmarks.kernels writes its figures, a table and plots, and fails if ours does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from benchmarks import report
from benchmarks.clock import Clock, Thunk, machine
from benchmarks.kernels import __main__ as bench_kernels
from benchmarks.kernels import runner
from benchmarks.kernels.case import Contest, Setup
from benchmarks.kernels.runner import run_contest
from benchmarks.kernels.tables import text_of, unit

ROOT = Path(__file__).resolve().parents[3]


def missing() -> Thunk:
    raise ModuleNotFoundError("No module named 'liger_kernel'")


def softmax(width: int, dim: int = -1) -> Setup:
    return lambda: lambda: torch.ones(2, width).softmax(dim)


def softmax_contest(part: str, width: int, ours: Setup) -> Contest:
    rivals = {"ingot": ours, "reference": softmax(width), "torch": softmax(width), "Liger": missing}
    return Contest("soft max", part, f"N={width}", "width", width, torch.float32, 16.0 * width, rivals)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Contest]], tuple[int, dict, list[dict]]]:
    """Runs the script's main on made-up contests: its exit code, and what results.jsonl holds."""

    def run(contests: list[Contest]) -> tuple[int, dict, list[dict]]:
        def outcomes(device: torch.device, clock: Clock, only: str) -> Iterator[dict]:
            yield from (run_contest(contest, device, clock) for contest in contests)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(runner, "benchmark", outcomes)
        code = bench_kernels.main(["--out", str(tmp_path)])
        return code, *report.read(tmp_path / "results.jsonl")

    return run


def test_figures_table_and_plots_are_written(bench, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = ("forward", "backward")
    code, head, outcomes = bench([softmax_contest(part, n, softmax(n)) for part in parts for n in (8, 16)])
    assert code == 0
    assert head["command"] == f"python -m benchmarks.kernels --out {tmp_path}"
    assert head["packages"]["torch"] == version("torch")
    assert head["limits"]["copy_gb_s"] > 0
    first = outcomes[0]
    assert (first["kernel"], first["part"], first["width"], first["axis"]) == ("soft max", "forward", 8, "width")
    assert first["best_other"] in {"reference", "torch"}
    assert first["ratio"] == first["rivals"][first["best_other"]]["ms"] / first["rivals"]["ingot"]["ms"]
    assert {"ms", "ms_p20", "ms_p80", "host_ms", "calls", "gb_s"} <= first["rivals"]["ingot"].keys()
    text = (tmp_path / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("### soft max") == 2
    assert text.count("Liger") == text.count("\nNot installed: Liger (results.jsonl says what each needs).\n") == 1
    assert first["rivals"]["Liger"] == {"error": "not installed: No module named 'liger_kernel'"}
    assert "| shape | ms | host ms | of copy | ingot | reference | torch | best other | ratio |" in text
    assert imread(tmp_path / "soft_max.png").shape[:2] == (450, 1400)  # two panels side by side
    assert [path.name for path in tmp_path.glob("*.png")] == ["soft_max.png"]


@pytest.mark.parametrize(
    ("ours", "found"), [(missing, "Not installed: Liger, ingot"), (softmax(16, 0), "- ingot: the result")]
)
def test_ours_failing_or_wrong_exits_1(bench, tmp_path: Path, ours: Setup, found: str) -> None:
    code, _, outcomes = bench([softmax_contest("forward", 8, softmax(8)), softmax_contest("backward", 16, ours)])
    assert code == 1
    assert len(outcomes) == 2
    assert found in (tmp_path / "results.md").read_text()


def test_nothing_timed_exits_1(bench) -> None:
    assert bench([])[0] == 1


def figures(ms: float) -> dict[str, float]:
    return {"ms": ms, "ms_p20": ms, "ms_p80": ms, "host_ms": 0.01, "calls": 3, "gb_s": 2 / ms, "tflop_s": 1 / ms}


def test_the_table_names_the_best_and_what_does_not_count() -> None:
    rivals = {"ingot": figures(2.0), "fast": figures(4.0), "wrong": figures(1.0) | {"wrong": "the result differs"}}
    fields = {"kernel": "k", "part": "forward", "group": "g", "dtype": "bfloat16", "axis": "N", "width": 4}
    outcome = fields | {
        "shape": "N=4",
        "flops": 1e12,
        "bytes": 2e9,
        "rivals": rivals,
        "best_other": "fast",
        "ratio": 2.0,
    }
    head = {"date": "2026-01-01T", "command": "c", "method": "m", "limits": {"copy_gb_s": 2.0, "matmul_tflop_s": 2.0}}
    lines = text_of(machine(torch.device("cpu"), []) | head, [outcome]).splitlines()
    assert lines[1] == "Copy 2 GB/s, matmul 2 TFLOP/s in the same run. Timed by m."
    assert "### k forward g bfloat16, GB/s" in lines
    assert "| N=4 | 2 (2 to 2) | 0.01 | 50% | 1 | 0.5 | (2) | fast | 2.00 |" in lines
    assert lines[-1] == "- wrong: the result differs"


def test_the_unit_is_that_of_the_longer_bound() -> None:
    limits = {"copy_gb_s": 4000.0, "matmul_tflop_s": 800.0}
    panel = [{"bytes": 4e9, "flops": 1e12}, {"bytes": 4e9, "flops": 0.5e12}]  # 2 ms to move, 1.9 to compute
    assert unit(panel, limits)[1:] == ("GB/s", "copy", 4000.0)
    assert unit([*panel, panel[0]], limits | {"matmul_tflop_s": 700.0})[1:] == ("TFLOP/s", "matmul", 700.0)


@pytest.mark.slow
def test_the_real_thing_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.kernels", "--only", "dropout|attention .*H=2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "results.md", "attention.png", "dropout.png"}
