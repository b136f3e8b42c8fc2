"""Chapter 8: the FLOPs of a token by part of the model, and a profile of real steps of tiny-cpu on this CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.figure import Figure

from docs.guide.pictures.frame import ROOT, Run, blank
from llm.config.parse import parse_config
from llm.plan.flops import flops_by_part
from llm.profile.record import Part, Record

RUNS: tuple[Run, ...] = ()
MODELS = ("tiny-cpu", "gpt2-124m")
# Okabe and Ito's colours, which a colour-blind person can tell apart.
COLOURS = {
    "feed_forward": "#0072B2", "head_loss": "#E69F00", "qkv": "#009E73", "attention": "#D55E00",
    "attention_output": "#56B4E9", "norm": "#999999",
}  # fmt: skip


def profile(folder: Path) -> Record:
    """Three profiled steps of tiny-cpu in one process with one thread."""
    config = ["--config", "launch/configs/tiny-cpu.yaml", "--name=guide-speed", "--train.engine=plain"]
    command = [sys.executable, "launch/profile_step.py", *config, "--steps=3", "--prepare", f"--out={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return Record.load(folder / "rank-0.json")


def seconds(part: Part) -> float:
    return (part.forward_ms + part.backward_ms + part.recompute_ms) / 1e3


def flops() -> Figure:
    """A bar of each model, cut into its parts."""
    figure = blank(8, 3.2)
    axes = figure.subplots()
    for row, name in enumerate(MODELS):
        config = parse_config(["--config", str(ROOT / f"launch/configs/{name}.yaml")])
        work = flops_by_part(config.model, config.data.seq_len)
        total, left = sum(work.values()), 0.0
        for part, colour in COLOURS.items():
            share = 100 * work[part] / total
            axes.barh(row, share, 0.6, left, color=colour, edgecolor="white", label=part if row == 0 else None)
            if share > 3:
                axes.text(left + share / 2, row, f"{share:.0f} %", ha="center", va="center", fontsize=10)
            left += share
        axes.text(0.4, row - 0.37, f"{name}: {total / 1e6:,.1f} million FLOPs per token", fontsize=10)
    axes.set(yticks=[], xlim=(0, 100), ylim=(1.5, -0.7), xlabel="share of the FLOPs of a token (percent)")
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=9, handlelength=1)
    return figure


def time_by_part(record: Record) -> Figure:
    """What each part takes of a step's FLOPs and of its time."""
    parts = sorted(record.parts, key=lambda part: -seconds(part))
    work, step = sum(part.flops for part in parts), record.step_ms / 1e3
    parts = [part for part in parts if seconds(part) > 0.004 * step]
    figure = blank()
    axes, rows = figure.subplots(), np.arange(len(parts))
    for offset, values, colour, label in (
        (-0.2, [100 * seconds(part) / step for part in parts], "#0072B2", "of the time"),
        (0.2, [100 * part.flops / work for part in parts], "#E69F00", "of the FLOPs"),
    ):
        bars = axes.barh(rows + offset, values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.set(yticks=rows, yticklabels=[part.name for part in parts], xlabel="share of a step (percent)")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(frameon=False, loc="lower right")
    return figure


def best(action: Callable[[], object]) -> float:
    """Seconds that an action takes at least, of twenty times."""

    def once() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return min(once() for _ in range(20))


def operations() -> dict[str, tuple[float, float]]:
    """FLOPs per byte and GFLOP/s of three operations in fp32, each input and result moved once."""
    torch.set_num_threads(1)
    a, b, vector = torch.randn(4096, 4096), torch.randn(4096, 4096), torch.randn(4096)
    small, out = torch.randn(512, 512), torch.empty(4096, 4096)
    counted = {
        "a + b": (a.numel(), 12 * a.numel(), lambda: torch.add(a, b, out=out)),
        "matrix @ vector": (2 * a.numel(), 4 * a.numel(), lambda: a @ vector),
        "matrix @ matrix": (2 * 512**3, 12 * small.numel(), lambda: small @ small),
    }
    return {name: (work / moved, work / best(action) / 1e9) for name, (work, moved, action) in counted.items()}


def roofline(record: Record) -> Figure:
    """The model's parts, and three operations, below what the machine can do at best."""
    figure = blank()
    axes = figure.subplots()
    measured, machine = operations(), record.machine
    peak = max(machine.matmul_tflops * 1e3, measured["matrix @ matrix"][1])
    copy = max(machine.copy_gbs, *(speed / intensity for intensity, speed in measured.values() if intensity < 1))
    x = np.geomspace(0.05, 300, 200)
    axes.plot(x, np.minimum(peak, copy * x), color="#444444")
    axes.axvline(peak / copy, color="#444444", lw=1, ls=":")
    axes.text(peak / copy * 1.2, peak * 1.15, f"{peak:.0f} GFLOP/s of arithmetic", fontsize=9)
    axes.text(0.3, copy * 0.5, f"{copy:.0f} GB/s of memory", ha="right", fontsize=9)
    for name, at in measured.items():
        axes.plot(*at, "s", ms=7, color="#444444")
        axes.annotate(name, at, (8, -12), textcoords="offset points", fontsize=9)
    for part in record.parts:
        if part.flops:
            at = part.flops / part.bytes, part.flops / seconds(part) / 1e9
            axes.plot(*at, "o", ms=8, color=COLOURS[part.name], label=part.name)
    axes.legend(loc="lower right", frameon=False, fontsize=9, title="parts of tiny-cpu")
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOPs per byte)", ylabel="speed (GFLOP/s)")
    axes.set_ylim(0.7, peak * 2)
    return figure


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    with TemporaryDirectory() as folder:
        # The fastest of three: other programs of the machine slow a profile.
        record = min((profile(Path(folder) / str(i)) for i in range(3)), key=lambda record: record.step_ms)
    return {"flops": flops(), "step-time": time_by_part(record), "roofline": roofline(record)}
