"""Speed of the tiny config beside the same model in plain PyTorch, measured in turns on this machine.

usage: bench_step.py [ROUNDS] [STEPS]      needs the prepared corpus; prints a table and the time to the first step
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import shutil
import statistics
import subprocess
import time

from llm.config.parse import parse_config
from llm.data.tokens.folder import data_folder

CONFIG = "launch/configs/tiny-cpu.yaml"
WARM_UP, TOKENS = 5, 32 * 128  # steps not counted; tokens of a step
PEER = "plain PyTorch, 1 process"
QUIET = ["--logging.tensorboard=false", "--logging.sample_tokens=0", "--train.eval_interval=100000"]
TWO_RANKS = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"]
# Launcher and settings; the differences between rows say where the time goes.
ROWS = {
    "Ingot, plain engine, 1 process": ([sys.executable], "--train.engine=plain --train.micro_batch_size=32"),
    "Ingot, DeepSpeed, 1 process": ([sys.executable], "--train.micro_batch_size=32"),
    "Ingot, DeepSpeed, 2 ranks": (TWO_RANKS, ""),
    "Ingot, DeepSpeed, 2 ranks, TP 2": (TWO_RANKS, "--parallel.tensor_parallel=2"),
}  # fmt: skip


def plain(steps: int) -> tuple[float, float]:
    """The same two figures as `ingot`, of the plain PyTorch model on all cores."""
    tokens = data_folder(parse_config(["--config", CONFIG])) / "train.bin"
    command, began = [sys.executable, "benchmarks/plain_gpt.py", str(tokens), str(steps)], time.perf_counter()
    seconds = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return statistics.median(seconds[WARM_UP:]), time.perf_counter() - began - sum(seconds[1:])


def ingot(launcher: list[str], settings: str, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and seconds from the command to the first step's metrics."""
    run = Path("runs/bench-step")
    shutil.rmtree(run, ignore_errors=True)
    command = [
        *launcher,
        "launch/pretrain.py",
        "--config",
        CONFIG,
        f"--name={run.name}",
        *settings.split(),
    ]
    began = time.perf_counter()
    process = subprocess.Popen([*command, f"--train.max_steps={steps}", *QUIET], stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    first = time.perf_counter() - began
    assert process.wait() == 0, f"{command} failed"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds = [record["step_seconds"] for record in records if "loss" in record]
    return statistics.median(seconds[WARM_UP:]), first


def main(rounds: int, steps: int) -> None:
    measured: dict[str, list[tuple[float, float]]] = {PEER: [], **{name: [] for name in ROWS}}
    for _ in range(rounds):  # in turns, so that a slow minute of the machine hits every row
        measured[PEER].append(plain(steps))
        for name in ROWS:
            measured[name].append(ingot(*ROWS[name], steps))
    base = statistics.median(step for step, _ in measured[PEER])
    print("| | ms per step | tokens/s | against plain | to the first step, s |\n|---|---|---|---|---|")
    for name, pairs in measured.items():
        step, first = map(statistics.median, zip(*pairs, strict=True))
        print(f"| {name} | {step * 1e3:.0f} | {TOKENS / step:,.0f} | {base / step:.2f} | {first:.1f} |")


if __name__ == "__main__":
    main(*(int(a) for a in [*sys.argv[1:], *["3", "40"][len(sys.argv) - 1 :]]))
