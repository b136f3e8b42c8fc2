"""Draws the pictures of docs/profiling.md: `python docs/profile_pictures.py`.

Profiles the first run's config with micro-batches that are too small, and with large ones, and draws from the two
reports. `--draw` draws again from the profiles that are there.
"""

from __future__ import annotations

import subprocess
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from llm.profile import page  # noqa: E402
from llm.profile.compare import compare  # noqa: E402
from llm.profile.report import load_profile, summary, write_report  # noqa: E402

RUNS, WIDTH, LINE = ROOT / "runs", 118, 16  # a terminal's columns, and pixels of a line
SIZES = {"small": 1, "large": 8}  # micro-batches, by the run's name


def profile(name: str, micro_batch_size: int) -> None:
    """Profile the first run's config on two ranks."""
    settings = [f"--name={name}", "--train.global_batch_size=16", f"--train.micro_batch_size={micro_batch_size}"]
    script = ["launch/profile_step.py", "--config", "launch/configs/tiny-cpu.yaml", "--steps", "3", *settings]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    subprocess.run([*deepspeed, *script, "--prepare"], cwd=ROOT, check=True)


def terminal(lines: list[str]) -> str:
    """Lines of text as SVG."""
    cut = [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines]
    rows = [
        f'<text x="8" y="{(i + 1) * LINE}" xml:space="preserve">{escape(line)}</text>' for i, line in enumerate(cut)
    ]
    size = f'width="{WIDTH * 7.3:.0f}" height="{(len(lines) + 1) * LINE}"'
    style = 'style="background:white" font-family="monospace" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(rows) + "\n</svg>\n"


def draw(small: Path, large: Path) -> None:
    """The pictures of the two profiles."""
    found: list[str] = []
    write_report(small, found.append)
    report, changed = summary(load_profile(small)), list[str]()
    compare(small, large, changed.append)
    pictures = {
        "findings": terminal(found[:-1]),
        "parts": page.parts_chart(report),
        "ranks": page.ranks_chart(report),
        "memory": page.memory_chart(report),
        "compare": terminal(changed),
    }
    for name, picture in pictures.items():
        (ROOT / f"docs/profile-{name}.svg").write_text(picture + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--draw"]:
        for name, micro_batch_size in SIZES.items():
            profile(name, micro_batch_size)
    draw(*(RUNS / f"{name}-profile" for name in SIZES))
