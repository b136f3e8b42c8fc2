"""The LSTM beside the GPT: what is held equal, and what the page says of two curves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import lstm
from benchmarks.lstm import configs, draw, reached, verdict
from benchmarks.report import read
from llm.errors import InputError
from runs import Workspace, succeeded

ROOT = Path(__file__).resolve().parents[2]
# Losses fall by 1 with each step; a step of the GPT takes 2 s, of the LSTM 1 s.
RECORDS = [
    {"name": name, "lr": 1e-3, "parameters": 10, "tokens": 100 * step, "seconds": pace * step, "loss": begin - step}
    for step in (1, 2, 3, 4)
    for name, pace, begin in (("GPT", 2.0, 8.0), ("LSTM", 1.0, 9.0))
]


def test_only_model_and_learning_rate_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = configs(10, 4, {"LSTM": 1e-2})
    assert [each.optim.lr for each in found.values()] == [4e-3, 1e-2]
    monkeypatch.setattr(lstm, "FAMILIES", {"GPT": "tiny-cpu", "LSTM": "char-cpu"})
    with pytest.raises(InputError, match="expected equal ones"):
        configs(10, 4, {})


def test_where_a_curve_is_at_a_loss() -> None:
    points = [(1.0, 8.0), (3.0, 6.0)]
    assert reached(points, 7.5) == 1.5 and reached(points, 6.0) == 3.0
    assert reached(points, 5.0) is None and reached(points, 9.0) is None


def test_the_verdict() -> None:
    *_, gpt, recurrent, tokens, seconds = verdict(RECORDS)
    assert gpt == "| GPT | 10 | 0.001 | 4.000 | 6.000 | 50 |"  # after 4 s: two steps
    assert recurrent == "| LSTM | 10 | 0.001 | 5.000 | 5.000 | 100 |"
    assert "75% of its tokens" in tokens and "150% of its seconds" in seconds


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    draw(RECORDS, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_both_train_on_the_same_batches(tmp_path: Path) -> None:
    """The command, over four steps: without --lr both begin at the loss of a uniform guess, and learn."""
    space = Workspace(tmp_path / "space")
    (space.path / "launch").symlink_to(ROOT / "launch")
    command = [sys.executable, "-m", "benchmarks.lstm", "--steps=20", "--validation-samples=16", "--plot=x.png"]
    succeeded(space.run(command, space.environment(PYTHONPATH=str(ROOT))))
    records = read(space.path / "runs/lstm/results.jsonl")[1]
    assert [record["name"] for record in records] == ["GPT", "LSTM"] * 20
    assert records[-1]["loss"] < records[1]["loss"] < 7.0 and records[-2]["loss"] < records[0]["loss"]
    assert (space.path / "x.png").is_file()
