"""Times a step of the tiny config beside the same model in plain PyTorch, in turns on this machine.

usage: python -m benchmarks.step [ROUNDS] [STEPS]      needs the prepared corpus; prints medians
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.clock import alternate
from benchmarks.report import header, heading, table
from llm.config.parse import parse_config
from llm.data.tokens.folder import data_folder

CONFIG = "launch/configs/tiny-cpu.yaml"
WARM_UP, TOKENS = 5, 32 * 128  # steps not counted; tokens of a step
QUIET = ["--logging.tensorboard=false", "--logging.sample_tokens=0", "--train.eval_interval=100000"]
TWO_RANKS = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
PEER = "plain PyTorch, 1 process"
# Launcher and settings; the differences between rows say where the time goes.
OURS: dict[str, tuple[list[str], list[str]]] = {
    "Ingot, plain engine, 1 process": ([sys.executable], ["--train.engine=plain", "--train.micro_batch_size=32"]),
    "Ingot, DeepSpeed, 1 process": ([sys.executable], ["--train.micro_batch_size=32"]),
    "Ingot, DeepSpeed, 2 ranks": (TWO_RANKS, []),
    "Ingot, DeepSpeed, 2 ranks, TP 2": (TWO_RANKS, ["--parallel.tensor_parallel=2"]),
}


def plain(steps: int) -> tuple[float, float]:
    """The same two figures as `ingot`, of the plain PyTorch model on all cores."""
    tokens = data_folder(parse_config(["--config", CONFIG])) / "train.bin"
    command, began = [sys.executable, "-m", "benchmarks.plain_gpt", str(tokens), str(steps)], time.perf_counter()
    seconds = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return median(seconds[WARM_UP:]), time.perf_counter() - began - sum(seconds[1:])


def ingot(launcher: list[str], settings: list[str], steps: int) -> tuple[float, float]:
    """Median seconds of a step, and seconds from the command to the first step's metrics."""
    run = Path("runs/bench-step")
    shutil.rmtree(run, ignore_errors=True)
    command = [*launcher, "launch/pretrain.py", "--config", CONFIG, f"--name={run.name}", *settings, *QUIET]
    began = time.perf_counter()
    process = subprocess.Popen([*command, f"--train.max_steps={steps}"], stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    first = time.perf_counter() - began
    assert process.wait() == 0, f"{command} failed"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return median([record["step_seconds"] for record in records if "loss" in record][WARM_UP:]), first


def main(rounds: int = 3, steps: int = 40) -> None:
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in (PEER, *OURS)}
    for name in alternate(list(measured), rounds):
        measured[name].append(plain(steps) if name == PEER else ingot(*OURS[name], steps))
    medians = {name: [median(figures) for figures in zip(*pairs, strict=True)] for name, pairs in measured.items()}
    base, _ = medians[PEER]
    rows = [
        [name, f"{step * 1e3:.0f}", f"{TOKENS / step:,.0f}", f"{base / step:.2f}", f"{first:.1f}"]
        for name, (step, first) in medians.items()
    ]
    print(heading(header("benchmarks.step", sys.argv[1:], torch.device("cpu"), ["torch", "deepspeed"])), end="\n\n")
    print(*table(["", "ms per step", "tokens/s", "against plain", "to the first step, s"], rows), sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
