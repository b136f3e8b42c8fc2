"""benchmarks.loader measures, goes on where it was stopped, and says what came of it in tables and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks.loader import __main__ as bench_loader
from benchmarks.loader.cases import Case
from benchmarks.loader.report import line, plot_rates, tables
from benchmarks.loader.runner import Runner

MACHINE = {"cpu": "CPU", "cores": 2, "memory_gb": 8, "gpu": None, "system": "Linux 6", "python": "3", "load": 0.25}
HEAD = MACHINE | {"open_files": 1024, "packages": {"torch": "2"}, "command": "c", "date": "2026-01-01", "quick": False}


def records(case: Case, system: str, *rounds: dict) -> list[dict]:
    return [
        {"system": system, "label": case.label, "round": turn, "load": 1.0} | asdict(case) | figures
        for turn, figures in enumerate(rounds)
    ]


def rate(T: int, system: str, *rates: float, documents: bool = False, cold: bool = False) -> list[dict]:
    more = {"cpu_s_per_gtoken": 2.0, "p50_ms": 0.1, "p99_ms": 0.2, "max_ms": 3.0, "peak_mb": 10.0, "anonymous_mb": 4.0}
    more |= {"first_seconds": 1.0}
    figures = [{"tokens_s": x * 1e6, **more} for x in rates]
    return records(Case("rate", "uint16", T, documents, cold), system, *figures)


def made_up() -> list[dict]:
    found = []
    for T in (1024, 2048):
        found += rate(T, "Ingot", 900, 1000, 1100, 1000, 2000) + rate(T, "C gather", 1250)
        found += rate(T, "torchdata", 100) + rate(T, "nanoGPT", 125 if T == 1024 else 50)
        found += rate(T, "Ingot", 600, documents=True) + rate(T, "Megatron", 20, documents=True)
    found += rate(1024, "Ingot", 5, cold=True)
    for shards, resume, seconds in ((1, True, 3.0), (1, False, 0.5), (1000, False, 2.0)):
        start = {"first_seconds": seconds, "peak_mb": 20.0}
        found += records(Case("start", "uint16", 1024, shards=shards, resume=resume), "Megatron", start)
    huge = Case("start", "uint16", 1024, shards=1000, huge=True)
    found += records(huge, "Ingot", {"first_seconds": 0.02, "peak_mb": 9.0})
    found += records(Case("rate", "uint16", 1024), "litdata", {"absent": "ModuleNotFoundError: No module"})
    found += records(Case("check", "uint16", 1024), "MosaicML", {"wrong": "tokens come twice in an epoch"})
    return found


def test_the_tables_give_medians_quartiles_and_ratios() -> None:
    text = tables(HEAD, made_up())
    lines = text.splitlines()
    assert lines[0].startswith("2026-01-01, 2 cores of CPU, 8 GB, Linux 6, Python 3, torch 2, `c`. Load average before")
    assert lines[0].endswith("the run: 0.2. At most 1.0 during it; 1024 open files allowed.")
    assert "| Ingot | 1,000 (1,000 to 1,100) | 1,000 (1,000 to 1,100) |" in lines
    assert "| Ingot over the C loop's | 80% | 80% |" in lines
    assert "| Ingot over the fastest peer's | 8.0 (nanoGPT) | 10.0 (torchdata) |" in lines
    assert "and cu_seqlens over the fastest peer's | 30.0 (Megatron) | 30.0 (Megatron) |" in text
    assert "| Ingot | 5 | – |" in lines  # noqa: RUF001
    assert "| Ingot | 1,000 (1,000 to 1,100) | 2.00 | 0.100 | 0.200 | 3.0 | 10 | 4 |" in lines
    assert "| Ingot, documents | 600 | 2.00 | 0.100 | 0.200 | 3.0 | 10 | 4 |" in lines
    assert "| Megatron | 0.500 (20) | 2.000 (20) |" in lines
    assert "| Megatron, resumed at the middle | 3.000 (20) | – |" in lines  # noqa: RUF001
    assert "| Ingot, sparse files of 10⁸ tokens | – | 0.020 (9) |" in lines  # noqa: RUF001
    assert "- litdata was not measured: ModuleNotFoundError: No module (pip install litdata" in text
    assert lines[-1] == "- MosaicML, check uint16 T=1024: tokens come twice in an epoch"


def test_a_run_of_one_thing_has_tables_of_it_alone(tmp_path: Path) -> None:
    start = records(Case("start", "uint16", 8), "Ingot", {"first_seconds": 0.25, "peak_mb": 9.0})
    assert "**Seconds from the constructor" in tables(HEAD, start)
    assert "tokens/s" not in tables(HEAD, start)
    plot_rates(start, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()
    assert line(start[0]) == "Ingot, start uint16 T=8: 250 ms"


def test_the_plot_has_a_row_per_item_type(tmp_path: Path) -> None:
    plot_rates(made_up(), tmp_path / "p.png")
    assert imread(tmp_path / "p.png").shape[:2] == (450, 1400)


@pytest.mark.parametrize(
    ("figures", "code"), [({"tokens_s": 1.0}, 0), ({"wrong": "all"}, 1), ({"error": "x"}, 1), ({"absent": "x"}, 1)]
)
def test_ours_failing_exits_1(
    figures: dict, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs = records(Case("rate", "uint16", 8), "nanoGPT", {"error": "boom"})
    found = [*theirs, *records(Case("rate", "uint16", 8), "Ingot", figures)]

    def run(self: Runner, head: dict) -> Iterator[dict]:
        self.out.mkdir(exist_ok=True)
        self.head, self.records = head, found
        yield from found

    monkeypatch.setattr(Runner, "run", run)
    assert bench_loader.main(["--out", str(tmp_path)]) == code
    assert "- nanoGPT, rate uint16 T=8: boom" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_the_real_thing_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--quick", "--rounds", "1", "--only", "(Ingot|gather|nanoGPT) (check|[rs])", "--out", str(tmp_path)]
    assert bench_loader.main(arguments) == 0, capsys.readouterr().out
    measured = (tmp_path / "results.jsonl").read_text().splitlines()
    labels = {(record["system"], record["label"]) for record in map(json.loads, measured[1:])}
    assert {"Ingot", "C gather", "nanoGPT"} == {system for system, _ in labels}
    assert ("Ingot", "start uint16 T=1024 resume huge 100 shards") in labels
    text = (tmp_path / "results.md").read_text()
    assert "**Million tokens/s, warm cache, position ids and cu_seqlens**" in text
    assert "| Ingot over the C loop's |" in text
    assert {path.name for path in tmp_path.iterdir()} >= {"results.jsonl", "results.md", "results.png", "ours.log"}
    assert bench_loader.main(arguments) == 0
    assert (tmp_path / "results.jsonl").read_text().splitlines() == measured
    assert bench_loader.main(["--quick", "--only", "nothing", "--out", str(tmp_path / "other")]) == 2
    assert "--only 'nothing'" in capsys.readouterr().err
