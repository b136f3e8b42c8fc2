"""Draws the guide's pictures from real runs on a CPU: `python -m docs.guide.pictures`, 30 minutes on two cores.

Named chapters alone: `python -m docs.guide.pictures attention heads`. `--quick` tries it with runs of four steps, and
needs `--folder`, where the pictures go instead of docs/guide. Runs that are complete are used as they are.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path

from docs.guide.pictures.frame import CHAPTERS, PICTURES, make, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.guide.pictures", description=__doc__)
    parser.add_argument("chapters", nargs="*", help=f"of {', '.join(CHAPTERS)}; all if none is named")
    parser.add_argument("--folder", type=Path, default=PICTURES)
    parser.add_argument("--quick", action="store_true")
    words = parser.parse_args()
    if unknown := set(words.chapters) - set(CHAPTERS):
        parser.error(f"no chapter {sorted(unknown)}; expected {', '.join(CHAPTERS)}")
    if words.quick and words.folder == PICTURES:
        parser.error("--quick needs --folder, so that no picture of the guide is replaced")
    words.folder.mkdir(parents=True, exist_ok=True)
    wanted = [chapter for chapter in CHAPTERS if chapter in (words.chapters or CHAPTERS)]
    modules = {chapter: import_module(f"docs.guide.pictures.{chapter}") for chapter in wanted}
    start = time.monotonic()
    for module in modules.values():
        if hasattr(module, "prepare"):  # texts of its own, before they are trained on
            module.prepare()
    print("training", flush=True)
    folders = make([run for module in modules.values() for run in module.RUNS], words.quick)
    for chapter, module in modules.items():
        print(f"{chapter} ({time.monotonic() - start:.0f} s)", flush=True)
        write(words.folder, CHAPTERS.index(chapter) + 1, chapter, module.draw(folders))
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
