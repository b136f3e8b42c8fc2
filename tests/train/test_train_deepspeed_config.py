"""The generated DeepSpeed config means to DeepSpeed what the run's config says."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from llm.errors import InputError
from llm.train.engines.deepspeed_config import OWNED, PASSED_THROUGH, deepspeed_config


def run(precision: Any = "fp32", stage: Any = 1, section: dict | None = None) -> RunConfig:
    return RunConfig(
        optim=OptimConfig(grad_clip=0.7),
        parallel=ParallelConfig(zero_stage=stage),
        train=TrainConfig(precision=precision, global_batch_size=48, micro_batch_size=4),
        deepspeed=section or {},
    )


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """DeepSpeed's own reading of a config, as if on 4 data-parallel ranks."""
    from deepspeed.runtime import config

    class Grid:
        def get_data_parallel_world_size(self) -> int:
            return 4

    monkeypatch.setattr(config.dist, "get_rank", lambda: 0)
    return lambda generated: config.DeepSpeedConfig(copy.deepcopy(generated), mpu=Grid())


CASES = [("fp32", s) for s in range(4)] + [(p, s) for p in ("bf16", "fp16") for s in (1, 2, 3)]


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_deepspeed_reads_what_was_meant(precision: str, stage: int, parse) -> None:
    found = parse(deepspeed_config(run(precision, stage), dp_size=4, device="cuda"))
    assert found.train_batch_size == 48
    assert found.train_micro_batch_size_per_gpu == 4
    assert found.gradient_accumulation_steps == 3
    assert found.zero_optimization_stage == stage
    assert found.gradient_clipping == (0.7 if stage else 0.0)  # under ZeRO 0 the engine clips
    assert found.bfloat16_config.enabled == (precision == "bf16")
    assert found.float16_config.enabled == (precision == "fp16")
    assert found.float16_config.loss_scale == 0
    assert found.grad_accum_dtype == "fp32"
    assert found.communication_data_type == torch.float32
    assert found.zero_config.memory_efficient_linear is False
    assert found.optimizer_name is None
    assert found.scheduler_name is None


def test_further_keys_pass_through_beside_ingot_s(parse) -> None:
    section = {
        "zero_optimization": {
            "reduce_bucket_size": 5e5,
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": False,
        },
        "wall_clock_breakdown": True,
        "timers": {"throughput": {"enabled": True}},
    }
    before = copy.deepcopy(section)
    found = parse(deepspeed_config(run(stage=3, section=section), dp_size=4, device="cpu"))
    assert found.zero_config.reduce_bucket_size == 500000
    assert found.zero_config.param_persistence_threshold == 0
    assert found.zero_config.overlap_comm is False
    assert found.zero_config.stage == 3
    assert found.wall_clock_breakdown is True and found.timers_config.enabled is True
    assert section == before


def nested(path: str, value: Any) -> dict:
    *parents, last = path.split(".")
    section: dict = {last: value}
    for parent in reversed(parents):
        section = {parent: section}
    return section


@pytest.mark.parametrize("path", OWNED)
def test_a_key_that_ingot_owns_is_refused_with_what_to_use(path: str) -> None:
    with pytest.raises(InputError) as caught:
        deepspeed_config(run(section=nested(path, 1)), dp_size=1, device="cpu")
    assert f"deepspeed.{path}" in str(caught.value)
    assert OWNED[path] in str(caught.value)


def test_what_to_use_exists_in_the_config() -> None:
    for advice in OWNED.values():
        for word in advice.replace(",", " ").split():
            section, dot, field = word.partition(".")
            if dot:
                assert hasattr(getattr(RunConfig(), section), field), word


def test_every_generated_key_is_owned_or_may_be_overridden() -> None:
    generated = deepspeed_config(run("fp16", 3), dp_size=1, device="cuda")
    for key, value in generated.items():
        if key == "zero_optimization":
            assert all(f"{key}.{inner}" in OWNED for inner in value)
        else:
            assert (key in OWNED) != (key in PASSED_THROUGH)


def test_every_key_is_one_that_deepspeed_reads() -> None:
    import deepspeed

    root = Path(deepspeed.__file__).parent
    parts = ["runtime", "profiling", "comm", "utils", "monitor"]
    source = "".join(p.read_text() for part in parts for p in (root / part).rglob("*.py"))
    for path in [*OWNED, *PASSED_THROUGH]:
        key = path.split(".")[-1]
        assert f'"{key}"' in source or f"'{key}'" in source or f"{key}:" in source, key


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("zero_optimisation", "zero_optimization"), ("fp_16", "train.precision"), ("amp", "")],
)
def test_a_key_that_deepspeed_would_ignore_is_refused(key: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"deepspeed.{key} .*{nearest}"):
        deepspeed_config(run(section={key: {}}), dp_size=1, device="cpu")


@pytest.mark.parametrize(
    ("offload", "stage", "parts"),
    [
        ("none", 3, set()),
        ("optimizer", 1, {"offload_optimizer"}),
        ("optimizer", 3, {"offload_optimizer"}),
        ("all", 3, {"offload_optimizer", "offload_param"}),
    ],
)
def test_offload_names_the_cpu(offload: Any, stage: int, parts: set[str], parse) -> None:
    section = {"zero_optimization": {part: {"pin_memory": False} for part in parts}}
    config = replace(run(stage=stage, section=section), parallel=ParallelConfig(zero_stage=stage, offload=offload))
    found = parse(deepspeed_config(config, dp_size=4, device="cuda"))
    for part in ("offload_optimizer", "offload_param"):
        there = getattr(found.zero_config, part)
        assert (there is not None) == (part in parts)
        if there is not None:
            assert (there.device, there.pin_memory) == ("cpu", False)


@pytest.mark.parametrize(("part", "use"), [("offload_optimizer", "optimizer"), ("offload_param", "all")])
def test_keys_of_an_offload_that_is_not_asked_for_are_refused(part: str, use: str) -> None:
    with pytest.raises(InputError, match=rf"zero_optimization\.{part} .* none; use parallel\.offload={use}"):
        deepspeed_config(run(section={"zero_optimization": {part: {"pin_memory": True}}}), dp_size=1, device="cpu")


def test_zero_optimization_must_hold_keys() -> None:
    with pytest.raises(InputError, match="expected keys"):
        deepspeed_config(run(section={"zero_optimization": True}), dp_size=1, device="cpu")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(InputError, match=r"fp16.*CPU.*bf16"):
        deepspeed_config(run("fp16"), dp_size=1, device="cpu")
    deepspeed_config(run("bf16"), dp_size=1, device="cpu")
