"""What the page of AdamW and Muon says of made-up records, and that the runs differ in optimizer and rate alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.optimizers import OPTIMIZERS, best, configs, main, verdict
from benchmarks.report import Record, append, begin


def records(name: str, *losses: float) -> list[Record]:
    """A validation every ten steps of 2 s."""
    return [{"name": name, "step": 10 * i, "seconds": 20.0 * i, "loss": loss} for i, loss in enumerate(losses, start=1)]


SEEDS = {
    1: records("adamw 0.1", 5, 4, 3) + records("adamw 0.2", 6, 5, 4) + records("muon 0.1", 4, 2, 1),
    2: records("adamw 0.1", 5, 4, 3) + records("adamw 0.2", 6, 5, 2.5) + records("muon 0.1", 5, 4.5, 4),
}


def test_each_optimizer_is_taken_at_its_best_rate() -> None:
    assert best(SEEDS, "adamw") == "adamw 0.1"
    lines = verdict(SEEDS)
    assert "| adamw 0.2 | 4.0000 | 2.5000 | 3.2500 | 2000 |" in lines
    assert "| 1 | 3.0000 | 30 | 15 | 2.00 x | 60 | 30 | 2.00 x |" in lines
    assert "| 2 | 3.0000 | 30 | – | – | 60 | – | – |" in lines  # noqa: RUF001


def test_the_runs_differ_in_optimizer_and_rate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    found = configs(20, 8, 5, (1e-3, 2e-3))
    assert [*found] == [f"{name} {rate}" for name in OPTIMIZERS for rate in ("0.001", "0.002")]
    assert {config.seed for config in found.values()} == {5}
    first = found["adamw 0.001"]
    assert all(
        replace(config, optim=replace(config.optim, name="adamw", lr=1e-3)) == first for config in found.values()
    )


def test_results_of_fewer_steps_are_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "1.jsonl", {})
    for record in SEEDS[1]:
        append(tmp_path / "1.jsonl", record)
    command = ["optimizers", "--results", str(tmp_path), "--seeds", "1", "--steps"]
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr("sys.argv", [*command, "40"])
    with pytest.raises(SystemExit):
        main()
    assert f"--steps: {tmp_path / '1.jsonl'} has 30, expected 40; use another --results" in capsys.readouterr().err
