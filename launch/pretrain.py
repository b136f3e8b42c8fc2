"""Train a GPT: `deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/tiny-cpu.yaml --optim.lr=1e-3`.

The same script runs under `torchrun`, `mpirun`, `srun` and plain `python`. `--help` lists every setting.
Exit codes: 0 finished, 2 wrong config or input, 1 anything else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import os

from llm.cluster.preflight import check_machine
from llm.cluster.ranks import Ranks, choose_device, export, initialize, strip_local_rank
from llm.cluster.script import run_script
from llm.config.parse import parse_config


def pretrain(ranks: Ranks) -> None:
    """One run on this rank: what is cheap to check, then the ranks meet, train, and rank 0 reports."""
    config = parse_config(strip_local_rank(sys.argv[1:]), prog="pretrain.py")
    config.check_world(ranks.world_size)
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if ranks.launcher == "python" and tasks != "1":
        print(f"note: one process, in a Slurm job of {tasks} tasks; start with srun for all of them", file=sys.stderr)
    check_machine(engine=config.train.engine, loader=config.data.loader, environ=os.environ)
    export(ranks, os.environ)

    import torch

    from llm.train.loop import train
    from llm.train.start import claim, start

    device = choose_device(ranks)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    lead = ranks.rank == 0
    held = claim(config) if lead else None  # before the ranks meet: a second start must not reach the first one's port
    initialize(ranks, timeout_seconds=config.parallel.timeout_seconds, device=device)
    run = start(config, device, print if lead else lambda text: None)
    if run.engine is not None:
        train(run)
        run.engine.close()
    torch.distributed.destroy_process_group()
    if held is not None:
        from llm.report import report

        if run.engine is None:
            print(f"{held[0].path} is complete: {run.step} steps; raise train.max_steps, or choose another --name")
        print(report(held[0].path), flush=True)


if __name__ == "__main__":
    run_script(pretrain)
