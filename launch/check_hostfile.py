"""Checks a hostfile and what DeepSpeed would pass on to its hosts, for launch/deepspeed.sh.

usage: check_hostfile.py HOSTFILE [ARGUMENT OF THE TRAINING SCRIPT ...]      exit code 2: refused

Prints the hostfile in the one spelling that DeepSpeed reads, `host slots=N`; a summary goes to standard error.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cluster.hostfile import check_folder, check_remote_words, read_hostfile
from llm.errors import InputError


def main() -> int:
    if sys.argv[1:2] in ([], ["--help"], ["-h"]):
        print(__doc__, file=sys.stderr if len(sys.argv) < 2 else sys.stdout)
        return 2 if len(sys.argv) < 2 else 0
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    try:
        hosts = read_hostfile(Path(sys.argv[1]))
        check_folder(Path.cwd())
        home = Path(os.path.expanduser("~"))  # as DeepSpeed looks for it, also where there is none
        check_remote_words(os.environ, [home / name, Path(name)], sys.argv[2:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{host} slots={slots}" for host, slots in hosts.items()))
    print(f"{sum(hosts.values())} processes on {len(hosts)} hosts: {', '.join(hosts)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
