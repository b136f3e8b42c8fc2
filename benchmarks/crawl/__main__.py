"""`python -m benchmarks.crawl`: the corpus pipeline beside datatrove and Daft, and on more and more pages.

Writes results.jsonl (a line for each measurement), results.md and results.png. Without --datatrove and --daft, each the
Python of an environment with that library, Ingot grows alone, beside gigatoken in the stage that it encodes for.
docs/corpus.md says how to make them, and how long it takes. CPU seconds are those of all threads and child processes;
what a stage loads once is not timed.
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crawl", description=__doc__)
    parser.add_argument("--datatrove", help="the Python of an environment with datatrove 0.10.1")
    parser.add_argument("--daft", help="the Python of an environment with daft 0.7")
    parser.add_argument("--megabytes", type=float, default=6, help="of HTML, beside datatrove")
    parser.add_argument("--texts", type=int, default=20_000, help="short ones, whose clustering is timed")
    parser.add_argument("--pages", type=int, default=3000, help="beside Daft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.02, 0.1], help="GB of HTML for the growth")
    parser.add_argument("--prepare", action="store_true", help="write the pages for the growth, which stay, and end")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="of the growth")
    parser.add_argument("--packages", type=Path, default=Path("runs/corpus-demo/packages"), help="where pages are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-crawl"))
    options = parser.parse_args(arguments)
    # Imported here, so that --help does not wait for torch.
    import torch

    from benchmarks.crawl.growth import grow, prepare
    from benchmarks.crawl.pages import load_pages
    from benchmarks.crawl.stages import DAFT, DATATROVE, GIGATOKEN, Stages
    from benchmarks.crawl.tables import growth_table, plot_growth, scale_table, stage_table
    from benchmarks.report import append, begin, header, heading

    if options.prepare:
        pages = load_pages(options.packages)
        for size in options.sizes:
            prepare(options.out.resolve() / f"growth/{size}", pages, size, print)
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    head = header("benchmarks.crawl", given, torch.device("cpu"), ("fastwarc", "resiliparse", "gigatoken", "pyarrow"))
    out = options.out.resolve()
    begin(out / "results.jsonl", head)
    records, lines = [], [heading(head)]

    def keep(record: dict) -> None:
        records.append(record)
        append(out / "results.jsonl", record)
        print({key: value for key, value in record.items() if key != "stages"}, flush=True)

    pages = load_pages(options.packages)
    rivals = {DATATROVE: options.datatrove, DAFT: options.daft, GIGATOKEN: options.rounds and sys.executable}
    pythons = {name: path for name, path in rivals.items() if path}
    stages = Stages(out / "stages", pythons)
    if pythons:
        stages.prepare(pages, options.megabytes, options.pages, options.texts)
        for record in stages.run(options.rounds):
            keep(record)
        sizes = {f"{case.corpus} {case.stage}": stages.bytes_of(case) for case in stages.cases}
        lines += ["", *stage_table(records, sizes)]
    if options.sizes:
        for record in grow(out / "growth", pages, options.sizes, options.processes):
            keep(record)
        lines += ["", *growth_table(records), "", *scale_table(records)]
        plot_growth(records, out / "results.png")
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
