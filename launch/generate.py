"""Continue text with a trained model: `python launch/generate.py --checkpoint runs/<name> --prompt "def "`.

Under torchrun or deepspeed ranks share the model. Exit codes: 0 finished, 2 wrong input or checkpoint, 1 anything else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
from argparse import ArgumentParser, Namespace

from llm.cluster.ranks import Ranks, choose_device, export, initialize, strip_local_rank
from llm.cluster.script import run_script
from llm.config import ParallelConfig
from llm.errors import require
from llm.sinks import output_failure

OPTIONS = {
    "max_new_tokens": (int, 200, "tokens to add"),
    "samples": (int, 1, "texts of each prompt"),
    "temperature": (float, 0.7, "0: the likeliest token"),
    "top_k": (int, None, "draw from the k likeliest tokens only"),
    "top_p": (float, 0.95, "draw from the likeliest tokens of this probability"),
    "min_p": (float, 0.0, "draw from tokens with this share of the likeliest one's probability"),
    "repetition_penalty": (float, 1.0, "above 1: tokens seen before become less likely"),
    "presence_penalty": (float, 0.0, "subtracted from the logits of tokens that were drawn before"),
    "frequency_penalty": (float, 0.0, "the same, for each time"),
    "no_repeat_ngram": (int, None, "so many tokens in a row never come twice"),
    "seed": (int, 1234, "of the draws"),
}


def arguments(argv: list[str]) -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue, or '' for none; repeatable")
    parser.add_argument("--prompt-file", action="append", default=[], help="one in a file, - for stdin; repeatable")
    parser.add_argument("--chat", action="store_true", help="answer each line of stdin, after all lines before it")
    parser.add_argument("--stop", action="append", default=[], help="a text before which the new one ends; repeatable")
    parser.add_argument("--log-probs", action="store_true", help="at the end, tokens and log-probabilities as JSON")
    parser.add_argument("--speed", action="store_true", help="say the tokens per second of prefill and decode")
    for name, (kind, default, text) in OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=text + " (%(default)s)")
    return parser.parse_args(strip_local_rank(argv))


def main(ranks: Ranks) -> None:
    args = arguments(sys.argv[1:])
    require(bool(args.prompt or args.prompt_file) != args.chat, "expected --prompt or --prompt-file, or --chat alone")
    require(ranks.world_size == 1 or not (args.chat or "-" in args.prompt_file), "ranks share no stdin: give --prompt")
    export(ranks, os.environ)
    import torch

    from llm.generate import SamplingConfig, chat, read_text, stream
    from llm.parallel.mesh import Mesh
    from llm.trained import load_trained

    options = {name: getattr(args, name) for name in ("max_new_tokens", "samples", "stop", "log_probs", "speed")}
    options["sampling"] = SamplingConfig(**{name: getattr(args, name) for name in vars(SamplingConfig())})
    options["say"] = lambda note: print(note, file=sys.stderr) if ranks.rank == 0 else None
    prompts, device, mesh = args.prompt + [read_text(path) for path in args.prompt_file], choose_device(ranks), None
    if ranks.world_size > 1:
        initialize(ranks, timeout_seconds=600, device=device)
        mesh = Mesh.create(ParallelConfig(tensor_parallel=ranks.world_size), device.type)
    trained = load_trained(args.checkpoint, device, mesh)
    for text in chat(trained, sys.stdin, **options) if args.chat else stream(trained, prompts, **options):
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
