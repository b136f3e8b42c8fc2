"""Speed of every kernel beside every other implementation that is installed, on the same tensors in turns.

usage: bench_kernels.py [--only REGEX] [--out FOLDER]      writes results.json, results.md and a plot per kernel

On a GPU at the shapes that others publish, on a CPU at tiny ones, which proves only that it runs. A rival that is not
installed is named in the results (docs/benchmarks.md says what to install). Exit code 1: one of our kernels failed or
computed something else than its reference.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.measure import clock_of, machine, machine_limits
from benchmarks.kernels.report import plots, table
from benchmarks.kernels.runner import benchmark, ours_failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_kernels.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="a regular expression to be found in 'kernel part group shape'")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-kernels"), help="folder of the results")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began, clock = time.perf_counter(), clock_of(device)
    results: dict[str, Any] = {
        "command": shlex.join(["benchmarks.kernels", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(device),
        "method": clock.method,
        "limits": machine_limits(device, clock),
        "cases": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for case in benchmark(device, clock, options.only):
        results["cases"].append(case)
        ratio = f"{case['ratio']:.2f} ({case['best_other']})" if case["ratio"] else "-"
        seconds = time.perf_counter() - began
        print(f"{seconds:4.0f} s  {case['kernel']} {case['part']} {case['shape']}: {ratio}", flush=True)
        # After each case, so that a run that is stopped keeps what it measured.
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "results.md").write_text(table(results))
    plots(results, options.out)
    print(table(results))
    return 1 if not results["cases"] or any(map(ours_failed, results["cases"])) else 0


if __name__ == "__main__":
    sys.exit(main())
