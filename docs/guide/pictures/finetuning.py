"""Pictures of chapter 13: what fine-tuning of all weights and LoRA learn, and what they forget of the first text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from docs.guide.pictures.frame import FIRST, ROOT, Run, blank
from llm.report import read_metrics, series
from llm.trained import load_trained

FOLDER = "data/guide-finetuning"
SETTINGS = (f"--data.source={FOLDER}/docstrings.jsonl", "--train.max_steps=250", "--train.eval_interval=25")
FULL = Run("guide-finetuning-full", "finetune/chat", SETTINGS, after="tiny-cpu")
LORA = Run("guide-finetuning-lora", "finetune/chat", (*SETTINGS, "--lora.rank=8", "--optim.lr=3e-3"), after="tiny-cpu")
RUNS = (FIRST, FULL, LORA)
STYLES = {FULL.name: ("#d55e00", "s", "all weights"), LORA.name: ("#0072b2", "o", "LoRA, rank 8")}
LENGTH = 128


def prepare() -> None:
    """Mine the conversations that the runs learn, unless they are there."""
    if not (ROOT / FOLDER).exists():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        words = [sys.executable, "launch/mine_stdlib.py", "--out", FOLDER]
        subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    """`learnt-and-forgotten`: the loss of the answers while it falls, and that of the first text afterwards."""
    figure = blank(8, 3.6)
    learnt, forgotten = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, (colour, marker, label) in STYLES.items():
        steps, losses = series(read_metrics(runs[name] / "metrics.jsonl"), "val_loss")
        learnt.plot(steps, losses, color=colour, marker=marker, label=label)
    learnt.set(xlabel="step of fine-tuning", ylabel="loss of held-out answers (nats per token)")
    learnt.legend(frameon=False)
    learnt.grid(alpha=0.3)
    names = {FIRST.name: ("#444444", "o", "before"), **STYLES}
    losses = {label: first_text_loss(runs[name]) for name, (_, _, label) in names.items()}
    colours = [colour for colour, _, _ in names.values()]
    bars = forgotten.bar(list(losses), list(losses.values()), color=colours, width=0.6)
    forgotten.bar_label(bars, fmt="%.2f")
    forgotten.set(ylabel="loss of the first text (nats per token)", ylim=(0, 1.15 * max(losses.values())))
    for axes in (learnt, forgotten):
        axes.spines[["top", "right"]].set_visible(False)
    return {"learnt-and-forgotten": figure}


@torch.inference_mode()
def first_text_loss(run: Path) -> float:
    """Nats per token of a run's model, its best checkpoint if it keeps one, on the first run's validation text."""
    ids = np.fromfile(ROOT / "data/stdlib-1024/validation.bin", np.uint16).astype(np.int64)
    size = (len(ids) - 1) // LENGTH * LENGTH
    tokens, targets = (torch.from_numpy(part[:size]).view(-1, LENGTH) for part in (ids, ids[1:]))
    model = load_trained(run).model
    total = sum(
        float(model(some, targets=wanted)) for some, wanted in zip(tokens.split(32), targets.split(32), strict=True)
    )
    return total / targets.numel()
