"""LoRA: begins as the base model, computes what the merged weights compute, and trains its factors alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from llm.config import RunConfig
from llm.config.lora import LoRAConfig, is_factor
from llm.config.parse import from_dict
from llm.errors import InputError
from llm.model.gpt import GPT
from llm.model.init import initial_tensor
from llm.train.build import build_model
from llm.train.engines.plain import PlainEngine
from llm.train.optim import decays, parameter_groups
from tiny_run import BASE, G, T, V, batches, case, plain, target_count

CPU = torch.device("cpu")
TOKENS = torch.arange(2 * T).view(2, T) % V


def lora(**fields: Any) -> RunConfig:
    return plain(case(lora=dict(rank=4) | fields, train=dict(init_from="runs/base")))


def base(config: RunConfig) -> GPT:
    return cast(GPT, build_model(replace(config, lora=LoRAConfig()), None))


def merged(model: GPT, scale: float) -> dict[str, Tensor]:
    """W + scale B A by its definition, in float64, and every other parameter as it is."""
    named = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in [name for name in named if name.endswith("lora_a")]:
        owner = name.removesuffix("lora_a")
        product = named[owner + "lora_b"].double() @ named[owner + "lora_a"].double()
        named[owner + "weight"] = (named[owner + "weight"].double() + scale * product).float()
    return {name: value for name, value in named.items() if not is_factor(name)}


def test_it_begins_as_the_base_bit_for_bit() -> None:
    config = lora()
    model = build_model(config, None)
    assert torch.equal(model(TOKENS), base(config)(TOKENS))
    a = dict(model.named_parameters())["blocks.0.qkv.lora_a"]
    assert a.shape == (4, 32) and 0.8 < float(a.detach().var() * 32) < 1.2


@pytest.mark.parametrize("rank", [1, 32])
def test_the_forward_pass_is_that_of_the_merged_weights(rank: int) -> None:
    """With a product of any rank up to the full one."""
    config = lora(rank=rank, alpha=3.0)
    model, twin = build_model(config, None), base(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_factor(name):
                parameter.normal_(0, 0.1, generator=generator)
        for name, value in merged(model, 3.0 / rank).items():
            twin.get_parameter(name).copy_(value)
    found, expected = model(TOKENS), twin(TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - base(config)(TOKENS)).abs().max() > 1e-2


def test_targets_are_those_of_the_config() -> None:
    names = {name for name, _ in build_model(lora(targets=("up", "down")), None).named_parameters() if is_factor(name)}
    expected = {f"blocks.{i}.{role}.lora_{x}" for i in (0, 1) for role in ("up", "down") for x in "ab"}
    assert names == expected


def test_the_factors_alone_are_trained_and_they_decay() -> None:
    model = build_model(lora(), None)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_factor(name)} != set()
    (group,) = parameter_groups(model, 0.1)
    assert len(group["params"]) == len(trained) and group["weight_decay"] == 0.1
    assert decays("blocks.0.qkv.lora_a") and decays("blocks.0.qkv.lora_b")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_lower_the_loss_and_leave_every_other_weight(precision: str) -> None:
    config = lora(rank=8)
    config = replace(config, train=replace(config.train, precision=precision, micro_batch_size=G))
    engine = PlainEngine(config, build_model(config, None), None, CPU)
    before = {name: master.detach().clone() for name, master in engine.masters.items()}
    engine.set_lr(0.02)
    losses = []
    for _ in range(4):
        losses.append(float(engine.forward_backward(batches(config, 0, 0, 1, False), target_count(False))))
        engine.step()
    assert losses[-1] < losses[0] - 0.05
    for name, master in engine.masters.items():
        assert torch.equal(master, before[name]) != is_factor(name), name
    pieces = {(piece.name, piece.kind) for piece in engine.state_pieces()}
    expected = {(name, kind) for name in before for kind in ("master", "exp_avg", "exp_avg_sq")}
    assert pieces == {(name, kind) for name, kind in expected if kind == "master" or is_factor(name)}


def test_initial_factors_depend_on_seed_and_name_alone() -> None:
    one, other = (initial_tensor(BASE.model, seed, "blocks.0.up.lora_a", (4, 32)) for seed in (1, 2))
    assert not torch.equal(one, other)
    assert not initial_tensor(BASE.model, 1, "blocks.0.up.lora_b", (128, 4)).any()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"lora\.rank is 4 and train\.init_from null"):
        case(lora=dict(rank=4))
    lstm = dict(family="lstm", n_kv_head=None, position="learned")
    with pytest.raises(InputError, match=r"lora\.rank is 4 and model\.family lstm, which has none"):
        case(lora=dict(rank=4), model=lstm, train=dict(init_from="runs/base"))
    with pytest.raises(InputError, match=r"lora\.targets.*one of qkv, attention_output, up, down"):
        from_dict({"lora": {"targets": ["qkv", "head"]}})
    for fields, message in (
        (dict(rank=-1), "lora.rank is -1"),
        (dict(alpha=0.0), "lora.alpha is 0.0"),
        (dict(targets=()), r"lora.targets is \[\]"),
        (dict(targets=("up", "up")), r"lora.targets is \[up, up\]"),
    ):
        with pytest.raises(InputError, match=message):
            LoRAConfig(**fields)
