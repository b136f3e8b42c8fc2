"""Muon against torch's of whole matrices in one process, what it refuses, and who computes and sends what."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from llm.config import ParallelConfig, RunConfig
from llm.config.lora import LoRAConfig
from llm.config.matrices import fused, is_hidden, moments_of
from llm.errors import InputError
from llm.slices import Slice
from llm.train import muon
from llm.train.build import build_model
from llm.train.engines.base import Fragment
from llm.train.muon import Muon, Part, cost, factor, optimizer_of, orthogonalised, owners, transfers
from llm.train.optim import parameter_groups, skip_where
from tiny_run import case

LSTM = dict(family="lstm", n_head=4, n_kv_head=None, position="learned")
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_kv_head=4, position="learned"),
    "llama": dict(norm="rmsnorm", activation="swiglu", bias=False, d_ff=48, tie_embeddings=False),
    "lstm": LSTM,
}


def made(config: RunConfig) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Parameters by name, and the optimizer of a process that holds all of them."""
    model = build_model(config, None)
    parameters = dict(model.named_parameters())
    groups = parameter_groups(model, config.optim.weight_decay)
    fragments = {name: Fragment(p, 0, 0, p.numel()) for name, p in parameters.items()}
    return parameters, optimizer_of(config, model, groups, parameters, lambda: fragments, None)


