"""metrics.jsonl: exact numbers, one whole line per step, whatever happens."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm.cluster.heartbeat import Heartbeat
from llm.config import PhaseChange, RunConfig, TrainConfig
from llm.config.reports import LoggingConfig
from llm.plan.flops import flops_per_token, recomputed_flops
from llm.train.ballot import Ballot
from llm.train.metrics import MetricsWriter, peak_memory, step_rates
from llm.train.reporter import Reporter
from llm.train.run_folder import RunFolder

CPU = torch.device("cpu")
CONFIG = RunConfig()


def rates(step: int = 3, config: RunConfig = CONFIG, since: int | None = None, seconds: float = 0.5) -> dict:
    since = step - 1 if since is None else since
    return step_rates(config, since, step, seconds, world_size=2, peak_tflops=None)


def record(step: int = 3, **changes) -> dict:
    return rates(step) | {"loss": 1 / 3, "lr": 4e-3, "grad_norm": 0.7} | changes


def lines(path: Path) -> list[dict]:
    def no_constant(name: str):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


def test_rates_follow_from_the_time_of_a_step() -> None:
    found = rates()
    tokens = CONFIG.train.global_batch_size * CONFIG.data.seq_len
    assert found["samples"] == 3 * CONFIG.train.global_batch_size
    assert found["tokens"] == 3 * tokens
    assert found["tokens_per_second"] == tokens / 0.5
    per_token = flops_per_token(CONFIG.model, CONFIG.data.seq_len, "causal")
    assert found["tflops"] == pytest.approx(tokens / 0.5 * per_token / 2 / 1e12)
    assert (found["mfu"], found["mfu_formula"]) == (None, "causal")
    peak = 4 * found["tflops"]
    assert step_rates(CONFIG, 2, 3, 0.5, world_size=2, peak_tflops=peak)["mfu"] == pytest.approx(0.25)


def test_utilisation_by_each_formula() -> None:
    def found(train: TrainConfig) -> dict[str, float]:
        config = replace(CONFIG, train=train)
        return step_rates(config, 2, 3, 0.5, world_size=2, peak_tflops=peak)

    T, peak = CONFIG.data.seq_len, 4 * rates()["tflops"]
    per_token = {formula: flops_per_token(CONFIG.model, T, formula) for formula in ("causal", "non-causal")}
    once, full = found(TrainConfig()), found(TrainConfig(activation_checkpointing="full"))
    assert once["mfu_non_causal"] == pytest.approx(0.25 * per_token["non-causal"] / per_token["causal"])
    assert once["hfu"] == once["mfu"] == full["mfu"] == pytest.approx(0.25)
    again = recomputed_flops(replace(CONFIG, train=TrainConfig(activation_checkpointing="full")), T)
    assert full["hfu"] == pytest.approx(0.25 * (1 + again / per_token["causal"]))
    assert rates()["mfu_non_causal"] is rates()["hfu"] is None


def test_steps_reported_together_share_their_time() -> None:
    tokens = CONFIG.train.global_batch_size * CONFIG.data.seq_len
    found = rates(8, since=3, seconds=2.0)
    assert found["step_seconds"] == 0.4
    assert found["tokens_per_second"] == 5 * tokens / 2.0
    assert found["tflops"] == pytest.approx(rates(seconds=0.4)["tflops"])


def test_a_report_across_phases_counts_each_step_as_it_was() -> None:
    """Phases of 4 steps of 32 x 128, 2 of 32 x 64, then of 16 x 64."""
    changes = (PhaseChange(128, seq_len=64), PhaseChange(192, global_batch_size=16))
    config = replace(CONFIG, data=replace(CONFIG.data, phases=changes))
    tokens = [32 * 128] * 4 + [32 * 64] * 2 + [16 * 64] * 4
    per_token = [flops_per_token(config.model, T) for T in [128] * 4 + [64] * 6]
    assert [rates(step, config)["samples"] for step in (4, 5, 6, 7, 10)] == [128, 160, 192, 208, 256]
    for since in range(10):
        for step in range(since + 1, 11):
            found, between = rates(step, config, since=since, seconds=2.0), slice(since, step)
            assert found["tokens"] == sum(tokens[:step])
            assert found["tokens_per_second"] == sum(tokens[between]) / 2.0
            work = sum(n * f for n, f in zip(tokens[between], per_token[between], strict=True))
            assert found["tflops"] == pytest.approx(work / 2.0 / 2 / 1e12)


def reporter(tmp_path: Path, **logging: Any) -> Reporter:
    run: Any = SimpleNamespace(
        config=replace(CONFIG, logging=LoggingConfig(tensorboard=False, **logging)), folder=RunFolder(tmp_path, ""),
        step=7, lead=True, device=CPU, feed=SimpleNamespace(wait_seconds=0.0), engine=object(),
        source=SimpleNamespace(bits_per_byte=lambda nats: nats / 2), ballot=Ballot(),
        heartbeat=Heartbeat(),
    )  # fmt: skip
    return Reporter(run)


def test_a_peak_may_be_given_for_a_device_that_is_not_known(tmp_path: Path) -> None:
    assert reporter(tmp_path).peak_tflops is None
    assert reporter(tmp_path, peak_tflops=0.5).peak_tflops == 0.5


def test_a_validation_is_reported_in_bits_per_byte_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported, measures = reporter(tmp_path), {"val_loss": 6.0, "val_accuracy": 0.5}
    with reported.metrics:
        reported.validation(measures)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 7, **measures, "val_bits_per_byte": 3.0}]
    assert "validation loss 6.0000 nats per token, 3.0000 bits per byte, accuracy 0.5000" in capsys.readouterr().out


def test_a_line_reads_back_to_the_last_bit_and_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, None) as writer:
        for step in range(1, 4):
            written = record(step, loss=math.pi / step)
            writer.write(written)
            assert lines(path)[-1] == written  # flushed, not only at the end


def test_what_is_not_finite_is_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, None) as writer:
        writer.write(record(grad_norm=math.inf, loss=math.nan, lr=-math.inf))
    found = lines(path)[0]
    assert (found["grad_norm"], found["loss"], found["lr"]) == ("inf", "nan", "-inf")
    assert math.isnan(float(found["loss"]))


def test_a_second_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with MetricsWriter(path, None) as writer:
            writer.write({"step": step})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_rank_that_is_not_enabled_makes_no_file(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl", tmp_path / "tb", enabled=False) as writer:
        writer.write(record())
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_the_same_numbers_without_what_a_restart_redoes(tmp_path: Path) -> None:
    for first, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        with MetricsWriter(tmp_path / "m.jsonl", tmp_path / "tb", first_step=first) as writer:
            for step in steps:
                writer.write(record(step, loss=step + first / 10) | {"epochs": {"code": step / 4, "prose": 0.5}})
            writer.write({"step": 3, "val_loss": 2.0, "gpu": {"clock_mhz": 900, "throttled_by": ["power cap"]}})
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, pytest.approx(2.1)), (3, pytest.approx(3.1))]
    assert [e.value for e in events.Scalars("validation/val_loss")] == [2.0]
    assert [e.value for e in events.Scalars("train/epochs/code")] == [0.25, 0.5, 0.75]
    assert [e.value for e in events.Scalars("train/gpu/clock_mhz")] == [900]
    assert "train/gpu/throttled_by" not in events.Tags()["scalars"]
    assert "train/mfu" not in events.Tags()["scalars"]


@pytest.mark.slow
def test_peak_memory_grows_with_what_was_held() -> None:
    before = peak_memory(CPU) or 0
    held = bytearray(b"x" * (before + 2**26))
    assert (peak_memory(CPU) or 0) >= before + 2**25 > 2**25
    del held
