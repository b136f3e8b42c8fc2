"""Measures what DeepSpeed's engine costs the host in a step, beyond the plain engine, on one rank.

Two ways, for the same small model. The CPU-seconds of a step less those of the plain engine's, paired by round, with
the range of the rounds: this is all that another engine costs, its copies and norms too. And the parts of a step that
are in the code of DeepSpeed, of Ingot and of torch: cProfile's shares, which overstate small functions.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from benchmarks.clock import alternate
from benchmarks.contenders import LAYOUTS, config_of, is_compiled
from benchmarks.report import NONE, header, heading, table
from benchmarks.step import PACKAGES, Process, Turn

BASE = "Ingot, plain"
NAMES = [BASE, *(name for name in LAYOUTS if "DeepSpeed" in name and not is_compiled(name))]
HEAD = ["", "CPU-ms", "beyond plain, ms", "least to most", "in DeepSpeed, ms", "in Ingot, ms", "in torch, ms"]


def row(name: str, turns: Sequence[Turn], base: Sequence[Turn], host: dict[str, float]) -> list[str]:
    beyond = [1e3 * (ours.cpu - theirs.cpu) for ours, theirs in zip(turns, base, strict=True)]
    middle, low, high = (f"{f(beyond):+.2f}" for f in (statistics.median, min, max))
    cpu, profiled = 1e3 * statistics.median(turn.cpu for turn in turns), sum(host.values())
    ms = {package: cpu * seconds / profiled for package, seconds in host.items()}
    ingot = ms.get("llm", 0.0) + ms.get("kernels", 0.0)
    return [
        *(name, f"{cpu:.2f}"),
        *((NONE, NONE) if name == BASE else (middle, f"{low} to {high}")),
        *(f"{ms['deepspeed']:.2f}" if "deepspeed" in ms else NONE, f"{ingot:.2f}", f"{ms['torch']:.2f}"),
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each engine")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step: few, for the overhead is per step")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(heading(header("benchmarks.overhead", arguments, device, PACKAGES)))
    config, process = config_of("tiny", "GPT-2", options.batch, "fp32"), Process(1, 1)
    for name in NAMES:
        process.ask("make", name, name, config)
    turns = {name: list[Turn]() for name in NAMES}
    for name in alternate(NAMES, options.rounds):
        turns[name] += process.ask("turn", name, options.steps)
    found = [row(name, turns[name], turns[BASE], process.ask("host", name, options.steps)[0]) for name in NAMES]
    process.close()
    print("", *table(HEAD, found), sep="\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
