"""A run through many faults, one after the other, beside one that nothing disturbs: `make soak SECONDS=600 SEED=1`.

A schedule drawn from the seed says at which step what happens, and in which layout the run goes on: ranks are killed or
hang (SIGSTOP), the newest checkpoint is cut short, the disk is full, the run is asked to stop. Its losses must be those
of the undisturbed run: exactly until the layout first changes, and to 1e-5 of each after that. One seed in four keeps
the layout, and then all are exact; one in two saves beside the steps. Exit code 1 if anything fails; the schedule is
printed, and the seed makes it again.

`--kinds "kill one" --every 60` kills a rank once a minute, and nothing else: the goodput of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[folder]) for folder in (2, 1, 0)]

import psutil  # noqa: E402

from runs import Workspace, succeeded  # noqa: E402

PACE = 0.2  # seconds that a step takes at least
INTERVAL = 10  # steps between saves
COST = 15  # seconds that a fault costs, at most: its detection, the next start, steps done again
LIMIT = 120  # seconds for a start, or for an end
DISK = "size=16m"
FSDP = dict(train__engine="fsdp", parallel__zero_stage=3)
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "python": ("python", 1, dict(train__engine="plain")),
    "torchrun-2": ("torchrun", 2, dict(train__engine="plain")),
    "torchrun-4": ("torchrun", 4, dict(train__engine="plain")),
    "torchrun-2-fsdp": ("torchrun", 2, FSDP),
    "torchrun-2-tp": ("torchrun", 2, FSDP | dict(parallel__tensor_parallel=2)),
    "torchrun-4-tp": ("torchrun", 4, FSDP | dict(parallel__tensor_parallel=2)),
    "deepspeed-2-zero1": ("deepspeed", 2, dict(train__engine="deepspeed", parallel__zero_stage=1)),
}
KINDS = ("kill one", "kill all", "truncate", "full disk", "preempt", "stall")


class Fault(NamedTuple):
    step: int
    kind: str
    rank: int
    """Of those there are, counted round."""
    layout: str
    """In which the run goes on."""


def schedule(seed: int, count: int, steps: int, kinds: tuple[str, ...]) -> tuple[str, list[Fault]]:
    """The first layout, and `count` faults, each kind in turn before any comes again, spread over the steps."""
    draw = random.Random(seed)
    first = layout = draw.choice(["python", "torchrun-2", "torchrun-4"])
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += draw.sample(kinds, len(kinds))
    faults, part = [], steps / (count + 0.5)
    for number, kind in enumerate(drawn[:count]):
        if kind == "stall" and layout == "python":
            kind = "kill all"  # there is no other rank that could notice
        layout = layout if seed % 4 == 0 else draw.choice(list(LAYOUTS))
        faults.append(Fault(round(part * (number + draw.uniform(0.6, 1.0))), kind, draw.randrange(4), layout))
    return first, faults


class Soak:
    """The disturbed run, in a folder of its own."""

    def __init__(self, space: Workspace, steps: int, seed: int, say: Callable[[str], None]) -> None:
        self.space, self.steps, self.say = space, steps, say
        self.settings = dict(
            seed=seed, train__max_steps=steps, train__eval_interval=50, train__stall_seconds=10,
            checkpoint__interval=INTERVAL, checkpoint__keep_last=3, checkpoint__asynchronous=str(seed % 2 == 1).lower(),
            optim__lr=1e-4, optim__min_lr=1e-4,
        )  # fmt: skip
        self.checkpoints = space.path / "runs/soak/checkpoints"
        self.log = space.path / "started.log"
        self.patience = LIMIT + 4 * PACE * steps
        self.passed, self.failures = 0, list[str]()

    def check(self, right: bool, what: str) -> None:
        self.passed += right
        self.failures += [] if right else [what]
        self.say(f"  {'passed' if right else 'FAILED'}: {what}")
        if not right and self.log.exists():
            self.say(self.log.read_text()[-3000:])

    def command(self, layout: str, name: str, pace: float) -> list[str]:
        launcher, ranks, changes = LAYOUTS[layout]
        settings = self.settings | changes | {"train__micro_batch_size": 2, "name": name}
        return self.space.faulty(launcher, "paced", str(pace), ranks, **settings)

    def undisturbed(self, layout: str) -> None:
        succeeded(self.space.run(self.command(layout, "whole", 0)))

    def last_step(self) -> int:
        """The last step in metrics.jsonl; a line that is being written does not count."""
        path = self.space.path / "runs/soak/metrics.jsonl"
        found = re.findall(r'^\{"step": (\d+).*"loss".*\}$', path.read_text(), re.MULTILINE) if path.exists() else []
        return int(found[-1]) if found else 0

    def wait(self, done: Callable[[], Any], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def ranks(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        with suppress(psutil.NoSuchProcess):
            return [each for each in family if "faults/paced.py" in " ".join(each.cmdline()) and not each.children()]
        return []

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Leave nothing of a start that has not ended by itself."""
        for left in [*self.ranks(process), process] if process.poll() is None else []:
            left.kill()
        process.wait()

    def inject(self, fault: Fault, process: subprocess.Popen[bytes]) -> None:
        ranks = self.ranks(process)
        chosen = ranks[fault.rank % len(ranks)]
        if fault.kind == "kill one":
            chosen.kill()
        elif fault.kind in ("kill all", "truncate"):
            for rank in ranks:
                rank.kill()
        elif fault.kind == "full disk":
            with (self.checkpoints / "filler").open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        else:
            chosen.send_signal(signal.SIGSTOP if fault.kind == "stall" else signal.SIGTERM)

    def after(self, fault: Fault) -> None:
        """What the fault has left is as it was, or is damaged, before the next start."""
        (self.checkpoints / "filler").unlink(missing_ok=True)
        found = sorted(self.checkpoints.glob("step-????????"))
        if fault.kind == "truncate" and found:
            shard = sorted(found[-1].glob("*.safetensors"))[fault.rank % len(list(found[-1].glob("*.safetensors")))]
            os.truncate(shard, shard.stat().st_size - 1)

    def survive(self, fault: Fault, layout: str) -> bool:
        """Start in `layout`, and let the fault come at its step; whether the run went there and has then ended."""
        process = self.space.start(self.command(layout, "soak", PACE))
        try:
            there = self.wait(lambda: self.last_step() >= fault.step or process.poll() is not None, self.patience)
            if not there or process.poll() is not None:
                self.check(False, f"{fault}: the run ended with {process.poll()} before it")
                return False
            family = psutil.Process(process.pid).children(recursive=True)
            self.inject(fault, process)
            fired = time.monotonic()
            ended = self.wait(lambda: process.poll() is not None, LIMIT)
            _, alive = psutil.wait_procs(family, timeout=40)
            told = f"step {fault.step}, {layout}, {fault.kind}: all ranks have ended"
            self.check(ended and not alive, f"{told} ({time.monotonic() - fired:.1f} s)")
            code, stopped = process.poll(), (self.space.path / "runs/soak/stopped.json").exists()
            # torchrun returns 0 where ranks were saved and stopped.
            wanted = code in (0, 75) and stopped if fault.kind == "preempt" else code not in (0, 2, 75)
            self.check(wanted, f"exit code {code}, {'stopped' if stopped else 'not stopped'}")
            return ended and wanted
        finally:
            self.end(process)

    def finish(self, layout: str) -> None:
        process = self.space.start(self.command(layout, "soak", PACE))
        try:
            self.check(self.wait(lambda: process.poll() is not None, self.patience), "the last start has ended")
        finally:
            self.end(process)
        self.check(process.returncode == 0, f"its exit code is {process.returncode}")


