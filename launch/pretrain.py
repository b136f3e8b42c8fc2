"""Train a GPT: `deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/tiny-cpu.yaml --optim.lr=1e-3`.

The same script runs under `torchrun`, `mpirun`, `srun` and plain `python`. `--help` lists every setting.
Exit codes: 0 finished, 2 wrong config or input, 1 anything else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import os

from llm.config import InputError, RunConfig
from llm.config_cli import parse_config
from llm.parallel.launcher import Ranks, discover_ranks, export, initialize, strip_local_rank
from llm.train.preflight import check_machine
from llm.train.watchdog import LauncherWatch


def main(argv: list[str]) -> None:
    """Parse, check the machine, then import what is expensive."""
    watch = LauncherWatch.start()
    config = parse_config(strip_local_rank(argv), prog="pretrain.py")
    check_machine(engine=config.train.engine, loader=config.data.loader, environ=os.environ)
    ranks = discover_ranks(os.environ)
    export(ranks, os.environ)
    pretrain(config, ranks)
    watch.stop()


def pretrain(config: RunConfig, ranks: Ranks) -> None:
    """One run on this rank, from its checks to its last checkpoint and the report on it."""
    import torch
    import torch.distributed as dist

    from launch.report import report
    from llm.train.loop import train
    from llm.train.start import start

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))

    def say(text: str) -> None:
        if ranks.rank == 0:
            print(text, flush=True)

    initialize(ranks, timeout_seconds=config.parallel.timeout_seconds, device=device)
    run = start(config, device, say)
    if run.engine is not None:
        train(run)
        run.engine.close()
    else:
        say(f"{run.folder.path} is complete: {run.step} steps; raise train.max_steps, or choose another --name")
    dist.destroy_process_group()
    if ranks.rank == 0:
        say(report(run.folder.path))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
