"""Measure a trained model: `python launch/evaluate.py --checkpoint runs/<name> --text FILE --tasks NAME,NAME`.

Loss, perplexity and bits per byte of texts, and tasks of lm-evaluation-harness. Under torchrun or deepspeed the ranks
share the work. Exit codes: 0 finished, 2 wrong arguments, checkpoint, text or task, 1 anything else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import importlib.util
import os
from argparse import ArgumentParser, Namespace

from llm.cluster.ranks import Ranks, choose_device, export, initialize, strip_local_rank
from llm.cluster.script import run_script
from llm.config import ParallelConfig
from llm.errors import require

OPTIONS = {
    "seq_len": (int, None, "tokens of a window (default: the model's max_seq_len)"),
    "stride": (int, None, "tokens by which windows advance (default: half of --seq-len)"),
    "task_folder": (Path, None, "YAML files of more tasks"),
    "num_fewshot": (int, None, "solved examples before each item (default: the task's)"),
    "limit": (int, None, "items of each task (default: all)"),
    "batch_size": (int, 8, "rows that go through the model together (default: 8)"),
    "tensor_parallel": (int, 1, "ranks that share a model too large for one (default: 1)"),
    "json": (Path, None, "where to write the results"),
}


def arguments(argv: list[str]) -> Namespace:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="runs/<name>, or one of its checkpoints")
    parser.add_argument("--text", action="append", default=[], help="file or folder of text; repeatable")
    parser.add_argument("--tasks", default="", help="names or YAML files of tasks, with commas between")
    for name, (kind, default, text) in OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=text)
    return parser.parse_args(strip_local_rank(argv))


def main(ranks: Ranks) -> None:
    args = arguments(sys.argv[1:])
    require(bool(args.text or args.tasks), "there is nothing to evaluate; give --text or --tasks")
    missing = args.tasks and importlib.util.find_spec("lm_eval") is None
    require(not missing, "--tasks needs lm-evaluation-harness; pip install 'ingot[eval]'")
    export(ranks, os.environ)
    if ranks.rank:
        os.environ["TQDM_DISABLE"] = "1"  # the harness's bars, which every rank would draw
    import torch

    from llm.data.corpus import read_corpus
    from llm.evaluate import Scorer, report, score_text
    from llm.files import claim
    from llm.parallel.agreement import together
    from llm.parallel.mesh import Mesh
    from llm.trained import load_trained

    device, tp = choose_device(ranks), args.tensor_parallel
    require(tp > 0 and ranks.world_size % tp == 0, f"--tensor-parallel {tp} does not divide {ranks.world_size} ranks")
    initialize(ranks, timeout_seconds=3600, device=device)
    mesh = Mesh.create(ParallelConfig(tensor_parallel=tp), device.type)
    together(lambda: claim(args.json) if args.json and ranks.rank == 0 else None)
    together(lambda: [next(read_corpus(source), None) for source in args.text])
    names, harness = args.tasks.split(","), importlib.import_module("llm.harness") if args.tasks else None
    manager = together(lambda: harness.open_tasks(names, args.task_folder, args.limit)) if harness else None
    trained = together(lambda: load_trained(args.checkpoint, device, mesh))
    scorer = Scorer(trained, mesh, args.batch_size)
    texts = {s: score_text(scorer, s, read_corpus(s), args.seq_len, args.stride) for s in args.text}
    tasks = harness.run_tasks(scorer, names, manager, args.num_fewshot, args.limit) if harness else {}
    torch.distributed.destroy_process_group()
    if ranks.rank == 0:
        report({"checkpoint": str(args.checkpoint), "step": trained.step, "text": texts, "tasks": tasks}, args.json)


if __name__ == "__main__":
    run_script(main)
