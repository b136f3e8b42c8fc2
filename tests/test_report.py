"""The loss curve is drawn from whatever a run has written so far."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from llm.errors import InputError
from llm.report import plot_loss, series, smoothed


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


RECORDS = [{"step": i, "loss": 7 - i / 50} for i in range(1, 101)] + [
    {"step": 50, "val_loss": 6.1}, {"step": 100, "val_loss": 5.1}
]  # fmt: skip


def ink(path: Path) -> float:
    """Share of the picture that is not white."""
    return float((imread(path)[:, :, :3].min(-1) < 0.99).mean())


def test_a_bigram_line_and_validation_points_add_ink(tmp_path: Path) -> None:
    metrics = write(tmp_path / "m.jsonl", RECORDS)
    plot_loss(write(tmp_path / "t.jsonl", RECORDS[:100]), tmp_path / "train.png", "run")
    plot_loss(metrics, tmp_path / "both.png", "run")
    plot_loss(metrics, tmp_path / "all.png", "run", bigram=5.5)
    amounts = [ink(tmp_path / name) for name in ("train.png", "both.png", "all.png")]
    assert 0 < amounts[0] < amounts[1] < amounts[2]


def test_lines_without_a_number_are_left_out() -> None:
    records = [{"step": 1, "loss": "nan"}, {"step": 2, "loss": 3.0}, {"step": 3, "val_loss": 2.0}]
    assert series(records, "loss") == ([2], [3.0])


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": "nan"}]])
def test_nothing_to_draw_is_an_input_error(tmp_path: Path, records: list[dict]) -> None:
    with pytest.raises(InputError, match="holds no loss"):
        plot_loss(write(tmp_path / "m.jsonl", records), tmp_path / "x.png", "run")


def test_only_a_validation_can_be_drawn(tmp_path: Path) -> None:
    plot_loss(write(tmp_path / "m.jsonl", RECORDS[100:]), tmp_path / "x.png", "run")
    assert ink(tmp_path / "x.png") > 0


def test_a_smoothed_trend_is_the_trend() -> None:
    """An average of what came before would lag behind it, from the first value to the last."""
    for count in (1, 2, 19, 20, 400, 1000):
        falling = [7 - i / 50 for i in range(count)]
        assert smoothed(falling) == pytest.approx(falling)
    assert smoothed([]) == []


def test_smoothing_takes_out_what_goes_up_and_down() -> None:
    noisy = [(-1.0) ** i for i in range(400)]
    assert max(map(abs, smoothed(noisy)[20:-20])) < 0.05
    assert smoothed(noisy[:19]) == noisy[:19]  # too few to tell noise from trend