def rows_of(name: str, weight: Tensor, config: RunConfig) -> list[Tensor]:
    """The matrices of a weight, taken row by row: q, k, v, gate, up and gates of an LSTM, or itself."""
    model, layer = config.model, name.split(".")[-2]
    D, rows = model.head_dim, torch.arange(len(weight))
    if layer == "qkv":
        head = rows // D % (model.n_head // model.kv_heads + 2)
        which = (head - model.n_head // model.kv_heads + 1).clamp(min=0)
    elif layer == "up" and model.activation == "swiglu":
        which = rows % 2
    elif layer in ("input", "recurrent"):
        which = rows // model.d_model
    else:
        which = torch.zeros_like(rows)
    return [weight[which == i] for i in range(int(which.max()) + 1)]


def gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    for number, parameter in enumerate(parameters.values()):
        generator = torch.Generator().manual_seed(100 * step + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator) / (step + 1)


def largest_difference(config: RunConfig, steps: int = 4) -> dict[str, float]:
    """By parameter, after steps of Muon and of torch's: Muon for copies of each matrix alone, AdamW for the rest."""
    parameters, optimizer = made(config)
    hidden = {name: rows_of(name, p.detach(), config) for name, p in parameters.items() if is_hidden(name)}
    rest = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items() if name not in hidden}
    twins = {name: [nn.Parameter(part.clone()) for part in parts] for name, parts in hidden.items()}
    optim = config.optim
    theirs = torch.optim.Muon(
        [part for parts in twins.values() for part in parts],
        lr=optim.lr, weight_decay=optim.weight_decay, momentum=optim.momentum, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    groups = [
        {"params": [p for p in rest.values() if (p.ndim == 2) == decays], "weight_decay": optim.weight_decay * decays}
        for decays in (True, False)
    ]
    others = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    for step in range(steps):
        gradients(parameters, step)
        for name, p in parameters.items():
            assert p.grad is not None
            for twin, grad in zip(twins.get(name, []), rows_of(name, p.grad, config), strict=False):
                twin.grad = grad.clone()
            if name in rest:
                rest[name].grad = p.grad.clone()
        for each in (optimizer, theirs, others):
            for group in each.param_groups:
                group["lr"] = optim.lr / (step + 1)
            each.step()
    expected = {name: [p] for name, p in rest.items()} | twins
    return {
        name: max(
            float((mine - other).detach().abs().max())
            for mine, other in zip(rows_of(name, p, config) if name in twins else [p], expected[name], strict=True)
        )
        for name, p in parameters.items()
    }


def config_of(model: str, precision: str = "bf16") -> RunConfig:
    return case(
        model=MODELS[model],
        optim=dict(name="muon", momentum=0.9),
        train=dict(precision=precision, engine="fsdp"),
        parallel=dict(zero_stage=2),
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", MODELS)
def test_every_matrix_moves_as_torch_moves_it_alone(model: str, precision: str) -> None:
    """Bit for bit; torch's iterates in bf16 always, so that for fp32 it is made to stay in fp32."""
    stays = patch.object(Tensor, "bfloat16", Tensor.clone) if precision == "fp32" else nullcontext()
    with stays:
        found = largest_difference(config_of(model, precision))
    assert found == dict.fromkeys(found, 0.0)


def largest_of_rows(weight: tuple[int, ...], sizes: Any) -> float:
    return 0.2 * math.sqrt(max(weight))


FAULTS: dict[str, tuple[str, Callable[[], Any], set[str]]] = {
    "one matrix of q, k and v, of gate and up": (
        "llama", lambda: patch.object(Muon, "_sizes", lambda self, name: (1,)), {"qkv", "up"}
    ),
    "the scale of the fused shape": ("llama", lambda: patch.object(muon, "factor", largest_of_rows), {"qkv", "up"}),
    "the gates of an LSTM in one": (
        "lstm", lambda: patch.object(Muon, "_sizes", lambda self, name: (1,)), {"input", "recurrent"}
    ),
    "four iterations": ("gpt2", lambda: patch.object(muon, "ITERATIONS", 4), {"qkv", "attention_output", "up", "down"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str) -> None:
    model, applied, layers = FAULTS[fault]
    with applied():
        found = largest_difference(config_of(model), steps=1)
    assert {name.split(".")[-2] for name, difference in found.items() if difference > 1e-6} == layers


def test_singular_values_end_about_one() -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in ((24, 24), (16, 64), (64, 16)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)))
        assert values.min() > 0.6 and values.max() < 1.25, shape
    assert not orthogonalised(torch.zeros(3, 4)).any()


def test_a_refused_step_changes_nothing() -> None:
    parameters, optimizer = made(config_of("llama"))
    gradients(parameters, 0)
    optimizer.step()
    before = [p.detach().clone() for p in parameters.values()]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters.values()]
    gradients(parameters, 1)
    for p in parameters.values():
        assert p.grad is not None
        p.grad.view(-1)[0] = torch.nan
    skip_where(torch.tensor(True), optimizer)
    optimizer.step()
    for p, weight, state in zip(parameters.values(), before, moments, strict=True):
        assert torch.equal(p, weight)
        assert all(torch.equal(optimizer.state[p][kind], value) for kind, value in state.items())
    gradients(parameters, 1)
    skip_where(torch.tensor(False), optimizer)
    optimizer.step()
    assert {float(optimizer.state[p]["step"]) for p in parameters.values()} == {2.0}


def test_only_matrices_of_blocks_lose_their_second_moment() -> None:
    config = config_of("gpt2")
    parameters, optimizer = made(config)
    gradients(parameters, 0)
    optimizer.step()
    for name, p in parameters.items():
        assert set(optimizer.state[p]) == {"step", *moments_of(name, config.optim)}, name
    named = {name for name in parameters if len(moments_of(name, config.optim)) == 1}
    layers = ("qkv", "attention_output", "up", "down")
    assert named == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert all(len(moments_of(name, replace(config.optim, name="adamw"))) == 2 for name in parameters)


def test_a_weight_s_matrices_have_one_scale() -> None:
    for model in MODELS:
        config = config_of(model)
        sizes = fused(config.model)
        for name, p in made(config)[0].items():
            if is_hidden(name):
                rows = [max(part.shape) for part in rows_of(name, p, config)]
                expected = {0.2 * math.sqrt(most) for most in rows}
                assert {factor(tuple(p.shape), sizes.get(name.split(".")[-2], (1,)))} == expected


# Who computes and sends what.


def test_the_work_is_spread_by_its_cost() -> None:
    shapes = {f"{i}.{name}": shape for i in range(12) for name, shape in (("up", (64, 16)), ("down", (16, 64)))}
    shapes |= {f"{i}.out": (16, 16) for i in range(12)}
    costs = {name: cost(shape, (1,)) for name, shape in shapes.items()}
    assert costs["0.up"] == costs["0.down"] == 16 * 16 * (2 * 64 + 16)
    load = [0] * 4
    owner = owners(costs, load)
    assert load == [sum(costs[name] for name in owner if owner[name] == rank) for rank in range(4)]
    assert owner.keys() == shapes.keys()
    assert max(load) - min(load) <= costs["0.up"]
    assert max(load) < 1.1 * min(load)
    uneven = {"large": 64} | dict.fromkeys(map(str, range(12)), 1)
    alone = owners(uneven, [0] * 2)
    assert {alone[str(i)] for i in range(12)} == {1 - alone["large"]}
    load = [0] * 3
    assert [owners({name: 5}, load)[name] for name in "abcd"] == [0, 1, 2, 0], "as of four sub-groups of ZeRO 3"


def test_each_element_goes_to_the_owner_once_and_back_to_all() -> None:
    """Two tensor-parallel ranks times two data-parallel ones, of which each holds half of the flat slice, or all."""
    cuts = [Slice((4, 6), 1, 0, 3), Slice((4, 6), 1, 3, 6)]
    for whole in (False, True):
        parts = {
            rank: Part("w", cuts[rank % 2], 0 if whole else 6 * (rank // 2), 12 if whole else 6) for rank in range(4)
        }
        for owner in range(4):
            gathered, returned = transfers({"w": parts}, {"w": owner}, 4)
            assert [len(row) for row in gathered] == [4] * 4
            sent = [part for row in gathered for part in row[owner]]
            assert len(sent) == len(set(sent)) and sum(part.numel for part in sent) == 24
            assert all(not row[r] for row in gathered for r in range(4) if r != owner)
            assert parts[owner] in gathered[owner][owner], "what the owner holds it sends itself"
            assert [returned[owner][rank] for rank in range(4)] == [[parts[rank]] for rank in range(4)]


# What is refused.


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(parallel=ParallelConfig(zero_stage=1, offload="optimizer")), "parallel.offload optimizer, use parallel"),
        (dict(lora=LoRAConfig(rank=2)), "lora.rank 2 keeps; use optim.name=adamw"),
    ],
)
def test_what_does_not_go_with_muon(changed: dict[str, Any], said: str) -> None:
    config = case(optim=dict(name="muon"))
    with pytest.raises(InputError, match=said):
        replace(
            config, **changed | ({"train": replace(config.train, init_from="runs/base")} if "lora" in changed else {})
        )


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_is_a_decay_rate(momentum: float) -> None:
    with pytest.raises(InputError, match=r"optim\.momentum"):
        case(optim=dict(momentum=momentum))
