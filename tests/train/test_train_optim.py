"""What weight decay applies to, AdamW against the paper, learning rates against their closed forms, and loss scales."""

from __future__ import annotations

import copy
import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from llm.config import ModelConfig, OptimConfig, RunConfig
from llm.train.build import build_model
from llm.train.engines.shared import DynamicLossScale
from llm.train.optim import KernelAdamW, adamw, decays, learning_rate, parameter_groups, skip_where


def small_model(**model) -> nn.Module:
    return build_model(RunConfig(model=ModelConfig(n_layer=2, d_model=32, vocab_size=50, **model)), None)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_matrices_decay_and_nothing_else(tied: bool, norm: str) -> None:
    model = small_model(tie_embeddings=tied, norm=norm, position="learned")
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    grouped = [id(p) for p in decayed["params"] + spared["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_the_decision_does_not_look_at_shapes() -> None:
    """Under ZeRO 3 every parameter is one-dimensional when the groups are made."""
    model = small_model(position="learned")
    before = [len(group["params"]) for group in parameter_groups(model, 0.1)]
    for parameter in model.parameters():
        parameter.data = torch.zeros(1)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == before


def test_groups_keep_the_model_s_order_and_leave_out_what_is_frozen_or_empty() -> None:
    model = small_model(bias=False)
    frozen = dict(model.named_parameters())["embedding.weight"].requires_grad_(False)
    named = {id(p): name for name, p in model.named_parameters()}
    decayed, _ = parameter_groups(model, 0.1)
    names = [named[id(p)] for p in decayed["params"]]
    assert names == [name for name in named.values() if decays(name) and name != "embedding.weight"]
    assert frozen is not None
    assert len(parameter_groups(nn.ModuleDict({"norm": nn.LayerNorm(3)}), 0.1)) == 1


def test_adamw_is_the_paper_s_algorithm_2() -> None:
    config = OptimConfig(lr=0.1, min_lr=0.0, betas=(0.8, 0.9), eps=1e-3)
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = adamw([{"params": [parameter], "weight_decay": 0.5}], config)
    x, m, v = start.clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for t in range(1, 6):
        grad = torch.sin(torch.arange(3) + t).double()
        parameter.grad = grad.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * grad
        v = 0.9 * v + 0.1 * grad**2
        step = m / (1 - 0.8**t) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        x = x - 0.1 * (step + 0.5 * x)
    torch.testing.assert_close(parameter.detach(), x, rtol=1e-12, atol=0)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Updates `first` to `last` with made-up gradients and a rate that warms up and decays."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter) / (t + 1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(t + 1, 5) / 5 * (1 - t / 30)
        optimizer.step()


def two_optimizers() -> dict[str, tuple[nn.Module, torch.optim.AdamW]]:
    """One model twice, with groups that decay and that do not, and the optimizer of either form."""
    config = OptimConfig(lr=1e-2, min_lr=0.0, betas=(0.9, 0.95))
    model = small_model()
    made = {}
    for impl in ("triton", "auto"):
        twin = copy.deepcopy(model)
        made[impl] = (twin, adamw(parameter_groups(twin, 0.1), config, impl))
    return made


def assert_equal_up_to_rounding(a: nn.Module, b: nn.Module) -> None:
    for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-7)


@pytest.mark.slow
def test_the_kernel_s_updates_are_torch_s() -> None:
    (model, kernel), (twin, stock) = two_optimizers().values()
    assert type(kernel) is KernelAdamW
    assert type(stock) is torch.optim.AdamW
    start = [p.detach().clone() for p in model.parameters()]
    for which in (0, 1):
        steps((model, twin)[which], (kernel, stock)[which], 0, 20)
    assert_equal_up_to_rounding(model, twin)
    assert all((p - s).abs().max() > 0.01 for p, s in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize(("first", "second"), [("triton", "auto"), ("auto", "triton")])
def test_either_form_goes_on_from_the_other_s_state(first: str, second: str) -> None:
    made = two_optimizers()
    (model, optimizer), (other, successor) = made[first], made[second]
    steps(model, optimizer, 0, 5)
    state = copy.deepcopy(optimizer.state_dict())
    names: set[Any] = {kind for values in state["state"].values() for kind in values}
    assert names == {"step", "exp_avg", "exp_avg_sq"}
    other.load_state_dict(model.state_dict())
    successor.load_state_dict(state)
    steps(model, optimizer, 5, 10)
    steps(other, successor, 5, 10)
    assert_equal_up_to_rounding(model, other)
    ours, theirs = optimizer.state_dict(), successor.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_skipped_step_leaves_weights_moments_and_count(impl: str) -> None:
    parameter = nn.Parameter(torch.randn(5))
    optimizer = adamw([{"params": [parameter]}], OptimConfig(lr=0.1, min_lr=0.0), impl)
    found = []
    for skip in (0.0, 1.0, 1.0, 0.0):
        parameter.grad = torch.full((5,), float("nan") if skip else 1.0)
        skip_where(torch.tensor(skip > 0), optimizer)
        optimizer.step()
        found.append([parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())])
    assert [int(optimizer_step) for _, optimizer_step, *_ in found] == [1, 1, 1, 2]
    for kept in found[1:3]:
        assert all(torch.equal(*pair) for pair in zip(kept, found[0], strict=True))
    assert not torch.equal(found[3][0], found[0][0]) and found[3][0].isfinite().all()


def test_the_kernel_s_optimizer_leaves_to_torch_what_it_cannot_update() -> None:
    config = OptimConfig(lr=0.1, min_lr=0.0)
    given = [torch.randn(5, dtype=torch.float64), torch.randn(3, 4).t(), torch.randn(5), torch.randn(5)]
    pairs = [[nn.Parameter(t.clone()) for t in given] for _ in range(2)]
    for impl, parameters in zip(("triton", "auto"), pairs, strict=True):
        optimizer = adamw([{"params": parameters, "weight_decay": 0.1}], config, impl)
        for parameter in parameters[:3]:  # the last has no gradient
            parameter.grad = parameter.detach().sin()
        optimizer.step()
        assert len(optimizer.state) == 3
    for i in (0, 1):
        assert torch.equal(pairs[0][i], pairs[1][i])
    torch.testing.assert_close(pairs[0][2], pairs[1][2])
    assert torch.equal(pairs[0][3], given[3])


# -- Learning rate --


COSINE = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=10, schedule="cosine")
WSD = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=10, schedule="wsd", decay_fraction=0.2)


