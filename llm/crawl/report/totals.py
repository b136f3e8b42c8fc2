"""Adds up the reports that the tasks of each stage have left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.crawl.counts import DAMAGES, SAMPLES, Counts
from llm.crawl.stages import CHAIN
from llm.errors import CheckpointError, InputError, ReadError, require
from llm.files import read_json


@dataclass
class Totals(Counts):
    """Of all tasks of a stage."""

    stage: str = ""
    tasks: int = 0
    seconds: float = 0.0
    """Of all tasks, one after the other."""

    def add(self, report: Mapping[str, Any]) -> None:
        """Count a task in. Samples and damage stay the first ones if tasks are added in their order."""
        self.tasks += 1
        self.seconds += report.get("seconds", 0.0)
        for name in ("documents_in", "documents_out", "bytes_in", "bytes_out", "damage_count"):
            setattr(self, name, getattr(self, name) + report.get(name, 0))
        self.removed.update(report.get("removed", {}))
        for reason, texts in report.get("samples", {}).items():
            self.samples[reason] = [*self.samples.get(reason, []), *texts][:SAMPLES]
        self.damage = [*self.damage, *report.get("damage", [])][:DAMAGES]
        for name, histogram in report.get("histograms", {}).items():
            self.histograms.setdefault(name, Counter()).update(histogram)


def read_totals(out: Path) -> list[Totals]:
    """The stages that have left reports, OUT/<stage>/NNNNN.json, in the order of the chain.

    Raises InputError where there are none, or one cannot be read.
    """
    found: dict[str, Totals] = {}
    paths = [path for path in out.glob("*/*.json") if path.stem.isdecimal()]  # a tokenizer is NNNNN.tokenizer.json
    for path in sorted(paths):
        try:
            report = read_json(path)
            stage = str(report["stage"])
            found.setdefault(stage, Totals(stage=stage)).add(report)
        except (CheckpointError, ReadError, KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}; delete it and run its stage again"
            raise InputError(f"{path} is no report of a task: {what}") from error
    require(bool(found), f"{out} holds no reports of stages (extract/00000.json and so on): run prepare_data.py all")
    order = [link.stage for link in CHAIN]
    return [found[stage] for stage in (*order, *sorted(found.keys() - set(order))) if stage in found]


def read_curve(out: Path) -> dict[str, Any]:
    """What the clustering has measured (llm/crawl/dedup/measure.py); empty where it has not run yet.

    Raises InputError where it cannot be read.
    """
    path = out / "cluster/curve.json"
    try:
        return read_json(path) if path.exists() else {}
    except (CheckpointError, ReadError) as error:
        raise InputError(f"{path} cannot be read: {error}; delete its folder and run dedup again") from error
