"""A run in FP8 learns as one in bf16 does, on a text; docs/benchmarks.md has the tiny config's."""

from __future__ import annotations

import inspect
import tokenize
from dataclasses import replace

import pytest
import torch

from llm.config import RunConfig
from llm.train.build import build_model
from llm.train.engines.base import MicroBatch
from llm.train.engines.plain import PlainEngine
from llm.train.optim import learning_rate
from tiny_run import case, plain

B, T, STEPS = 8, 64, 150
TEXT = torch.frombuffer(bytearray(inspect.getsource(tokenize).encode("ascii", "replace")), dtype=torch.uint8).long()


def losses(fp8: str, weight_grad: str) -> torch.Tensor:
    """The training loss of each step, fp64 [STEPS], on characters of a module of the standard library."""
    train = dict(fp8=fp8, fp8_weight_grad=weight_grad, precision="bf16", max_steps=STEPS)
    model = dict(d_model=64, vocab_size=128, max_seq_len=T)
    whole = case(model=model, data=dict(seq_len=T), parallel=dict(zero_stage=1), train=train)
    config: RunConfig = replace(plain(whole), optim=replace(whole.optim, lr=2e-3, min_lr=1e-4, warmup_steps=10))
    engine = PlainEngine(config, build_model(config, None), None, torch.device("cpu"))
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        engine.set_lr(learning_rate(config.optim, step, STEPS))
        rows = torch.randint(len(TEXT) - T, (B, 1), generator=generator) + torch.arange(T + 1)
        tokens = TEXT[rows]
        batch = MicroBatch(tokens[:, :-1], torch.arange(T), torch.arange(B), tokens[:, 1:])
        found.append(engine.forward_backward([batch], B * T))
        engine.step()
    return torch.stack(found)


@pytest.mark.slow
def test_the_loss_is_within_a_percent_of_bf16() -> None:
    expected = losses("none", "fp8").unfold(0, 10, 10).mean(-1)
    assert expected[-1] < 0.7 * expected[0]
    for fp8, weight_grad in (("tensorwise", "fp8"), ("tensorwise", "high"), ("rowwise", "fp8"), ("rowwise", "high")):
        found = losses(fp8, weight_grad).unfold(0, 10, 10).mean(-1)
        assert ((found / expected - 1).abs() < 0.01).all(), (fp8, weight_grad)
