"""The proof for a GPU: every stage runs on a CPU, and no failure, hang or end of time costs what came before."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.contenders import COMPILED
from benchmarks.gpu_proof import __main__ as proof
from benchmarks.gpu_proof import correctness, page, speed, stage, training
from benchmarks.gpu_proof.__main__ import LOG, RESULTS, SAMPLE
from benchmarks.gpu_proof.stage import STAGES, items_of
from benchmarks.report import NONE, Record
from chosen import slow_but
from llm.parallel.fp8 import FP8Linear
from llm.train.muon import Muon

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def records(folder: Path) -> list[Record]:
    return report.read(folder / RESULTS)[1]


def test_every_stage_runs_and_is_reported(tmp_path: Path) -> None:
    proof.begin(tmp_path, [])
    for name in STAGES:
        assert stage.run(name, tmp_path / RESULTS, CPU)
        report.append(tmp_path / RESULTS, {"stage": name, "status": "done"})
    report.append(tmp_path / RESULTS, {"stage": SAMPLE, "status": "done", "printed": "...\n=== 3 passed in 2 s ==="})
    for name in STAGES:
        found = items_of(records(tmp_path), name)
        assert found, name
        assert {item: r for item, r in found.items() if r["status"] != "done"} == {}
    text, good = page.summary(*report.read(tmp_path / RESULTS))
    assert good
    page_file = tmp_path / "page.md"
    page_file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.main(tmp_path / RESULTS, page_file)
    written = page_file.read_text()
    assert written.startswith("before\n")
    assert written.endswith(f"{page.END}\nafter\n")
    assert "old" not in written
    for title in (
        "Kernels beside others",
        "Training steps",
        "Tiles of attention",
        "Results against float64",
        "3 passed in 2 s.",
    ):
        assert title in text
        assert title in written


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    proof.begin(tmp_path, [])
    text, good = page.summary(*report.read(tmp_path / RESULTS))
    assert good
    assert "###" not in text


def test_the_gluon_stages_have_their_items_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert correctness.gluon(CPU) == speed.gluon_speed(CPU) == stage.NO_HOPPER
    monkeypatch.setattr(correctness.attention, "on_hopper", lambda shape, device: True)
    monkeypatch.setattr(speed, "on_hopper", lambda shape, device: True)
    found = list(correctness.gluon(CPU))
    for part in ("float16", "window=256", "documents=9", "T=1000", "T=1 ", "K=2", "D=64", "D=128"):
        assert any(part in name for name in found), part
    assert all("gluon" in name and "atomics" not in name for name in found)
    assert correctness.gluon_cases(CPU)[found[0]]().impl == "gluon"
    lengths = {length for name in speed.gluon_speed(CPU) for length in re.findall(r"T=(\d+)", name)}
    assert lengths == {"2048", "4096", "8192", "16384"}


def timed(ms: float, **more: Any) -> Record:
    return {"ms": ms, "tflop_s": 1.0 / ms, **more}


def test_attention_in_gluon_is_shown_beside_the_faster_stock_kernel(tmp_path: Path) -> None:
    """A kernel with wrong results sets no goal. Both: the sums of milliseconds."""
    forward = {"ingot, gluon": timed(2.0), "ingot": timed(4.0), "SDPA flash": timed(3.0), "SDPA cuDNN": timed(1.0)}
    backward = {"ingot, gluon": timed(6.0), "SDPA flash": timed(9.0), "SDPA cuDNN": timed(3.0, wrong="differs")}
    proof.begin(tmp_path, [])
    outcomes = [
        {"part": part, "shape": "T=2048", "flops": flops, "rivals": rivals}
        for part, flops, rivals in (("forward", 1e12, forward), ("backward", 3e12, backward))
    ]
    report.append(tmp_path / RESULTS, {"stage": "gluon_speed", "item": "a", "status": "done", "outcomes": outcomes})
    text, good = page.summary(*report.read(tmp_path / RESULTS))
    assert good
    assert "| TFLOP/s of | Gluon | Triton | flash | cuDNN | ratio |" in text
    assert "| forward T=2048 | 0.5 | 0.25 | 0.3333 | 1 | 0.50 |" in text
    assert f"| backward T=2048 | 0.1667 | {NONE} | 0.1111 | (0.3333) | 1.50 |" in text
    assert f"| both T=2048 | 500 | {NONE} | 333.3 | {NONE} | 1.50 |" in text
    assert page.FA3 in text


def test_steps_are_related_to_the_compiled_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.train.compiled.BACKEND", "aot_eager")
    ours = training.measure(CPU, "tiny", "blocks") | {"item": "tiny blocks", "tokens_s": 600.0}
    assert ours["start_s"] > 0 and len(ours["losses"]) == 2
    peer = ours | {"form": COMPILED, "item": f"tiny {COMPILED}", "tokens_s": 500.0}
    head = report.header("benchmarks.gpu_proof", [], CPU, ("torch",))
    lines = page.tables(head, [record | {"stage": "training", "status": "done"} for record in (ours, peer)])
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| tiny")] == ["1.20 x", "1.00 x"]


@pytest.mark.parametrize("form", slow_but(["blocks, FP8, Muon"], training.FEATURES))
def test_a_step_of_each_feature_is_measured(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.train.compiled.BACKEND", "aot_eager")
    engine, _ = training.engine_of(CPU, training.SMALL["tiny"], form)
    block = engine.model.blocks["0"]
    assert isinstance(block.qkv, FP8Linear) == ("FP8" in form)
    assert isinstance(engine.optimizer, Muon) == ("Muon" in form)
    assert isinstance(block.forward, partial) == ("blocks" in form)
    found = training.measure(CPU, "tiny", form)
    assert found["ms"] > 0 and found["kernels"] > 0 and all(map(math.isfinite, found["losses"]))


def fake(monkeypatch: pytest.MonkeyPatch, **actions: Any) -> None:
    """Gives the stage `correctness` these items."""
    module = SimpleNamespace(correctness=lambda device: actions)
    monkeypatch.setattr(stage, "import_module", lambda name: module)


def test_an_item_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Record:
        raise ValueError("the reason")

    fake(monkeypatch, a=fails, b=lambda: {"wrong": "differs"}, c=lambda: {"ms": 1.0})
    proof.begin(tmp_path, [])
    assert stage.run("correctness", tmp_path / RESULTS, CPU)
    found = items_of(records(tmp_path), "correctness")
    assert [found[item]["status"] for item in "abc"] == ["failed", "wrong", "done"]
    assert found["a"]["error"].endswith("ValueError: the reason")
    assert "fails" in found["a"]["error"]
    text, good = page.summary(*report.read(tmp_path / RESULTS))
    assert not good
    assert "the reason" in text
    assert "differs" in text


def test_a_process_that_cannot_go_on_says_so_and_the_next_goes_on_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Record:
        raise RuntimeError("an illegal memory access was encountered")

    fake(monkeypatch, a=fails, b=dict)
    monkeypatch.setattr(stage, "usable", lambda device: False)
    proof.begin(tmp_path, [])
    assert not stage.run("correctness", tmp_path / RESULTS, CPU)
    assert stage.run("correctness", tmp_path / RESULTS, CPU)
    assert [r["status"] for r in items_of(records(tmp_path), "correctness").values()] == ["failed", "done"]


def test_an_interrupt_ends_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops() -> Record:
        raise KeyboardInterrupt

    fake(monkeypatch, a=stops, b=dict)
    proof.begin(tmp_path, [])
    assert not stage.run("correctness", tmp_path / RESULTS, CPU)
    assert [r["status"] for r in items_of(records(tmp_path), "correctness").values()] == ["stopped"]


@pytest.mark.parametrize(
    ("codes", "status", "processes"),
    [
        ([0], "done", 1),
        ([-11, 0], "done", 2),  # the item that ended the first is left out by the second
        ([3, None], "timed out", 2),
        ([1], "ended with 1", 1),  # it did not get to any item
    ],
)
def test_processes_are_started_while_they_get_further(
    codes: list[int | None], status: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def process(command: list[str], log: Any, seconds: float, cache: str) -> int | None:
        started.append(seconds)
        log.write(b"what it printed")
        log.flush()
        code = codes[len(started) - 1]
        if code != 1:
            report.append(tmp_path / RESULTS, {"stage": "tiles", "item": str(len(started)), "status": "begun"})
        return code

    monkeypatch.setattr(proof, "process", process)
    proof.begin(tmp_path, [])
    (tmp_path / LOG).write_bytes(b"earlier output")
    record = proof.run_stage("tiles", tmp_path, 20.0 + proof.STOP_SECONDS, "cache")
    assert record["status"] == status
    assert len(started) == processes
    assert all(19 < seconds <= 20 for seconds in started)
    assert record.get("printed") == (None if codes[-1] == 0 else "what it printed" * processes)


def test_a_process_whose_time_is_over_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter()
    hangs = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(proof, "STOP_SECONDS", 0.2)
    with (tmp_path / LOG).open("wb") as log:
        assert proof.process([sys.executable, "-c", hangs], log, 0.5, "cache") is None
    assert time.perf_counter() - began < 10


def test_an_earlier_run_is_picked_up(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.jsonl"
    report.begin(earlier, {})
    for line in (
        {"stage": "machine", "item": "limits", "status": "done"},
        {"stage": "machine", "status": "done"},
        {"stage": "tiles", "item": "a", "status": "begun"},
        {"stage": "tiles", "item": "a", "status": "done", "ms": 2.0},
        {"stage": "tiles", "item": "b", "status": "begun"},
        {"stage": "tiles", "status": "timed out"},
        {"stage": "attention", "status": "done"},
    ):
        report.append(earlier, line)
    assert proof.begin(tmp_path, [], earlier) == {"attention"}
    assert [(r["item"], r["ms"]) for r in records(tmp_path)] == [("a", 2.0)]


FILL = ["-m", "benchmarks.gpu_proof.cache", "--processes", "1", "--only", "^gelu"]
USE = """
import sys
import time
from functools import partial
from pathlib import Path
from triton import knobs
from triton.runtime import cache as of_triton
from benchmarks.gpu_proof import cache, stage
from benchmarks.kernels.launches import pretended
if len(sys.argv) > 1:
    key = of_triton.triton_key()
    of_triton.triton_key = lambda: key + "another build"
unpacked = cache.unpack()
knobs.compilation.listener = stage.Compilations()
with pretended(cache.ARCH):
    next(call for name, call in cache.work().items() if name.startswith("gelu"))()
print(unpacked["kernels"], unpacked["renamed"], vars(knobs.compilation.listener))
"""


@pytest.mark.slow
def test_prepared_kernels_are_found_by_this_and_by_another_build_of_triton(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}

    def printed(*command: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "2 kernels, compiled: {'gelu_forward_kernel': " in printed(*FILL)
    assert "2 kernels, compiled: {}" in printed(*FILL), "what is compiled is kept"
    assert printed("-c", USE, TRITON_CACHE_DIR="one") == "2 0 {'loaded': 2, 'compiled': {}}\n"
    assert printed("-c", USE, "other", TRITON_CACHE_DIR="two") == "2 2 {'loaded': 2, 'compiled': {}}\n"
