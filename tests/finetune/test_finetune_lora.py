"""LoRA through its whole life: pretrained, adapted on one layout after another, exported, read by `transformers`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm.checkpoint.reader import CheckpointReader, open_checkpoint
from llm.config import RunConfig
from llm.config.lora import LoRAConfig, is_factor
from llm.config.reports import LoggingConfig
from llm.config.sections import CheckpointConfig
from llm.errors import Agreed
from llm.huggingface import export
from llm.model.build import model_of
from llm.train.loop import train
from llm.train.run_folder import RUNS, RunFolder
from llm.train.start import start
from pool import RankPool
from test_train_start_data import VOCABULARY, made_run
from tiny_run import case

RANK, ALPHA = 32, 20.0  # full: the model is 32 wide
LLAMA = dict(norm="rmsnorm", activation="swiglu", position="rope", bias=False, vocab_size=VOCABULARY)
LAYOUTS: list[dict[str, Any]] = [
    dict(parallel=dict(zero_stage=2)),
    dict(parallel=dict(zero_stage=3), train=dict(precision="bf16")),
    dict(parallel=dict(tensor_parallel=2, sequence_parallel=True, zero_stage=1)),
    dict(parallel=dict(zero_stage=3), train=dict(engine="fsdp")),
    dict(train=dict(engine="plain")),
]


def trained(config: RunConfig, layout: dict[str, Any], steps: int, **train_fields: Any) -> int:
    """Bring a run to so many steps; the step it goes on from. Collective."""
    parts = case(**layout)
    changed = replace(parts.train, max_steps=steps, init_from=config.train.init_from, **train_fields)
    config = replace(config, train=changed, parallel=parts.parallel, deepspeed=parts.deepspeed)
    lock = RunFolder(RUNS, config.name).claim() if torch.distributed.get_rank() == 0 else None
    torch.distributed.barrier()
    try:
        run = start(config, torch.device("cpu"), lambda line: None)
        assert run is not None
        first = run.step
        train(run)
        run.engine.close()
    finally:
        if lock is not None:
            lock.release()
    return first


def life(config: RunConfig, folder: Path) -> tuple[list[int], list[str]]:
    """Pretrain, then two steps of LoRA on each layout; the steps they went on from, and what is refused. Collective."""
    os.chdir(folder)
    config = replace(config, optim=replace(config.optim, lr=0.02, min_lr=0.02, weight_decay=0.0))
    config = replace(
        config, model=replace(case(model=LLAMA).model), logging=LoggingConfig(tensorboard=False, sample_tokens=0)
    )
    config = replace(config, checkpoint=CheckpointConfig(interval=2, keep_last=1))
    trained(replace(config, name="base"), dict(train=dict(engine="plain")), 2)
    on_base = replace(config.train, init_from="runs/base")
    config = replace(config, name="adapted", lora=LoRAConfig(RANK, ALPHA), train=on_base)
    first = [trained(config, layout, 2 * i) for i, layout in enumerate(LAYOUTS, 1)]
    refused = []
    for lora in (LoRAConfig(16, ALPHA), LoRAConfig(RANK, 8.0), LoRAConfig(RANK, ALPHA, ("up",)), LoRAConfig()):
        try:
            trained(replace(config, lora=lora), LAYOUTS[0], 12)
        except Agreed as error:
            refused.append(str(error))
    return first, refused


@pytest.fixture(scope="module")
def lived(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[str]]:
    folder = tmp_path_factory.mktemp("life")
    (first, refused), other = two_ranks.run(life, made_run(folder), folder)
    assert other == (first, refused)
    return folder / "runs", first, refused


def checkpoint(runs: Path, name: str, step: int) -> CheckpointReader:
    return open_checkpoint(runs / name / f"checkpoints/step-{step:08d}")


@pytest.mark.slow
def test_each_layout_goes_on_and_the_base_keeps_its_bits(lived: tuple[Path, list[int], list[str]]) -> None:
    runs, first, _ = lived
    assert first == [0, 2, 4, 6, 8]
    base, adapted = checkpoint(runs, "base", 2), checkpoint(runs, "adapted", 10)
    names = [name for name, kind in adapted.manifest.tensors if kind == "master"]
    kept = [name for name in names if not is_factor(name)]
    assert kept == [name for name, kind in base.manifest.tensors if kind == "master"] and len(names) > len(kept) > 10
    for name in kept:
        assert torch.equal(adapted.read(name), base.read(name)), name


@pytest.mark.slow
def test_the_export_computes_what_the_merged_weights_do(
    lived: tuple[Path, list[int], list[str]], tmp_path: Path
) -> None:
    """Merged here in float64, by the definition."""
    runs, *_ = lived
    reader = checkpoint(runs, "adapted", 10)
    model = model_of(case(model=LLAMA).model).eval()
    tokens = torch.arange(32).view(2, 16) * 7
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight, owner = reader.read(name).double(), name.removesuffix("weight")
            if (owner + "lora_a", "master") in reader.manifest.tensors:
                product = reader.read(owner + "lora_b").double() @ reader.read(owner + "lora_a").double()
                assert float(product.abs().max()) > 1e-3, name
                weight += ALPHA / RANK * product
            parameter.copy_(weight)
        expected = model(tokens)
        export(runs / "adapted", tmp_path / "hf", dtype="float32", plain=False)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
        torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=0)
        export(runs / "base", tmp_path / "base", dtype="float32", plain=False)
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(tokens).logits
    assert (theirs - before).abs().max() > 0.05


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_lora_alone(lived: tuple[Path, list[int], list[str]]) -> None:
    runs, _, refused = lived
    keys = ["lora.rank 32, the config has 16", "lora.alpha 20.0, the config has 8.0", "lora.targets ", "lora.rank 32"]
    assert len(refused) == len(keys)
    for key, message in zip(keys, refused, strict=True):
        assert f"runs/adapted was trained with {key}" in message and "restore it" in message
    assert [path.name for path in (runs / "adapted/checkpoints").glob("step-*")] == ["step-00000010"]
