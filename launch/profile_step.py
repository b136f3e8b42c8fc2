"""Profile a few training steps: `deepspeed --num_gpus 2 launch/profile_step.py --config launch/configs/tiny-cpu.yaml`.

Runs as launch/pretrain.py does, under any launcher and layout and with its settings, for a few steps: 3 to warm up,
N timed, N profiled, and one for the memory. It starts from new weights, saves no checkpoint, writes the profile to
runs/<name>-profile or to --out, and says what slows the step. `--compare A B` says what changed between two profiles.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import shlex
from dataclasses import replace

from llm.cluster.preflight import check_machine
from llm.cluster.ranks import Ranks, choose_device, export, strip_local_rank
from llm.cluster.script import own_options, run_script
from llm.cluster.signals import Stop
from llm.config.parse import parse_config
from llm.config.reports import LoggingConfig, ProfileConfig
from llm.config.sections import CheckpointConfig
from llm.errors import require

WARM_UP = 3


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's own options, and the rest, which is the config's."""
    require(bool(argv), "no config is given, such as --config launch/configs/tiny-cpu.yaml; --help lists all")
    parser = argparse.ArgumentParser("profile_step.py", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="Steps to profile (default: 5).")
    parser.add_argument("--out", type=Path, metavar="DIR", help="The profile's folder (default: runs/<name>-profile).")
    parser.add_argument("--prepare", action="store_true", help="Prepare the data first, where that is not done.")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="Folders of profiles; runs nothing.")
    if "--help" in argv or "-h" in argv:
        parser.print_help()
    own, rest = own_options(parser, argv)
    require(1 <= own.steps <= 100, f"--steps is {own.steps}; expected 1 to 100")
    return own, rest


def profile_step(ranks: Ranks, stop: Stop) -> None:
    own, rest = parse(strip_local_rank(sys.argv[1:]))
    if own.compare is not None:
        from llm.profile.compare import compare

        return compare(*own.compare)
    config, first, last = parse_config(rest, prog="profile_step.py"), WARM_UP + own.steps + 1, WARM_UP + 2 * own.steps
    train = replace(config.train, max_steps=max(config.train.max_steps, last + 1), init_from=None)
    quiet = LoggingConfig(tensorboard=False, sample_tokens=0)
    config = replace(config, name=f"{config.name}-profile", train=train, checkpoint=CheckpointConfig(), logging=quiet)
    config = replace(config, profile=ProfileConfig((first, last)))
    config.check_world(ranks.world_size)
    check_machine(engine=config.train.engine, loader=config.data.loader, environ=os.environ)
    if not own.prepare:
        from llm.data.corpora import require_prepared

        require_prepared(config, shlex.join(["python", str(Path(sys.argv[0]).parent / "prepare_data.py"), *rest]))
    export(ranks, os.environ)

    from llm.train.profile_run import take_profile

    out = take_profile(config, ranks, choose_device(ranks), stop, own.out, prepare=own.prepare)
    if ranks.rank == 0:
        from llm.profile.report import write_report

        write_report(out)


if __name__ == "__main__":
    run_script(profile_step, Stop())
