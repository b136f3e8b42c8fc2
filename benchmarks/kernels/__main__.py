"""`python -m benchmarks.kernels`: times every kernel beside every other implementation that is installed, in turns.

It writes results.jsonl, results.md and a plot per kernel. On a GPU it runs the shapes that others publish; on a CPU
tiny ones, which prove only that it runs. The results name the rivals that are not installed (docs/benchmarks.md says
what to install). The exit code is 1 if one of our kernels failed, or if its result differs from its reference's.
"""

import argparse
import sys
from pathlib import Path

PACKAGES = (
    "torch", "triton", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "flash-attn", "flash-attn-3",
    "flash-attn-4", "cut-cross-entropy", "apex", "transformer-engine", "deepspeed",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression to be found in 'kernel part group shape'")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-kernels"), help="folder of the results")
    options = parser.parse_args(arguments)
    # Imported here, so that --help does not wait for torch.
    import torch

    from benchmarks import report
    from benchmarks.clock import clock_of
    from benchmarks.kernels.runner import benchmark, limits_of, ours_failed
    from benchmarks.kernels.tables import plots, text_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = clock_of(device)
    head = report.header("benchmarks.kernels", sys.argv[1:] if arguments is None else arguments, device, PACKAGES)
    head |= {"method": clock.method, "limits": limits_of(device, clock)}
    file, outcomes = options.out / "results.jsonl", []
    report.begin(file, head)
    for outcome in benchmark(device, clock, options.only):
        outcomes.append(outcome)
        report.append(file, outcome)
        (options.out / "results.md").write_text(text_of(head, outcomes))  # a run that is stopped keeps its tables too
        ratio = f"{outcome['ratio']:.2f} ({outcome['best_other']})" if outcome["ratio"] else "-"
        print(f"{outcome['kernel']} {outcome['part']} {outcome['shape']}: {ratio}", flush=True)
    plots(head, outcomes, options.out)
    print(text_of(head, outcomes))
    return 1 if not outcomes or any(map(ours_failed, outcomes)) else 0


if __name__ == "__main__":
    sys.exit(main())
