"""What every chapter's pictures share: the runs they are drawn from, a blank picture, and the file with its stamp."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
PICTURES = ROOT / "docs/guide"
CHAPTERS = (
    *("tokens", "embeddings", "attention", "heads", "residuals", "objective", "training", "speed", "scaling_out"),
    *("scaling_laws", "data", "generation", "finetuning"),
)
AT_ONCE = 2  # runs of one thread each
QUICK = ("--train.max_steps=4", "--optim.warmup_steps=2", "--train.eval_interval=2", "--logging.sample_tokens=0")


class Run(NamedTuple):
    """A training run: its folder is runs/<name>. One that is complete is not made again."""

    name: str
    config: str = "tiny-cpu"
    """A file of launch/configs, without its ending."""
    settings: tuple[str, ...] = ()
    """Overrides, such as --optim.lr=1e-3."""
    after: str | None = None
    """A run that must be complete before this one, as fine-tuning needs a model."""

    @property
    def script(self) -> str:
        return "launch/finetune.py" if self.config.startswith("finetune/") else "launch/pretrain.py"


FIRST, LSTM = Run("tiny-cpu"), Run("lstm-cpu", "lstm-cpu")


def make(runs: Iterable[Run], quick: bool) -> dict[str, Path]:
    """Train what is not trained yet, two runs at a time, and return every run's folder by its name.

    quick: four steps each, in folders of their own, to try the drawing.
    """
    wanted = {run.name: run for run in runs}
    names = {name: f"quick-{name}" if quick else name for name in wanted}

    def train(run: Run, *, prepare: bool) -> None:
        words = [f"--name={names[run.name]}", "--train.engine=plain", *run.settings, *(QUICK if quick else ())]
        if run.after is not None:
            words.append(f"--train.init_from=runs/{names[run.after]}")
        script = "launch/prepare_data.py" if prepare else run.script
        command = [sys.executable, script, "--config", f"launch/configs/{run.config}.yaml", *words]
        with (ROOT / f"runs/{names[run.name]}.log").open("a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
        print(f"  {' '.join(command[1:])}", flush=True)

    (ROOT / "runs").mkdir(exist_ok=True)
    for run in wanted.values():
        if run.script == "launch/pretrain.py":
            train(run, prepare=True)
    for later in (False, True):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            due = [run for run in wanted.values() if (run.after is not None) == later]
            tuple(pool.map(lambda run: train(run, prepare=False), due))
    return {name: ROOT / "runs" / folder for name, folder in names.items()}


def blank(width: float = 8, height: float = 4.5) -> Figure:
    """An empty picture; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, stamp: str) -> str:
    """A picture as SVG with its text as text, the same bytes each time."""
    file = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ingot"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Source": stamp})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def sources(chapter: str) -> list[Path]:
    """The files that a chapter's pictures come from: its module, the modules here that it imports, its configs."""
    found = {HERE / f"{chapter}.py"}
    waiting = list(found)
    while waiting:
        for name in re.findall(r"^from docs\.guide\.pictures\.(\w+) import", waiting.pop().read_text(), re.MULTILINE):
            path = HERE / f"{name}.py"
            if path not in found:
                found.add(path)
                waiting.append(path)
    runs = import_module(f"docs.guide.pictures.{chapter}").RUNS
    return sorted(found | {ROOT / f"launch/configs/{run.config}.yaml" for run in runs})


def stamp_of(chapter: str) -> str:
    """What stands in a chapter's pictures: the hash of their sources' bytes, and their names."""
    files = sources(chapter)
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]
    return f"sha256 {digest} of {', '.join(str(path.relative_to(ROOT)) for path in files)}"


def stamp_in(picture: Path) -> str | None:
    """The stamp that a picture bears."""
    found = re.search(r"<dc:source>(.*?)</dc:source>", picture.read_text(encoding="utf-8"), re.DOTALL)
    return found and found[1].strip()


def write(folder: Path, number: int, chapter: str, figures: Mapping[str, Figure]) -> None:
    """Write a chapter's pictures as NN-name.svg."""
    for name, figure in figures.items():
        path = folder / f"{number:02}-{name}.svg"
        path.write_text(svg(figure, stamp_of(chapter)), encoding="utf-8")
        print(f"  {path.name}: {path.stat().st_size // 1000} kB", flush=True)
