"""Write a trained model as a Hugging Face folder: `python launch/export.py --checkpoint runs/<name> --to FOLDER`.

`transformers` then loads it; before the folder is there, both models have given the same logits.
Exit codes: 0 finished, 2 wrong arguments or checkpoint, or other logits, 1 anything else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import ArgumentParser

from llm.cluster.ranks import Ranks
from llm.cluster.script import run_script
from llm.errors import require


def main(ranks: Ranks) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="runs/<name>, or one of its checkpoints")
    parser.add_argument("--to", type=Path, required=True, help="the folder to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--plain", action="store_true", help="whole tensors under Ingot's own names (docs/weights.md)")
    args = parser.parse_args()
    require(ranks.world_size == 1, f"this script is one process; found {ranks.world_size}: start it with python")
    from llm.huggingface import export

    print(export(args.checkpoint, args.to, dtype=args.dtype, plain=args.plain))


if __name__ == "__main__":
    run_script(main)
