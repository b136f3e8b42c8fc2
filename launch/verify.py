"""Prove a layout: `deepspeed --num_gpus 2 launch/verify.py --config C --parallel.tensor_parallel=2`.

Trains a few steps on made-up data under the config's layout and beside it in one process of the same code, compares
losses, gradients, weights and Adam's moments by name, prints a table and writes it as JSON. A fault that both share,
such as a wrong formula, does not show: the tests compare the model with other implementations.
Also under `torchrun`, `mpirun`, `srun` and plain `python`. Exit codes: 0 the layout gives the same training, 1 it does
not (or anything else went wrong), 2 wrong config or input.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import os

from llm.cluster.preflight import check_machine
from llm.cluster.ranks import Ranks, choose_device, export, initialize, strip_local_rank
from llm.cluster.script import own_options, run_script
from llm.config.parse import parse_config
from llm.errors import require


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Verify's own options, and the rest, which is the config's."""
    require(bool(argv), "no config is given, such as --config launch/configs/tiny-cpu.yaml; --help lists all")
    parser = argparse.ArgumentParser("verify.py", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="Updates to compare (default: 3).")
    parser.add_argument("--json", type=Path, metavar="PATH", help="The report (default: runs/<name>/verify.json).")
    if "--help" in argv or "-h" in argv:
        parser.print_help()
    own, rest = own_options(parser, argv)
    require(own.steps >= 1, f"--steps is {own.steps}; expected at least 1")
    return own, rest


def verify_layout(ranks: Ranks) -> None:
    """Compare on this rank; rank 0 reports."""
    own, rest = parse(strip_local_rank(sys.argv[1:]))
    config = parse_config(rest, prog="verify.py")
    config.check_world(ranks.world_size)
    check_machine(engine=config.train.engine, loader="numpy", environ=os.environ)  # no corpus is read
    export(ranks, os.environ)

    import torch
    from rich.console import Console

    from llm.files import claim, write_json
    from llm.parallel.agreement import broadcast, together
    from llm.parallel.mesh import Mesh
    from llm.parity import report
    from llm.parity.shrink import available_bytes, shrink
    from llm.parity.verify import check_parity
    from llm.train.checks import check_kernels
    from llm.train.run_folder import RUNS

    device = choose_device(ranks)
    path = own.json or RUNS / config.name / "verify.json"
    initialize(ranks, timeout_seconds=config.parallel.timeout_seconds, device=device)
    mesh = Mesh.create(config.parallel, device.type)
    together(lambda: check_kernels(config, device))
    together(lambda: claim(path) if ranks.rank == 0 else None)
    fitted = shrink(config, int(broadcast(str(available_bytes(device, ranks.local_world_size)))), ranks.world_size)
    result = check_parity(fitted, mesh, device, own.steps)
    torch.distributed.destroy_process_group()
    if ranks.rank == 0:
        result = dataclasses.replace(result, requested=None if fitted is config else config.model)
        report.show(result, Console(width=None if sys.stdout.isatty() else 160))
        write_json(path, report.to_json(result))
    if not result.passed:
        sys.exit(1)


if __name__ == "__main__":
    run_script(verify_layout)
