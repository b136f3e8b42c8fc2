"""Checks a hostfile and what DeepSpeed would pass on to its hosts, for launch/deepspeed.sh.

usage: check_hostfile.py HOSTFILE [ARGUMENT OF THE TRAINING SCRIPT ...]      exit code 2: refused
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cluster.hostfile import check_remote_words, read_hostfile
from llm.errors import InputError


def main() -> int:
    if sys.argv[1:2] in ([], ["--help"], ["-h"]):
        print(__doc__, file=sys.stderr if len(sys.argv) < 2 else sys.stdout)
        return 2 if len(sys.argv) < 2 else 0
    paths = [Path.cwd(), Path(sys.executable), Path(__file__).resolve()]
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    try:
        hosts = read_hostfile(Path(sys.argv[1]))
        check_remote_words(os.environ, [Path.home() / name, Path(name)], sys.argv[2:], paths)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{sum(hosts.values())} processes on {len(hosts)} hosts: {', '.join(hosts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
