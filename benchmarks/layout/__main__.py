"""What each layout costs: `make bench-parallel`, or `torchrun --nproc_per_node 4 benchmarks.layout --config C`.

Prints four tables in markdown, from random tokens: the parallel layers at a degree of 1 beside nn.Linear, the memory of
training state over ZeRO stages, the bytes that each collective sends in a step, and activation checkpointing.
`--train.micro_batch_size` and the like override the config. On GPUs: one rank per GPU.
"""

import os
import sys

from benchmarks.layout.tables import activation_table, layer_table, memory_table, traffic_table
from llm.cluster.ranks import Ranks, choose_device, export, initialize, strip_local_rank
from llm.cluster.script import run_script
from llm.config.parse import parse_config

ROUNDS = 30


def bench(ranks: Ranks) -> None:
    """Every table on this rank; rank 0 prints."""
    config = parse_config(strip_local_rank(sys.argv[1:]), prog="bench_parallel.py")
    config.check_world(ranks.world_size)
    export(ranks, os.environ)

    import torch

    device = choose_device(ranks)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    initialize(ranks, timeout_seconds=config.parallel.timeout_seconds, device=device)
    for table in (layer_table, activation_table, memory_table, traffic_table):
        text = table(config, device, ROUNDS)
        if ranks.rank == 0:
            print(f"\n{text}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(bench)