def differences(found: dict[int, float], expected: dict[int, float], exact_until: int) -> list[str]:
    """The steps that are missing or differ: at all, and after `exact_until` by more than 1e-5 of the loss."""
    told = [f"steps {sorted(found.keys() ^ expected.keys())[:9]}"] if found.keys() != expected.keys() else []
    for step in sorted(found.keys() & expected.keys()):
        allowed = 0 if step <= exact_until else 1e-5 * abs(expected[step])
        if not abs(found[step] - expected[step]) <= allowed:
            told.append(f"step {step}: {found[step]!r}, not {expected[step]!r}")
    return told


def soak(seconds: int, every: int, kinds: tuple[str, ...], seed: int, root: Path) -> Soak:
    started = time.monotonic()
    small_disk = "full disk" in kinds and os.geteuid() == 0
    count = max(1, seconds // every)
    steps = max(count * 2 * INTERVAL, round((seconds - COST * (count + 1)) / PACE))
    first, faults = schedule(seed, count, steps, tuple(kind for kind in kinds if small_disk or kind != "full disk"))
    print(f"seed {seed}: {steps} steps, first under {first}")
    for fault in faults:
        print(f"  {fault}")
    if "full disk" in kinds and not small_disk:
        print("not done here: full disk (mounting a small disk takes root)")
    space = Workspace(root / "workspace")
    succeeded(space.prepare())
    run = Soak(space, steps, seed, print)
    run.undisturbed(first)
    run.checkpoints.mkdir(parents=True)
    disk = ["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", str(run.checkpoints)]
    if small_disk:
        subprocess.run(disk, check=True)
    try:
        layout, begin = first, time.monotonic()
        for fault in faults:
            if not run.survive(fault, layout):
                break
            run.after(fault)
            layout = fault.layout
        else:
            run.finish(layout)
            report(run, first, faults, time.monotonic() - begin)
    finally:
        if small_disk:
            subprocess.run(["umount", str(run.checkpoints)], check=True)
    print(f"{time.monotonic() - started:.0f} s in all")
    return run


def report(run: Soak, first: str, faults: list[Fault], wall: float) -> None:
    """Compare the two runs, and say what the faults have cost."""
    moved = next((fault.step for fault in faults if fault.layout != first), run.steps)
    # The steps after the last checkpoint before that fault are made in the other layout.
    exact_until = run.steps if moved == run.steps else moved - 4 * INTERVAL
    records = {name: run.space.metrics(name) for name in ("soak", "whole")}
    for key in ("loss", "val_loss"):
        found, expected = ({r["step"]: r[key] for r in records[name] if key in r} for name in ("soak", "whole"))
        told = differences(found, expected, exact_until)
        run.check(bool(found) and not told, f"each {key} is that of the undisturbed run {'; '.join(told[:5])}".rstrip())
    useful = run.steps * median(record["step_seconds"] for record in records["soak"] if "step_seconds" in record)
    cost = (wall - useful) / len(faults)
    print(
        f"goodput {useful / wall:.0%} over {wall:.0f} s with {len(faults)} faults, {cost:.1f} s each; "
        f"with one a minute {1 - cost / 60:.0%} (goal 80%)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--every", type=int, default=30, help="seconds between faults, on average")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the disk is unmounted and the ranks are ended
    root = Path(tempfile.mkdtemp(prefix="ingot-soak-"))
    try:
        run = soak(options.seconds, options.every, tuple(options.kinds), seed, root)
    finally:
        shutil.rmtree(root)
    if run.failures:
        print(f"again: make soak SECONDS={options.seconds} SEED={seed}")
    print(f"{run.passed} passed, {len(run.failures)} failed")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
