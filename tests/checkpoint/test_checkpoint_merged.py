"""A run with LoRA reads as the model without it: for generation, exports and runs that begin with its weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from states import state_of
from thread_ranks import on_thread_ranks, ranks_in_threads
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm.checkpoint.reader import open_checkpoint
from llm.checkpoint.writer import write_checkpoint
from llm.config import RunConfig
from llm.config.lora import is_factor
from llm.config.parse import to_dict
from llm.huggingface import export
from llm.slices import Slice
from llm.train.build import build_model
from llm.train.engines.plain import PlainEngine
from llm.train.init_from import OtherWeights, open_weights
from llm.trained import load_trained
from tiny_run import batches, case, plain
from trained_run import write_run

CPU = torch.device("cpu")
LLAMA = dict(norm="rmsnorm", activation="swiglu", position="rope", bias=False, d_ff=40, vocab_size=261)
WEIGHT = "blocks.1.qkv.weight"
CHECKPOINT = "checkpoints/step-00000004"


def opened(config: RunConfig, base: Path) -> OtherWeights:
    (source,) = on_thread_ranks(1, lambda rank: open_weights(config, base / "tokenizer.json", lambda text: None))
    assert isinstance(source, OtherWeights), source
    return source


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PlainEngine]:
    """A base, a run of four steps with factors of full rank on it, and that run's engine."""
    folder = tmp_path_factory.mktemp("runs")
    config = plain(case(model=LLAMA))
    base = write_run(folder / "base", config)
    config = plain(case(model=LLAMA, lora=dict(rank=40, alpha=20.0), train=dict(init_from=str(base))))
    engine = PlainEngine(config, build_model(config, None), None, CPU)
    engine.load_pieces(opened(config, base), 0)
    engine.set_lr(0.02)
    for step in range(4):
        engine.forward_backward(batches(config, step, 0, 1, False), 128)
        engine.step()
    adapted = folder / "adapted"
    adapted.mkdir()
    shutil.copy(base / "tokenizer.json", adapted)
    with ranks_in_threads(1):
        state = state_of(4, config=to_dict(config))
        write_checkpoint(adapted / "checkpoints", 4, engine.state_pieces(), state, keep_last=1)
    return base, adapted, engine


def logits(model: Any) -> Tensor:
    tokens = torch.arange(32).view(2, 16) * 7
    with torch.no_grad():
        return model(tokens)


def test_the_weights_of_the_base_are_in_the_checkpoint_bit_for_bit(runs: tuple[Path, Path, PlainEngine]) -> None:
    base, adapted, engine = runs
    before, after = open_checkpoint(base / "checkpoints/step-00000005"), open_checkpoint(adapted / CHECKPOINT)
    names = [name for name in engine.parameters if not is_factor(name)]
    assert len(names) > 10
    for name in names:
        assert torch.equal(after.read(name), before.read(name)), name
        assert (name, "exp_avg") not in after.manifest.tensors


def test_the_merged_model_and_its_export_compute_what_was_trained(
    runs: tuple[Path, Path, PlainEngine], tmp_path: Path
) -> None:
    base, adapted, engine = runs
    expected, trained = logits(engine.model.eval()), load_trained(adapted)
    torch.testing.assert_close(logits(trained.model), expected, atol=2e-5, rtol=0)
    assert (expected - logits(load_trained(base).model)).abs().max() > 0.1
    assert trained.config.lora.rank == 0 and not any(is_factor(name) for name, _ in trained.model.named_parameters())
    export(adapted, tmp_path / "hf", dtype="float32", plain=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(lambda x: theirs(x).logits), expected, atol=2e-5, rtol=0)
    export(adapted, tmp_path / "plain", dtype="float32", plain=True)
    assert b"lora_a" not in (tmp_path / "plain/model.safetensors").read_bytes()


def test_another_run_begins_with_the_merged_weights(runs: tuple[Path, Path, PlainEngine]) -> None:
    """Of which each tensor-parallel rank reads its slice; with factors of its own, they are new."""
    base, adapted, engine = runs
    config = plain(case(model=LLAMA, train=dict(init_from=str(adapted))))
    source = opened(config, base)
    named = {name: parameter.detach() for name, parameter in engine.parameters.items()}
    owner = WEIGHT.removesuffix("weight")
    expected = named[WEIGHT] + 0.5 * named[owner + "lora_b"] @ named[owner + "lora_a"]
    whole = source.read_slice(WEIGHT, "master", Slice.full(tuple(expected.shape)))
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)
    part = Slice(tuple(expected.shape), 0, 32, 64)
    assert torch.equal(source.read_slice(WEIGHT, "master", part), part.take(whole))
    again = opened(replace(config, lora=replace(config.lora, rank=2)), base)
    assert torch.equal(again.read_slice(WEIGHT, "master", part), part.take(whole))
    assert not again.read_slice(owner + "lora_b", "master", Slice.full((64, 2))).any()
