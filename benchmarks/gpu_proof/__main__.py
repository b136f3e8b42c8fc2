"""`make gpu-proof`: proves and measures on a GPU what can be in BUDGET seconds, with no network, nothing installed.

Stages run one after another, each in processes of its own until its seconds are over (stage.py); in the time that is
left, some tests of tests/gpu. Results are lines of results.jsonl, appended as they come; log.txt has what the processes
print. A summary is printed last. On a machine without a GPU tiny shapes prove only that it runs. The exit code is 1 if
anything failed, was wrong or did not end.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import torch

from benchmarks import report
from benchmarks.gpu_proof.page import summary
from benchmarks.gpu_proof.stage import STAGES, items_of
from benchmarks.report import Record

RESULTS, LOG = "results.jsonl", "log.txt"
LEAST_SECONDS = 15.0  # with less left no process is started
STOP_SECONDS = 8.0  # from the interrupt to the kill
TAIL = 1500  # characters of the log that tell how a process ended
SAMPLE = "sample"
# Tests that need no package beyond PyTorch and Triton, and no program; the run's date chooses one in twelve.
TESTS = ("adamw", "attention", "attention_gluon", "cross_entropy", "dropout", "embedding", "gelu", "norm", "rope",
         "swiglu")  # fmt: skip
PYTEST = ["pytest", "-m", "gpu", "-q", "--tb=line", "-p", "no:cacheprovider", "--one-in", "12"]


def command(stage: str, file: Path) -> list[str]:
    if stage != SAMPLE:
        return [sys.executable, "-m", "benchmarks.gpu_proof.stage", stage, str(file)]
    workers = (os.cpu_count() or 1) // 2
    options = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    chosen = ["--chosen-by", report.read(file)[0]["date"][:10], *(f"tests/gpu/test_gpu_{name}.py" for name in TESTS)]
    return [sys.executable, "-m", *PYTEST, *options, *chosen]


def process(command: list[str], log: BinaryIO, seconds: float, cache: str) -> int | None:
    """The exit code of a command; None if it was ended, with all that it had started, because its time was over."""
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_stage(stage: str, folder: Path, left: float, cache: str) -> Record:
    """Start processes of a stage while each gets further than the one before. Returns the stage's record."""
    file, began = folder / RESULTS, time.perf_counter()
    end = began + (left if stage == SAMPLE else min(STAGES[stage][1], left))
    with (folder / LOG).open("ab+") as log:
        start, known, code = log.tell(), -1, 1
        while code not in (0, None) and len(items_of(report.read(file)[1], stage)) > known:
            known = len(items_of(report.read(file)[1], stage))
            code = process(command(stage, file), log, max(0.0, end - STOP_SECONDS - time.perf_counter()), cache)
        log.seek(start)
        printed = log.read().decode(errors="replace").strip()[-TAIL:]
    record: Record = {"stage": stage, "seconds": round(time.perf_counter() - began, 1)}
    status = {0: "done", None: "timed out"}.get(code, f"ended with {code}")
    return record | {"status": status} | ({"printed": printed} if code != 0 or stage == SAMPLE else {})


def begin(folder: Path, arguments: list[str], earlier: Path | None = None) -> set[str]:
    """Begin the file of results with what an earlier run has done. Returns the stages that it ended."""
    old = report.read(earlier)[1] if earlier else []
    packages = ("torch", "triton", "numpy")
    report.begin(folder / RESULTS, report.header("benchmarks.gpu_proof", arguments, torch.device("cpu"), packages))
    for stage in set(STAGES) - {"machine"}:  # which unpacks the cache, always
        for record in items_of(old, stage).values():
            if record["status"] in ("done", "wrong"):
                report.append(folder / RESULTS, record)
    return {r["stage"] for r in old if "item" not in r and r["status"] == "done"} - {"machine"}


def main(arguments: list[str]) -> int:
    names = [*STAGES, SAMPLE]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_proof", description=__doc__)
    parser.add_argument("--budget", type=float, default=500, help="seconds for all of it")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="stages to run, after `machine`")
    parser.add_argument("--earlier", type=Path, help="results.jsonl of an earlier run: what it has done is left out")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-proof"), help="folder of the results")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + options.budget
    ended = begin(options.out, arguments, options.earlier)
    (options.out / LOG).write_bytes(b"")
    with tempfile.TemporaryDirectory() as cache:
        for stage in [name for name in names if name == "machine" or name in {*options.only} - ended]:
            record: Record = {"stage": stage, "status": "no time was left"}
            if end - time.perf_counter() > LEAST_SECONDS:
                record = run_stage(stage, options.out, end - time.perf_counter(), cache)
            report.append(options.out / RESULTS, record)
            print(f"{stage}: {record['status']}, {record.get('seconds', 0)} s", flush=True)
    text, good = summary(*report.read(options.out / RESULTS))
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
