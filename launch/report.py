"""Draw the loss curve of a run and print its validation loss beside a bigram model's, and text that it writes.

usage: report.py runs/<name>      draws runs/<name>/loss.png; exit code 2: no such run
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cluster.script import run_alone


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(2 if len(argv) != 1 else 0)
    from llm.report import report  # imports torch

    report(Path(argv[0]))


if __name__ == "__main__":
    run_alone(main)
