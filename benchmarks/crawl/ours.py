"""Stages of Ingot on a corpus's folder, timed: `python -m benchmarks.crawl.ours STAGE[,STAGE...] --config...`.

What the stages read has to be there. Their tasks run in this process one after another. Start-up (imports, models) is
not timed: each stage does its first task once before. Prints a line of JSON, as the files of rivals/ do.
"""

import json
import resource
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from llm.config.parse import parse
from llm.crawl.chain import tasks_of
from llm.crawl.restart import unfinished
from llm.crawl.settings import CorpusConfig
from llm.crawl.stages import CHAIN, Link, work_of
from llm.crawl.tasks import run_task


def main(stages: str, *arguments: str) -> None:
    config = parse(CorpusConfig, list(arguments), "benchmarks.crawl.ours")
    names = stages.split(",")
    links = [link for link in CHAIN if link.stage in names]
    found = {"cpu_s": 0.0, "wall_s": 0.0}
    for link in links:
        shutil.rmtree(Path(config.out) / link.stage, ignore_errors=True)
        for key, seconds in timed(config, link).items():
            found[key] += seconds
    report = json.loads(next(iter(sorted((Path(config.out) / links[0].stage).glob("0*.json")))).read_bytes())
    found |= {"documents": report["documents_in"], "peak_mb": peak_mb()}
    print(json.dumps(found))


def peak_mb() -> float:
    """Of this process's memory. Not ru_maxrss, in which that of the process it was forked from is counted."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(config: CorpusConfig, link: Link) -> dict[str, float]:
    """CPU and wall seconds of all tasks of a stage."""
    work, tasks = work_of(config, link.stage), tasks_of(config, link)
    warm_up = Path(config.out) / "warm-up"
    warm_up.mkdir(parents=True, exist_ok=True)
    run_task(work, replace(tasks[0], folder=warm_up))
    shutil.rmtree(warm_up)
    tasks[0].folder.mkdir(parents=True, exist_ok=True)
    began, cpu = time.perf_counter(), cpu_seconds()
    for task in unfinished(work, tasks):
        run_task(work, task)
    return {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - began}


if __name__ == "__main__":
    main(*sys.argv[1:])
