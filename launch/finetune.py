"""Fine-tune a model: `deepspeed --num_gpus 2 launch/finetune.py --config launch/configs/finetune/chat.yaml`.

train.init_from names a run, a checkpoint or a Hugging Face folder; its model and its tokenizer are taken over, and the
rest is as for launch/pretrain.py: launchers, layouts, checkpoints, --help, --prepare (finetune.task=continue). The
checkpoint with the lowest validation loss is kept, and read by the scripts that take the run.
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
from llm.errors import require
from llm.finetune.settings import finetune_config


def finetune(ranks: Ranks, stop: Stop) -> None:
    argv, place = strip_local_rank(sys.argv[1:]), Path(sys.argv[0]).parent
    require(bool(argv), f"no config is given, such as --config {place}/configs/finetune/chat.yaml; --help lists all")
    if {"--help", "-h"} & set(argv):
        print(__doc__)
    prepare, words = "--prepare" in argv, [word for word in argv if word != "--prepare"]
    config = finetune_config(words)
    config.check_world(ranks.world_size)
    stop.limit(config.train.max_minutes)
    check_machine(engine=config.train.engine, loader=config.data.loader, environ=os.environ)
    from llm.data.corpora import require_prepared
    from llm.train.run_folder import RUNS, RunFolder

    folder, reads_text = RunFolder(RUNS, config.name), config.finetune.task == "continue"
    require(
        reads_text or not prepare, f"--prepare is for finetune.task=continue; {config.finetune.task} reads its file"
    )
    stop.failed = folder.failed
    if reads_text and not prepare and not folder.has(config.train.max_steps):
        require_prepared(config, shlex.join(["python", *sys.argv, "--prepare"]))
    export(ranks, os.environ)

    from llm.finetune.tasks import open_task
    from llm.train.job import run_job

    lock = run_job(config, ranks, stop, prepare=prepare, open_source=open_task)
    if lock is not None:
        from llm.report import report
        from llm.sinks import Sink

        Sink("the report", print)(lambda: report(folder.path))


if __name__ == "__main__":
    run_script(finetune, Stop())
