"""Mine data for fine-tuning from the Python standard library: `python launch/mine_stdlib.py --out data/finetune`.

Writes docstrings.jsonl (conversations: a function, answered by its docstring) and packages.jsonl (text and label). Exit
codes: 0 finished, 2 the folder is there already.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from llm.cluster.script import run_alone
from llm.errors import require


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder, such as data/finetune")
    folder = parser.parse_args(argv).out
    require(not folder.exists(), f"{folder} exists; remove it, or give another --out")
    from llm.finetune.stdlib import mine

    folder.parent.mkdir(parents=True, exist_ok=True)
    print(mine(folder))


if __name__ == "__main__":
    run_alone(main)
