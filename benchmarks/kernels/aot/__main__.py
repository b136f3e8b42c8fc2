"""`python -m benchmarks.kernels.aot`: compile every kernel for every architecture, without a GPU.

One line per kernel: registers per thread, bytes spilled, shared memory, and which matrix and bulk-copy
instructions it uses. Exits 1 if a kernel spills or needs more shared memory than its architecture has.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.kernels.aot.compile import SHARED_MEMORY
from benchmarks.kernels.aot.report import cases, report_of
from kernels.dispatch import INTERPRETED, expect


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--only", default="", help="compile only the kernels whose name matches this expression")
    options = parser.parse_args(arguments)
    expect(
        not INTERPRETED,
        "found TRITON_INTERPRET=1, expected compiled kernels: unset it and run again",
    )
    jobs = [(arch, case.name) for arch in options.arch for case in cases(arch) if re.search(options.only, case.name)]
    expect(bool(jobs), f"--only: found no kernel whose name matches {options.only!r}")
    all_fit = True
    # Fresh processes: Triton's compiler must not be forked, and a kernel cannot be sent to another process.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        for line, fits in workers.map(report_of, *zip(*jobs, strict=True)):
            print(line, flush=True)
            all_fit &= fits
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())
