"""Times the tiles that attention may be cut into on this GPU, and prints lines for kernels/attention/tiles.py.

usage: tune_attention.py [--widths 64 128] [--lengths 1024 4096] [--dtypes bf16] [--kinds forward dkdv dq fused]
                         [--forms plain dropout softcap window sparse] [--best 5] [--tokens 16384] [--channels 2048]

For each dtype, length and form: the fastest tiles with the time of the whole pass, the present one among them, then the
line for the table. Minutes for each width and kind: every candidate is compiled. Exit code 2: the kernels run on no GPU
here.
"""

import argparse
import itertools
import sys

import torch

from benchmarks.kernels.measure import clock_of
from benchmarks.kernels.tune import DTYPES, FORMS, Problem, line, present, ranking, tune
from kernels.attention.tiles import KINDS, Tile
from kernels.dispatch import INTERPRETED, why_not_triton

FORM_OF = {name.strip() or "plain": name for name in FORMS}
# The interpreter, for tests of this script: it proves nothing about speed.
INTERPRETED_TILES = [Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune_attention.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="of a head")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="of a row")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--forms", nargs="+", choices=FORM_OF, default=["plain"], help="what is switched on")
    parser.add_argument("--best", type=int, default=5, help="tiles to print of each problem")
    parser.add_argument("--tokens", type=int, default=16384, help="rows times their length")
    parser.add_argument("--channels", type=int, default=2048, help="heads times their width")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_not_triton(device, torch.bfloat16)
    if reason is not None:
        print(f"error: tune_attention.py: {reason}", file=sys.stderr)
        return 2
    name = "the interpreter" if INTERPRETED else torch.cuda.get_device_name(device)
    tiles = INTERPRETED_TILES if INTERPRETED else None
    clock = clock_of(device)
    for dtype, T, form in itertools.product(options.dtypes, options.lengths, options.forms):
        problems = [Problem(T, D, dtype, FORM_OF[form], options.tokens, options.channels) for D in options.widths]
        print(f"# {name}: {dtype}, {options.tokens} tokens in rows of {T}, {options.channels} channels, {form}")
        for kind in options.kinds:
            found = [(problem, tune(kind, problem, device, clock, tiles)) for problem in problems]
            for problem, timings in found:
                for text in ranking(kind, problem, timings, present(kind, problem, device), options.best):
                    print(text)
            print(line(kind, found, device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
