"""Say what a run will cost before it starts: parameters, FLOPs, memory of a rank, tokens, hours. Nothing is trained.

usage: plan.py --config FILE [--key=VALUE ...] [--gpus=N] [--gpu=NAME] [--peak-tflops=X] [--mfu=X]

--gpus          ranks of the run (default: 1)
--gpu           the GPU's name, as torch.cuda.get_device_name says it (default: NVIDIA H100 80GB HBM3)
--peak-tflops   its peak in train.precision, if llm/plan/flops.py does not know it (default: logging.peak_tflops)
--mfu           share of the peak that is used, by the non-causal formula, in (0, 1] (default: 0.4)

All else is the config's, as in pretrain.py. Exit codes: 0 planned, 2 wrong config or input.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from llm.cluster.script import own_options, run_alone
from llm.config import RunConfig
from llm.config.parse import parse_config
from llm.errors import InputError, require


def parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """The script's own options, and the config of the rest."""
    parser = argparse.ArgumentParser("plan.py", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", default="NVIDIA H100 80GB HBM3")
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--mfu", type=float, default=0.4)
    own, rest = own_options(parser, argv)
    require(own.gpus >= 1, f"--gpus is {own.gpus}; expected at least 1")
    require(0 < own.mfu <= 1, f"--mfu is {own.mfu}; expected above 0 and at most 1, such as 0.4")
    require(own.peak_tflops is None or own.peak_tflops > 0, f"--peak-tflops is {own.peak_tflops}; expected above 0")
    config = parse_config(rest, prog="plan.py")
    config.check_world(own.gpus)
    return own, config


def epochs(config: RunConfig) -> dict[str, float] | None:
    """How often the run reads each corpus; None where the data is not prepared."""
    from llm.data.corpora import Corpora, unprepared

    if unprepared(config):
        return None
    from llm.config.phases import consumed_samples

    return Corpora.open(config).curriculum().epochs(consumed_samples(config.phases, config.train.max_steps))


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        print(__doc__)
    require(bool(argv), "no config is given, such as --config launch/configs/gpt2-124m.yaml; --help lists all")
    own, config = parse(argv)
    from llm.plan.flops import peak_tflops
    from llm.plan.summary import summary

    precision = config.train.precision
    peak = own.peak_tflops or config.logging.peak_tflops or peak_tflops(own.gpu, precision)
    if peak is None:
        raise InputError(f"the peak of {own.gpu} in {precision} is not known; give --peak-tflops=X")
    for line in summary(config, own.gpus, mfu=own.mfu, peak_tflops=peak, epochs=epochs(config)):
        print(line)


if __name__ == "__main__":
    run_alone(main)
