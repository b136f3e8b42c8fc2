"""Trains the LSTM and the first run's GPT, as large, on the same batches of the standard library, in turns.

    OMP_NUM_THREADS=1 python -m benchmarks.lstm --steps 1400      writes docs/lstm.png and runs/lstm/results.jsonl

One process, one thread, a step of each in turn. Seconds are those of the processor, by the process's own clock, within
forward and backward pass and update: what else runs on the machine hardly counts. A peak learning rate for each is
given with --lr; `--sweep` compares three for each, over as many steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import Curve, Panel, Record, append, begin, header, heading, number, plot, read, table
from llm.config import RunConfig
from llm.config.parse import parse_config
from llm.data.corpora import Corpora, unprepared
from llm.data.loader import open_loader, validation_batches
from llm.data.prepare.console import prepare_all
from llm.errors import require
from llm.plan.memory import parameters
from llm.train.build import build_model
from llm.train.engines.base import micro_batch
from llm.train.engines.plain import PlainEngine
from llm.train.optim import learning_rate

CPU = torch.device("cpu")
FAMILIES = {"GPT": "tiny-cpu", "LSTM": "lstm-cpu"}
SWEEP = {"GPT": (1e-3, 2e-3, 4e-3), "LSTM": (1.6e-2, 2.4e-2, 3.2e-2)}
POINTS = 20  # validations, evenly over the run
PARAMETERS_APART = 0.01  # at most


def configs(steps: int, validation_samples: int, rates: dict[str, float]) -> dict[str, RunConfig]:
    """The two runs, by family: they differ in model and learning rate alone."""
    common = {"train.engine": "plain", "train.max_steps": steps, "data.validation_samples": validation_samples}
    common |= {"optim.warmup_steps": min(100, max(1, steps // 10))}
    found = {}
    for family, name in FAMILIES.items():
        options = common | ({"optim.lr": rates[family]} if family in rates else {})
        words = [f"--{key}={value}" for key, value in options.items()]
        found[family] = parse_config(["--config", f"launch/configs/{name}.yaml", *words], prog="benchmarks.lstm")
    gpt, lstm = found["GPT"], found["LSTM"]
    sizes = [parameters(config.model) for config in (gpt, lstm)]
    require(abs(sizes[0] / sizes[1] - 1) <= PARAMETERS_APART, f"{sizes} parameters; expected equal ones, within 1 %")
    same = replace(lstm, name=gpt.name, model=gpt.model, optim=replace(lstm.optim, lr=gpt.optim.lr))
    require(same == gpt, "the configs differ in more than model and learning rate")
    return found


class Contender:
    """One of the two, and the processor's seconds that it has taken."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.seconds, self.tokens = config, 0.0, 0
        self.engine = PlainEngine(config, build_model(config, None), None, CPU)

    def step(self, number: int, batches: list[Any], targets: int) -> None:
        start = time.process_time()
        self.engine.set_lr(learning_rate(self.config.optim, number, self.config.train.max_steps))
        self.engine.forward_backward(batches, targets)
        self.engine.step()
        self.seconds += time.process_time() - start
        self.tokens += targets

    def validate(self, corpora: Corpora) -> float:
        batches = validation_batches(corpora, dp_rank=0, dp_size=1)
        total, count = self.engine.evaluate(micro_batch(batch, CPU, rows) for batch, rows in batches)
        return total / count


def measure(runs: dict[str, RunConfig], path: Path) -> None:
    """Train all of `runs` in turns; a record per validation of each."""
    config = next(iter(runs.values()))
    corpora = Corpora.open(config)
    loader = open_loader(corpora, dp_rank=0, dp_size=1, widen=True)
    contenders, steps = {name: Contender(run) for name, run in runs.items()}, config.train.max_steps
    at = {round(steps * i / POINTS) for i in range(1, POINTS + 1)}
    for done in range(steps):
        step = loader.next_step()
        batches = [micro_batch(batch, CPU) for batch in step.batches]
        for contender in contenders.values():
            contender.step(done, batches, step.target_count)
        for name, each in contenders.items() if done + 1 in at else ():
            point = {"tokens": each.tokens, "seconds": each.seconds, "loss": each.validate(corpora)}
            size, rate = parameters(each.config.model), each.config.optim.lr
            append(path, {"name": name, "lr": rate, "parameters": size, "step": done + 1} | point)
            print(f"{name} {done + 1}/{steps}: {point['loss']:.3f} nats, {each.seconds:.0f} s", file=sys.stderr)
    loader.close()


