"""Say which labels texts have: `python launch/classify.py --checkpoint runs/<name> --text "def f(): ..."`.

Reads a run of launch/finetune.py with finetune.task=classify. A line for each text: its label and the probability of
it. Exit codes: 0 finished, 2 wrong arguments, text or checkpoint, 1 anything else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from argparse import ArgumentParser

from llm.cluster.ranks import Ranks, choose_device
from llm.cluster.script import run_script
from llm.errors import require
from llm.sinks import output_failure


def main(ranks: Ranks) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="runs/<name>, or one of its checkpoints")
    parser.add_argument("--text", action="append", default=[], help="repeatable")
    parser.add_argument("--file", action="append", default=[], help="one text in a file, - for stdin; repeatable")
    parser.add_argument("--json", action="store_true", help="print the probabilities of all labels, as JSON")
    args = parser.parse_args()
    require(bool(args.text or args.file), "there is no text; give --text or --file")
    require(ranks.world_size == 1, f"this script is one process; found {ranks.world_size}: start it with python")
    from llm.finetune.labels import probabilities
    from llm.generate import as_text, read_text
    from llm.trained import load_trained

    texts = [as_text(text) for text in [*args.text, *map(read_text, args.file)]]
    trained = load_trained(args.checkpoint, choose_device(ranks), classifier=True)
    for found in probabilities(trained, texts, lambda note: print(note, file=sys.stderr)):
        probability, number = found.max(-1)
        of_all = dict(zip(trained.labels, found.tolist(), strict=True))
        print(
            json.dumps(of_all) if args.json else f"{trained.labels[int(number)]}\t{float(probability):.3f}", flush=True
        )
    if not isinstance(output_failure(), BrokenPipeError | None):  # the labels are what was asked for
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
