"""Records the first run for the README: `python docs/recording.py` runs `make pretrain` and draws docs/first-run.svg.

The lines are those of the run, kept in docs/first-run.log with the command. The picture leaves out the middle ones, and
what is right of its edge. `--draw` draws the log again; other arguments go to make.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
LOG, SVG = ROOT / "docs/first-run.log", ROOT / "docs/first-run.svg"
WIDTH, FIRST, LAST = 100, 12, 14  # columns, and lines that are shown of the log's beginning and end


def record(command: list[str]) -> str:
    """Run a command in the checkout, showing it, and return it and the lines that it prints, errors too."""
    lines = [f"$ {shlex.join(command)}\n"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: nothing was recorded")
    return "".join(lines)


def draw(log: str) -> str:
    """The beginning and the end of a log as SVG."""
    lines = log.splitlines()
    left_out = len(lines) - FIRST - LAST
    if left_out > 0:
        lines[FIRST:-LAST] = [f"[... {left_out} more lines ...]"]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor")
    for line in lines:
        style = "bold" if line.startswith("$") else "dim" if line.startswith("[") else ""
        console.print(Text(line, style), no_wrap=True, overflow="ellipsis")
    svg = console.export_svg(title="the first run", unique_id="first-run")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # a font that would be fetched from elsewhere
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--draw"]:
        LOG.write_text(record(["make", "pretrain", *sys.argv[1:]]), encoding="utf-8")
    SVG.write_text(draw(LOG.read_text(encoding="utf-8")), encoding="utf-8")
