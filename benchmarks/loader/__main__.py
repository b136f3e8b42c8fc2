"""`python -m benchmarks.loader`: measures Ingot's data loader beside others on the same tokens, in turns.

It writes results.jsonl (a line per measurement), results.md and results.png. If it was stopped, run it with the same
folder, and it goes on. Another loader is measured if its package is installed (docs/benchmarks.md says what to install)
and its batches are right. --quick: Ingot, nanoGPT and a C loop alone, in a minute. Linux only. The exit code is 1 if
Ingot gave wrong batches or failed.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

from llm.errors import InputError

PACKAGES = ("torch", "numpy", "megatron-core", "torchdata", "mosaicml-streaming", "litdata")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens, and no packages of others")
    parser.add_argument("--only", default="", help="a regular expression to be found in 'system task item T=...'")
    parser.add_argument("--rounds", type=int, help="of everything that is measured in rounds")
    parser.add_argument("--out", type=Path, help="folder of the results and the tokens (10 GB)")
    options = parser.parse_args(arguments)
    # Imported here, so that --help does not wait for torch.
    import torch

    from benchmarks.loader.report import line, plot_rates, tables
    from benchmarks.loader.runner import FAILURES, Runner
    from benchmarks.loader.systems import SYSTEMS
    from benchmarks.report import header

    out = (options.out or Path("runs/bench-loader-quick" if options.quick else "runs/bench-loader")).resolve()
    # One thread each, in every process that is started from here, as one core is what they get.
    os.environ["OMP_NUM_THREADS"] = "1"
    given = sys.argv[1:] if arguments is None else arguments
    head = header("benchmarks.loader", given, torch.device("cpu"), PACKAGES)
    head["open_files"] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    runner, began = Runner(out, options.quick, options.only, options.rounds), time.perf_counter()
    try:
        for record in runner.run(head):
            print(f"{time.perf_counter() - began:5.0f} s  {line(record)}", flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = tables(runner.head, runner.records)
    (out / "results.md").write_text(text)
    plot_rates(runner.records, out / "results.png")
    print(text)
    ours = [record for record in runner.records if SYSTEMS[record["system"]].role == "ours"]
    return 1 if not ours or any(record.keys() & FAILURES for record in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
