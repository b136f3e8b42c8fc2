"""Ingot's data loader beside others on the same tokens: rates, latency, memory, starting, resuming, waiting.

usage: bench_loader.py [--quick] [--only REGEX] [--rounds N] [--minutes N] [--out FOLDER]

Writes results.jsonl (a line per measurement), results.md and results.png. Run again with the same folder it goes on
where it was stopped. Each other loader is measured where its package is installed (docs/data.md says what to install)
after its batches were found to be right. --quick: Ingot, NumPy and a C program alone, in a minute. Linux. Exit code 1:
Ingot gave wrong batches or failed.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

from benchmarks.loader.machine import describe
from benchmarks.loader.report import line, plot, table
from benchmarks.loader.runner import Runner
from benchmarks.loader.systems import SYSTEMS
from llm.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_loader.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few tokens, and no packages of others")
    parser.add_argument("--only", default="", help="a regular expression to be found in 'system task item T=...'")
    parser.add_argument("--rounds", type=int, help="of everything that is measured in rounds")
    parser.add_argument("--minutes", type=float, default=20.0, help="begin no round that would take it beyond this")
    parser.add_argument("--out", type=Path, help="folder of the results and the tokens (10 GB)")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs/bench-loader-quick" if options.quick else "runs/bench-loader")
    # One thread each, in every process that is started from here, as one core is what they get.
    os.environ["OMP_NUM_THREADS"] = "1"
    command = shlex.join(["benchmarks.loader", *(sys.argv[1:] if arguments is None else arguments)])
    runner = Runner(out.resolve(), options.quick, options.minutes, options.only, options.rounds)
    records, began = [], time.perf_counter()
    try:
        for record in runner.run(describe() | {"command": command, "date": time.strftime("%Y-%m-%d")}):
            records.append(record)
            if "label" in record and len(records) > runner.earlier:
                print(f"{time.perf_counter() - began:5.0f} s  {line(record)}", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(records)
    (out / "results.md").write_text(text)
    plot(records, out / "results.png")
    print(text)
    ours = [record for record in records if SYSTEMS.get(record.get("system", ""), SYSTEMS["nanoGPT"]).role == "ours"]
    return 1 if not ours or any(record.keys() & {"wrong", "error", "absent"} for record in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
