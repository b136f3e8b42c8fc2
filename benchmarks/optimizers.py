"""Trains the tiny config by AdamW and by Muon at the same learning rates and seeds, on the same batches in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.optimizers --steps 100      writes runs/optimizers/<seed>.jsonl

One process and thread. Seconds are the processor's, within forward and backward pass and update. A seed draws initial
weights and the order of samples; one that was measured before, in as many steps, is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks.lstm import CPU, measure, of, reached
from benchmarks.report import NONE, Record, begin, header, heading, number, read, table
from llm.config import RunConfig
from llm.config.parse import parse_config
from llm.data.corpora import unprepared
from llm.data.prepare.console import prepare_all

OPTIMIZERS = ("adamw", "muon")
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def configs(steps: int, validation_samples: int, seed: int, rates: Sequence[float]) -> dict[str, RunConfig]:
    """A run of each optimizer at each rate, by name."""
    common = {"train.engine": "plain", "train.max_steps": steps, "optim.warmup_steps": max(1, steps // 10)}
    common |= {"data.validation_samples": validation_samples, "seed": seed}
    found = {}
    for optimizer, rate in product(OPTIMIZERS, rates):
        options = {**common, "optim.name": optimizer, "optim.lr": rate}
        words = ["--config", "launch/configs/tiny-cpu.yaml", *(f"--{key}={value}" for key, value in options.items())]
        found[f"{optimizer} {rate:g}"] = parse_config(words, prog="benchmarks.optimizers")
    return found


def last(records: list[Record], name: str) -> Record:
    return next(record for record in reversed(records) if record["name"] == name)


def best(seeds: dict[int, list[Record]], optimizer: str) -> str:
    """The run with the lowest mean of last losses over the seeds."""
    names = {record["name"] for records in seeds.values() for record in records}
    mean = {name: sum(last(records, name)["loss"] for records in seeds.values()) for name in sorted(names)}
    return min((name for name in mean if name.startswith(optimizer)), key=mean.__getitem__)


def verdict(seeds: dict[int, list[Record]]) -> list[str]:
    """Lines of the page: last losses at every rate, and what Muon needs for AdamW's, each at its best rate."""
    rows = []
    for name in dict.fromkeys(record["name"] for record in next(iter(seeds.values()))):
        ends = [last(records, name) for records in seeds.values()]
        losses = [f"{end['loss']:.4f}" for end in ends]
        seconds = sum(end["seconds"] / end["step"] for end in ends) / len(ends)
        rows.append([name, *losses, f"{sum(end['loss'] for end in ends) / len(ends):.4f}", f"{1e3 * seconds:.0f}"])
    lines = table(["optimizer, rate", *(f"seed {seed}" for seed in seeds), "mean", "CPU-ms a step"], rows)
    adamw, muon = (best(seeds, optimizer) for optimizer in OPTIMIZERS)
    rows = []
    for seed, records in seeds.items():
        goal = last(records, adamw)
        cells = [str(seed), f"{goal['loss']:.4f}"]
        for key in ("step", "seconds"):
            found = reached(of(records, muon, key, "loss"), goal["loss"])
            cells += [number(goal[key]), NONE if found is None else number(found)]
            cells.append(NONE if found is None else f"{goal[key] / found:.2f} x")
        rows.append(cells)
    heads = [f"{key}, {name}" for key in ("steps", "CPU-seconds") for name in (adamw, muon, "fewer")]
    return [*lines, "", *table(["seed", f"last loss of {adamw}", *heads], rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--validation-samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help='as --only "adamw 0.004" "muon 0.016"')
    parser.add_argument("--results", type=Path, default=Path("runs/optimizers"), help="a folder, of one run's files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, heads = {}, []
    for seed in args.seeds:
        path = args.results / f"{seed}.jsonl"
        if not path.exists():
            runs = configs(args.steps, args.validation_samples, seed, args.rates)
            if args.only and ({*args.only} - {*runs} or {name.split()[0] for name in args.only} != {*OPTIMIZERS}):
                parser.error(f"--only: found {args.only}, expected some of each optimizer of {[*runs]}")
            runs = {name: run for name, run in runs.items() if name in (args.only or runs)}
            if unprepared(next(iter(runs.values()))):
                print(prepare_all(next(iter(runs.values()))), file=sys.stderr)
            partial = path.with_suffix(".part")
            begin(partial, header("benchmarks.optimizers", sys.argv[1:], CPU, ["torch"]))
            measure(runs, partial)
            partial.rename(path)
        head, seeds[seed] = read(path)
        if (steps := seeds[seed][-1]["step"]) != args.steps:
            parser.error(f"--steps: {path} has {steps}, expected {args.steps}; use another --results")
        heads.append(head)
    print("\n".join([heading(heads[0]), "", *verdict(seeds)]))


if __name__ == "__main__":
    main()
