"""Checks a hostfile and what DeepSpeed would pass on to its hosts, for launch/deepspeed.sh.

usage: check_hostfile.py HOSTFILE [ARGUMENT OF THE TRAINING SCRIPT ...]      exit code 2: refused

Prints the hostfile in the one spelling that DeepSpeed reads, `host slots=N`; a summary goes to standard error.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cluster.hostfile import check_folder, check_remote_words, read_hostfile
from llm.cluster.script import run_alone


def main(argv: list[str]) -> None:
    if argv[:1] in ([], ["--help"], ["-h"]):
        print(__doc__, file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    hosts = read_hostfile(Path(argv[0]))
    for path in (Path.cwd(), Path(sys.executable), Path(__file__).resolve().parent):
        check_folder(path)
    home = Path(os.path.expanduser("~"))  # as DeepSpeed looks for it, also where there is none
    check_remote_words(os.environ, [home / name, Path(name)], argv[1:])
    print("\n".join(f"{host} slots={slots}" for host, slots in hosts.items()))
    print(f"{sum(hosts.values())} processes on {len(hosts)} hosts: {', '.join(hosts)}", file=sys.stderr)


if __name__ == "__main__":
    run_alone(main)
