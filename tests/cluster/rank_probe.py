"""Run by launchers in the tests: finds its ranks, adds them up with the others, reports, may stay.

usage: rank_probe.py FOLDER [--stay] [--exit CODE]     writes FOLDER/rank-N.json
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])


def main() -> int:
    from llm.cluster.ranks import discover_ranks, export, initialize, strip_local_rank
    from llm.cluster.watchdog import launcher_chain, watch_launcher

    watch_launcher()
    arguments = strip_local_rank(sys.argv[1:])
    ranks = discover_ranks(os.environ)
    export(ranks, os.environ)

    import psutil
    import torch

    initialize(ranks, timeout_seconds=60, device=torch.device("cpu"))
    total = torch.tensor([ranks.rank + 1.0])
    torch.distributed.all_reduce(total)
    report = asdict(ranks) | {"sum": total.item(), "arguments": arguments, "pid": os.getpid()}
    report["watched"] = [process.pid for process in launcher_chain(psutil.Process())]
    path = Path(arguments[0]) / f"rank-{ranks.rank}.json"
    path.with_suffix(".tmp").write_text(json.dumps(report), encoding="utf-8")
    path.with_suffix(".tmp").rename(path)
    while "--stay" in arguments:
        time.sleep(0.1)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return int(arguments[arguments.index("--exit") + 1]) if "--exit" in arguments else 0


if __name__ == "__main__":
    sys.exit(main())