def of(records: list[Record], name: str, *keys: str) -> list[tuple[float, ...]]:
    return [tuple(record[key] for key in keys) for record in records if record["name"] == name]


def reached(points: list[tuple[float, ...]], loss: float) -> float | None:
    """Where a curve of (x, loss) first is at `loss`, between two points on a straight line; None: nowhere."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= loss <= y0:
            return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return None


def verdict(records: list[Record]) -> list[str]:
    """Lines of the page: losses at equal tokens, at equal seconds, and what the GPT needs for the LSTM's last loss."""
    rows = []
    last = {name: next(r for r in reversed(records) if r["name"] == name) for name in FAMILIES}
    equal = min(record["seconds"] for record in last.values())
    for name, record in last.items():
        seconds, losses = zip(*of(records, name, "seconds", "loss"), strict=True)
        then = float(np.interp(equal, seconds, losses))
        rate = record["tokens"] / record["seconds"]
        cells = [f"{record['parameters']:,}", f"{record['lr']:g}", f"{record['loss']:.3f}", f"{then:.3f}"]
        rows.append([name, *cells, number(rate)])
    head = ["", "parameters", "peak learning rate", f"loss after {last['GPT']['tokens']:,} tokens"]
    lines = table([*head, f"loss after {equal:.0f} s", "tokens/s"], rows)
    for key in ("tokens", "seconds"):
        share = reached(of(records, "GPT", key, "loss"), last["LSTM"]["loss"])
        if share is not None:
            lines.append(f"The GPT is at the LSTM's last loss after {share / last['LSTM'][key]:.0%} of its {key}.")
    return lines


def draw(records: list[Record], path: Path) -> None:
    """Two panels: loss by tokens and by seconds."""
    panels = []
    for key, label, unit in (("tokens", "tokens, millions", 1e6), ("seconds", "seconds of one CPU core", 1.0)):
        lines = {name: [(x / unit, y) for x, y in of(records, name, key, "loss")] for name in FAMILIES}
        longest = max(x for points in lines.values() for x, _ in points)
        ticks = [(longest * i / 5, number(longest * i / 5)) for i in range(6)]
        curves = [Curve(name, points, "ours" if name == "GPT" else "peer") for name, points in lines.items()]
        title = f"Validation loss by {key}"
        panels.append(Panel(title, label, "nats per token", curves, ticks, log_x=False))
    plot(path, panels, "A GPT and an LSTM of equal size on Python's standard library")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--validation-samples", type=int, default=256)
    parser.add_argument("--lr", action="append", default=[], metavar="FAMILY=RATE", help="as --lr LSTM=8e-3")
    parser.add_argument("--sweep", action="store_true", help="three learning rates of each, last losses, no plot")
    parser.add_argument("--draw", action="store_true", help="draw what was measured again")
    parser.add_argument("--results", type=Path, default=Path("runs/lstm/results.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("docs/lstm.png"))
    args = parser.parse_args()
    if not args.draw:
        runs = configs(args.steps, args.validation_samples, {k: float(v) for k, v in (x.split("=") for x in args.lr)})
        if unprepared(runs["GPT"]):
            print(prepare_all(runs["GPT"]), file=sys.stderr)
        torch.set_num_threads(1)
        if args.sweep:
            runs = {
                f"{name} {rate:g}": replace(runs[name], optim=replace(runs[name].optim, lr=rate))
                for name, rates in SWEEP.items()
                for rate in rates
            }
        begin(args.results, header("benchmarks.lstm", sys.argv[1:], CPU, ["torch"]))
        measure(runs, args.results)
    head, records = read(args.results)
    if args.sweep:
        return
    draw(records, args.plot)
    print("\n".join([heading(head), "", *verdict(records)]))


if __name__ == "__main__":
    main()
