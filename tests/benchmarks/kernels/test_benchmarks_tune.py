"""The tuner of attention's tiles: what it prints, what it leaves out, and where it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.clock import CpuClock
from benchmarks.kernels import tune
from benchmarks.kernels.attention import Shape
from benchmarks.kernels.tune import Timing, main
from kernels.attention.tiles import INTERPRETER, KINDS, Tile, tables_of

ROOT = Path(__file__).resolve().parents[3]
TINY = ["--widths", "16", "--lengths", "16", "--dtypes", "fp32", "--tokens", "16", "--channels", "16"]
SMALL = Shape(1, 32, 1, 16)
FP32, BF16 = torch.float32, torch.bfloat16


def without_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_ranking_and_a_line_of_every_kind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "TURNS", 1)
    assert main([*TINY, "--forms", "plain", "window", "--best", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for form in ("plain", "window"):
        assert f"# the interpreter: fp32, 16 tokens in rows of 16, 16 channels, {form}" in printed
    for kind in KINDS:
        mine = [text for text in printed if text.startswith(f"# {kind} D=16 ")]
        assert len([text for text in mine if text.endswith("the present one")]) == 2
        assert 2 <= len(mine) <= 4  # the fastest and the present one of each form
        assert all(re.fullmatch(r"# \w+ D=16 (\d+x){3}\d: [\d.]+ us, \d+ TFLOP/s(, the present one)?", x) for x in mine)
        lines = [text for text in printed if re.fullmatch(rf"    {kind} +(\d+x\d+x4x1 ){{4}}\d+x\d+x4x1", text)]
        assert len(lines) == 2
        # The other widths keep their tile; all tables take the lines.
        assert tables_of(0, False, f"plain {lines[0]}").tiles["plain", kind, 256] == INTERPRETER


def test_a_tile_with_other_results_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, sound = Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)
    monkeypatch.setattr(tune, "pass_of", lambda *a: lambda tile: [torch.ones(4) * (2 if tile == broken else 1)])
    device = torch.device("cpu")
    timings = tune.tune("dq", SMALL, FP32, device, CpuClock(), [broken, sound])
    now = tune.present("dq", SMALL, FP32, device)
    assert {timing.tile for timing in timings} == {broken, sound, now}
    printed = list(tune.ranking("dq", SMALL, timings, now, 9))
    assert printed[0].startswith("# dq D=16 16x16x4x1: the result differs by 1.0e+00")
    assert len(printed) == 3
    assert "16x16" not in "".join(printed[1:])
    fastest = [
        Timing(broken, 1.0, "wrong"),
        Timing(replace(sound, tma=True), 2.0),
        Timing(sound, 3.0),
        Timing(now, 4.0),
    ]
    assert tune.line("dq", [(SMALL, fastest)], FP32, device).split()[:3] == ["dq", "32x16x4x1", tune.cell(now)]


def test_the_grid_keeps_tiles_in_their_blocks() -> None:
    dense = Shape(1, 64, 1, 64)
    assert max(tile.block_m for tile in tune.grid(dense, BF16, 9)) == 128
    assert max(tile.block_m for tile in tune.grid(replace(dense, **tune.FORMS["sparse"]), BF16, 9)) == 64
    assert any(tile.tma for tile in tune.grid(dense, BF16, 9))
    assert not any(tile.tma for tile in tune.grid(replace(dense, D=80), BF16, 9))
    assert not any(tile.tma for tile in tune.grid(dense, BF16, 8))


def test_a_machine_without_a_gpu_is_refused() -> None:
    done = without_interpreter("-m", "benchmarks.kernels.tune")
    assert done.returncode == 2
    assert "error: benchmarks.kernels.tune: found tensors on 'cpu', expected 'cuda'" in done.stderr


@pytest.mark.slow
def test_candidates_are_those_that_the_compiler_finds_no_fault_with() -> None:
    code = """
import torch
from benchmarks.kernels.attention import Shape
from benchmarks.kernels.tune import fits
from kernels.attention.tiles import Tile
for tile in (Tile(64, 64, 4, 2), Tile(128, 128, 4, 3), Tile(24, 64, 4, 1)):
    print(fits(90, "dkdv", Shape(1, 64, 16, 128), torch.bfloat16, tile))
"""
    done = without_interpreter("-c", code)
    assert done.stdout.split()[1:] == ["False", "False"], done.stderr  # spills; not a power of two
    assert without_interpreter("-c", code.replace("16, 128)", "16, 64)")).stdout.split()[0] == "True"
