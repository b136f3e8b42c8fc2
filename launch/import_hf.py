"""Make a run of a Hugging Face folder: `python launch/import_hf.py --from FOLDER --name NAME` writes runs/NAME.

Exit codes: 0 finished, 2 wrong arguments, a folder that cannot be used, or other logits, 1 anything else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from argparse import ArgumentParser

from llm.cluster.ranks import Ranks, initialize
from llm.cluster.script import run_script
from llm.errors import require


def main(ranks: Ranks) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    files = "config.json, *.safetensors, tokenizer.json"
    parser.add_argument("--from", dest="folder", type=Path, required=True, help=files)
    parser.add_argument("--name", required=True, help="of the run: runs/<name> is made")
    args = parser.parse_args()
    require(ranks.world_size == 1, f"this script is one process; found {ranks.world_size}: start it with python")
    import torch

    from llm.huggingface import import_folder

    initialize(ranks, timeout_seconds=600, device=torch.device("cpu"))  # what writes a checkpoint asks for its ranks
    print(import_folder(args.folder, args.name, Path("runs")))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
