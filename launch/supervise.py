"""Starts a run again until it is finished: `python launch/supervise.py -- launch/torchrun.sh --config FILE`.

The command is what starts launch/pretrain.py: launch/deepspeed.sh, launch/torchrun.sh, deepspeed, mpirun or python.
It is started again after a fault that passes, but not after a stop (75) or a bad input (2), nor once several restarts
in a row have brought no newer checkpoint. With HOSTFILE (launch/deepspeed.sh), hosts that do not answer are waited for
and then left out, if the layout allows it; one that cannot be used or computes wrongly (69) is left out for good. Each
start that has ended is a line of runs/<name>/restarts.jsonl. SIGTERM, SIGINT and SIGUSR1 are handed on to the command,
which saves and ends. The exit code is that of the last start.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os

from llm.cluster.hostfile import read_hostfile
from llm.cluster.ranks import strip_local_rank
from llm.cluster.script import own_options, run_alone
from llm.config import RunConfig
from llm.config.parse import parse_config
from llm.errors import InputError, require

SCRIPTS = ("pretrain.py", "deepspeed.sh", "torchrun.sh")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of this script."""
    parser = argparse.ArgumentParser(
        "supervise.py", usage="supervise.py [options] -- COMMAND...", description=__doc__, allow_abbrev=False,
        exit_on_error=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--restarts", type=int, default=3, metavar="N", help="in a row that bring no newer checkpoint (default: 3)")
    add("--wait", type=float, default=5, metavar="S", help="seconds before a restart, doubled up to 300 (default: 5)")
    add("--host-wait", type=float, default=300, metavar="S", help="seconds for a host to answer (default: 300)")
    options, rest = own_options(parser, argv)
    require(not rest, f"{' '.join(rest)} is no option; --help lists them; the command comes after --")
    require(min(vars(options).values()) >= 0, f"a number is below 0 in {' '.join(argv)}; expected 0 or more")
    return options


def config_of(command: list[str]) -> RunConfig:
    """The config that the command's arguments give; raises InputError."""
    at = next((i for i, word in enumerate(command) if Path(word).name in SCRIPTS), None)
    if at is None:
        raise InputError(f"the command is {command}; expected one of {', '.join(SCRIPTS)} in it, then its arguments")
    words = [word for word in strip_local_rank(command[at + 1 :]) if word != "--prepare"]
    require(bool(words), f"no config is given to {command[at]}, such as --config launch/configs/tiny-cpu.yaml")
    return parse_config(words, prog="pretrain.py")


def main(argv: list[str]) -> None:
    cut = argv.index("--") if "--" in argv else len(argv)
    options, command = parse(argv[:cut]), argv[cut + 1 :]
    require(bool(command), "no command is given; usage: supervise.py [options] -- launch/torchrun.sh --config FILE")
    config, hostfile = config_of(command), os.environ.get("HOSTFILE")
    slots = read_hostfile(Path(hostfile)) if hostfile else {}

    from llm.cluster.supervise import Command, Hosts, Supervisor
    from llm.train.run_folder import RUNS, RunFolder

    started = Command(command)
    started.listen()
    hosts = Hosts(slots, config.check_world) if slots else None
    sys.exit(Supervisor(started, RunFolder(RUNS, config.name), hosts, **vars(options)).run(os.environ))


if __name__ == "__main__":
    run_alone(main)