def rates(config: OptimConfig, max_steps: int) -> list[float]:
    return [learning_rate(config, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("config", [COSINE, WSD])
def test_warm_up_rises_in_equal_parts_to_the_peak(config: OptimConfig) -> None:
    assert rates(config, 100)[:10] == pytest.approx([1e-2 * (i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("config", [COSINE, WSD])
def test_the_last_update_and_all_beyond_have_min_lr(config: OptimConfig) -> None:
    assert learning_rate(config, 99, 100) == pytest.approx(1e-3, rel=1e-12)
    assert learning_rate(config, 500, 100) == 1e-3
    assert learning_rate(config, 98, 100) > 1e-3


def test_cosine_by_its_formula() -> None:
    for done, rate in enumerate(rates(COSINE, 100), 1):
        if done > 10:
            cosine = (1 + math.cos(math.pi * (done - 10) / 90)) / 2
            assert rate == pytest.approx(1e-3 + 9e-3 * cosine)
    assert learning_rate(COSINE, 54, 100) == pytest.approx((1e-2 + 1e-3) / 2)  # half way


def test_wsd_is_stable_then_falls_in_equal_parts() -> None:
    found = rates(WSD, 100)
    assert found[10:80] == [1e-2] * 70
    falls = [a - b for a, b in itertools.pairwise(found[79:])]
    assert falls == pytest.approx([9e-3 / 20] * 20)


def test_no_warm_up_and_warm_ups_as_long_as_the_run() -> None:
    no_warmup = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0)
    assert learning_rate(no_warmup, 0, 1) == 0.0
    assert learning_rate(no_warmup, 0, 1000) == pytest.approx(1.0, abs=1e-5)
    assert rates(COSINE, 4) == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])  # cut off by the end
    assert rates(COSINE, 10)[-1] == 1e-2


def test_a_long_decay_waits_for_the_warm_up() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=50, schedule="wsd", decay_fraction=0.9)
    found = rates(config, 100)
    assert max(found) == found[49] == 1.0
    assert found[74] == pytest.approx(0.5)


# -- Loss scale --


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch):
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    return loss_scaler.DynamicLossScaler


@pytest.mark.parametrize("seed", range(60))
def test_the_scales_are_deepspeed_s(seed: int, theirs) -> None:
    rng = random.Random(seed)
    window, hysteresis = rng.choice([1, 2, 3, 5, 10]), rng.choice([1, 2, 3])
    share = rng.choice([0.02, 0.1, 0.3, 0.6])
    reference = theirs(2.0**16, window, 1.0, hysteresis, False)
    state = DynamicLossScale(window=window, hysteresis=hysteresis, remaining=hysteresis)
    for _ in range(300):
        overflow = rng.random() < share
        try:
            reference.update_scale(overflow)
        except Exception:  # noqa: BLE001 - they raise no narrower one
            assert not state.update(torch.tensor(overflow))[1], "the run goes on though no smaller scale can mend it"
            return
        state, skipped = state.update(torch.tensor(overflow))
        assert state.scale == reference.cur_scale and skipped == overflow


def test_the_defaults_are_deepspeed_s() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    config, state = DeepSpeedFP16Config(enabled=True), DynamicLossScale()
    assert state.scale == 2.0**config.initial_scale_power
    assert (state.window, state.hysteresis) == (config.loss_scale_window, config.hysteresis)
    assert (state.minimum, state.remaining) == (config.min_loss_scale, config.hysteresis)


def test_a_saved_state_goes_on_where_it_was() -> None:
    state = DynamicLossScale(window=3)
    for i in range(20):
        state, _ = state.update(torch.tensor(i % 5 == 0))
        again = replace(DynamicLossScale(window=3), **state.state())
        assert again.state() == state.state()
        assert again.update(torch.tensor(False))[0].state() == state.update(torch.tensor(False))[0].state()
