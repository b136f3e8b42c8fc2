"""Measures what layouts cost: `make bench-parallel`, or `torchrun --nproc_per_node 4 -m benchmarks.layout --config C`.

Prints two tables in Markdown, from random tokens: activation checkpointing on one rank, and the memory of the training
state over ZeRO stages. `--train.micro_batch_size` and the like override the config. On GPUs: one rank per GPU.
"""

import os
import sys

from llm.cluster.ranks import Ranks, choose_device, export, initialize, strip_local_rank
from llm.cluster.script import run_script
from llm.config.parse import parse_config

ROUNDS = 15
PACKAGES = ("torch", "triton", "deepspeed")


def bench(ranks: Ranks) -> None:
    """Every table on this rank; rank 0 prints."""
    config = parse_config(strip_local_rank(sys.argv[1:]), prog="python -m benchmarks.layout")
    config.check_world(ranks.world_size)
    export(ranks, os.environ)
    # Imported here, so that --help does not wait for torch.
    import torch

    from benchmarks.layout.cost import activation_table, memory_table
    from benchmarks.report import header, heading

    device = choose_device(ranks)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    initialize(ranks, timeout_seconds=config.parallel.timeout_seconds, device=device)
    if ranks.rank == 0:
        print(heading(header("benchmarks.layout", sys.argv[1:], device, PACKAGES)))
    for table in (activation_table, memory_table):
        lines = table(config, device, ROUNDS)
        if ranks.rank == 0:
            print("", *lines, sep="\n", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(bench)
