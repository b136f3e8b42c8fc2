"""Continue text with a trained model: `python launch/generate.py --checkpoint runs/<name> --prompt "def "`.

Several --prompt are continued together. Started by torchrun or deepspeed, all ranks share the model (tensor parallel).
Exit codes: 0 finished, 2 wrong arguments or checkpoint, 1 anything else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
from argparse import ArgumentParser, Namespace
from functools import partial

from llm.cluster.ranks import Ranks, choose_device, export, initialize, strip_local_rank
from llm.cluster.script import run_script
from llm.config import ParallelConfig
from llm.sinks import output_failure

OPTIONS = {
    "max_new_tokens": (int, 200, "tokens to add"),
    "temperature": (float, 0.7, "0: the likeliest token"),
    "top_k": (int, None, "draw from the k likeliest tokens only"),
    "top_p": (float, 0.95, "draw from the likeliest tokens of this probability"),
    "repetition_penalty": (float, 1.0, "above 1: tokens seen before become less likely"),
    "seed": (int, 1234, "of the draws"),
}


def arguments(argv: list[str]) -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="runs/<name>, or one of its checkpoints")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue, or '' for none; repeatable")
    for name, (kind, default, text) in OPTIONS.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, default=default, help=f"{text} (default: {default})")
    return parser.parse_args(strip_local_rank(argv))


def main(ranks: Ranks) -> None:
    args = arguments(sys.argv[1:])
    export(ranks, os.environ)
    import torch

    from llm.generate import stream
    from llm.parallel.mesh import Mesh
    from llm.sampling import SamplingConfig
    from llm.trained import load_trained

    sampling = SamplingConfig(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.seed)
    device = choose_device(ranks)
    mesh = None
    if ranks.world_size > 1:
        initialize(ranks, timeout_seconds=600, device=device)
        mesh = Mesh.create(ParallelConfig(tensor_parallel=ranks.world_size), device.type)
    trained = load_trained(args.checkpoint, device, mesh)
    say = partial(print, file=sys.stderr) if ranks.rank == 0 else lambda note: None
    for text in stream(trained, args.prompt, args.max_new_tokens, sampling, say):
        if ranks.rank == 0:
            print(text, end="", flush=True)
        if mesh is None and output_failure():
            break
    if ranks.world_size > 1:
        torch.distributed.destroy_process_group()
    if not isinstance(output_failure(), BrokenPipeError | None):  # the text is what was asked for: a full disk loses it
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
