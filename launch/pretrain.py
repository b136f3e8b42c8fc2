"""Train a GPT: `deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/tiny-cpu.yaml --optim.lr=1e-3`.

The same script runs under `torchrun`, `mpirun`, `srun` and plain `python`. `--help` lists every setting. With
`--prepare`, rank 0 first does what launch/prepare_data.py does, where that is not done, and the others wait for it.
Paths count from the folder you are in. Exit codes: 0 finished, 75 stopped and saved, 2 bad input, 69 bad host, 1 else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
import shlex

from llm.cluster.preflight import check_machine
from llm.cluster.ranks import Ranks, export, strip_local_rank
from llm.cluster.script import run_script
from llm.cluster.signals import Stop
from llm.config.parse import parse_config
from llm.errors import require

START = """no config is given; a first run, of minutes on two CPU cores:
  python {0}/pretrain.py --config {0}/configs/tiny-cpu.yaml --prepare
Or prepare data once, and train with several processes:
  python {0}/prepare_data.py --config FILE
  deepspeed --num_gpus 8 {0}/pretrain.py --config FILE
All settings: python {0}/pretrain.py --help"""


def pretrain(ranks: Ranks, stop: Stop) -> None:
    """One run on this rank: what is cheap to check, then the ranks meet, train, and rank 0 reports."""
    argv, place = strip_local_rank(sys.argv[1:]), Path(sys.argv[0]).parent
    require(bool(argv), START.format(shlex.quote(str(place))))
    if {"--help", "-h"} & set(argv):
        print(__doc__)
    prepare, words = "--prepare" in argv, [word for word in argv if word != "--prepare"]
    config = parse_config(words, prog="pretrain.py")
    task = config.finetune.task
    require(task == "none", f"finetune.task is {task}; start it with {place}/finetune.py")
    config.check_world(ranks.world_size)
    stop.limit(config.train.max_minutes)
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if ranks.launcher == "python" and tasks != "1":
        print(f"note: one process, in a Slurm job of {tasks} tasks; start with srun for all of them", file=sys.stderr)
    check_machine(engine=config.train.engine, loader=config.data.loader, environ=os.environ)
    from llm.data.corpora import require_prepared
    from llm.train.run_folder import RUNS, RunFolder

    folder, steps = RunFolder(RUNS, config.name), config.train.max_steps
    stop.failed = folder.failed
    if not prepare and not folder.has(steps):
        require_prepared(config, shlex.join(["python", str(place / "prepare_data.py"), *words]))
    export(ranks, os.environ)

    from llm.train.job import run_job

    lock = run_job(config, ranks, stop, prepare=prepare)
    if lock is not None:
        from llm.report import report
        from llm.sinks import Sink

        Sink("the report", print)(lambda: report(folder.path))


if __name__ == "__main__":
    run_script(pretrain, Stop())
