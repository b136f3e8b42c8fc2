"""On a GPU `auto` measures, within its time, and a model trains with whatever it may choose."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.config import ModelConfig, RunConfig, TrainConfig
from llm.model.forms import BACKENDS, Forms, backend_attention
from llm.parity.batches import micro_batches, target_count
from llm.train.build import build_model
from llm.train.contest import FORMS, candidates, fastest, measure
from llm.train.engines.plain import PlainEngine
from runs import Workspace, succeeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = torch.device("cuda", 0)
GPT2 = ModelConfig(n_layer=2, n_head=12, d_model=768, vocab_size=50304, max_seq_len=1024)
LLAMA = replace(GPT2, position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=4, bias=False)
SECONDS = 2.0  # beyond compiling


def config_of(model: ModelConfig, **train: Any) -> RunConfig:
    base = RunConfig(model=model, train=TrainConfig(engine="plain", precision="bf16", micro_batch_size=16, **train))
    return replace(base, data=replace(base.data, seq_len=model.max_seq_len))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_every_candidate_is_timed_within_two_seconds(model: ModelConfig, deterministic: bool) -> None:
    config = config_of(model, deterministic=deterministic)
    measure(config, 1, 1, GPU)  # compiles
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    ms, failures = measure(config, 1, 1, GPU)
    assert time.perf_counter() - began < SECONDS
    assert failures == []
    assert {op: set(times) for op, times in ms.items()} == {op: set(f) for op, f in candidates(config, GPU).items()}
    assert all(0 < time < 100 for times in ms.values() for time in times.values()), ms
    assert fastest(ms).keys() == ms.keys()
    assert torch.cuda.memory_allocated() <= held and torch.cuda.max_memory_allocated() < held + 8 * 2**30


def losses(config: RunConfig, forms: Forms) -> list[float]:
    engine = PlainEngine(config, build_model(config, None, forms), None, GPU)
    found = []
    for step in range(4):
        engine.set_lr(1e-3)
        data = micro_batches(config, step, GPU, ragged=False)
        found.append(float(engine.forward_backward(data, target_count(config, ragged=False))))
        engine.step()
    return found


CHOICES = [(op, form) for op, forms in FORMS.items() for form in forms]


@pytest.mark.parametrize(("op", "form"), CHOICES, ids=[f"{op}-{form}" for op, form in CHOICES])
def test_a_model_trains_with_every_form_that_may_be_chosen(op: str, form: str) -> None:
    if form == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Gluon's kernels need a Hopper GPU")
    small = replace(LLAMA, d_model=256, n_head=4, n_kv_head=2, vocab_size=500, max_seq_len=256)
    config = config_of(small, global_batch_size=16)
    expected = losses(config, Forms.of("torch"))
    found = losses(config, Forms.of("torch")._replace(**{op: form}))
    assert found == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("form", BACKENDS)
def test_backends_of_the_operator(form: str, D: int) -> None:
    generator = torch.Generator(GPU).manual_seed(0)
    sizes = [(2, 1024, heads, D) for heads in (8, 4, 4)]
    q, k, v = (torch.randn(s, device=GPU, dtype=torch.bfloat16, generator=generator).requires_grad_() for s in sizes)
    o = backend_attention(q, k, v, Forms(form))
    heads_first = (x.transpose(1, 2).float() for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(o.float(), expected.transpose(1, 2), atol=2e-2, rtol=2e-2)
    gradients = [torch.autograd.grad(o, (q, k, v), torch.ones_like(o), retain_graph=True) for _ in range(20)]
    if form == "flash":
        assert all(torch.equal(a, b) for each in gradients[1:] for a, b in zip(gradients[0], each, strict=True))


def output(space: Workspace, environment: dict[str, str], **settings: Any) -> str:
    result = space.python(environment, **settings)
    succeeded(result)
    return result.stdout


def test_a_run_measures_once_and_goes_on_as_it_began(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    succeeded(space.prepare())
    environment = space.environment(HOME=str(tmp_path))
    del environment["DS_ACCELERATOR"]
    settings = dict(train__engine="plain", train__precision="bf16", name="auto")
    first = output(space, environment, train__max_steps=4, **settings)
    assert "kernels as measured: " in first and "kernels on cuda (train.impl=auto): " in first
    kept = Path("runs/auto/kernels.json")
    assert (tmp_path / kept).exists() and len([*(tmp_path / ".cache/ingot/forms").iterdir()]) == 1
    assert f"kernels as {kept} says: " in output(space, environment, train__max_steps=8, **settings)
    other = output(space, environment, train__max_steps=12, train__micro_batch_size=4, **settings)
    assert f"kernels are chosen anew: {kept} was measured for another machine or shape: micro-batch" in other
