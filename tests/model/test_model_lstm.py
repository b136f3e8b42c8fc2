"""The LSTM against its equations, position by position; its state; what its config refuses; what it cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llm.checkpoint.forms import form_of
from llm.config import ModelConfig
from llm.errors import InputError
from llm.generate import generate
from llm.model.build import cache_of, model_of
from llm.model.gpt import GPT
from llm.model.layers import IGNORED_TARGET, DenseLayers
from llm.model.lstm import LSTM, LSTMState
from llm.parity.shrink import smaller
from llm.plan.flops import flops_by_part, flops_per_token
from llm.plan.memory import block_parameters, parameters, parameters_by_part
from llm.profile.ranges import Ranges
from llm.sampling import SamplingConfig
from llm.train.resume import check_same_model
from tiny_run import case

CONFIG = ModelConfig(family="lstm", n_layer=2, d_model=12, vocab_size=40, max_seq_len=16, init_std=0.3)
FAMILY: dict[str, Any] = dict(family="lstm", n_head=4, n_kv_head=None, position="learned")


def build(**fields: Any) -> LSTM:
    model = model_of(replace(CONFIG, **fields), DenseLayers(seed=7))
    assert isinstance(model, LSTM)
    return model


def batch(B: int = 3, T: int = 9) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 40, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def by_the_equations(model: LSTM, tokens: Tensor, samples: Tensor) -> Tensor:
    """The states [B, T, C] as the head of llm/model/lstm.py says, one position and one gate at a time."""
    weights, positions = dict(model.named_parameters()), torch.arange(tokens.shape[1])
    x = model.embedding_dropout(weights["embedding.weight"][tokens], samples, positions)
    for i, block in enumerate(model.blocks.values()):
        W, U = weights[f"blocks.{i}.lstm.input.weight"], weights[f"blocks.{i}.lstm.recurrent.weight"]
        b = weights.get(f"blocks.{i}.lstm.input.bias", torch.zeros(len(W)))
        h = c = torch.zeros(x.shape[0], x.shape[2])
        found = []
        for t in range(x.shape[1]):
            i_t, f_t, g_t, o_t = (x[:, t] @ W.t() + h @ U.t() + b).chunk(4, dim=1)
            c = f_t.sigmoid() * c + i_t.sigmoid() * g_t.tanh()
            h = o_t.sigmoid() * c.tanh()
            found.append(h)
        x = block.dropout(torch.stack(found, dim=1), samples, positions)
    return x


@pytest.mark.parametrize("fields", [{}, {"bias": False}, {"tie_embeddings": False}, {"dropout": 0.4}], ids=str)
def test_it_is_what_its_equations_say(fields: dict[str, Any]) -> None:
    """States, loss and every gradient; with dropout too, whose masks lie on what goes up alone."""
    model, (tokens, targets), samples = build(**fields), batch(), torch.arange(5, 8)
    targets = targets.clone()
    targets[1, 4:] = IGNORED_TARGET
    states = by_the_equations(model, tokens, samples)
    logits = F.linear(states, model.head.weight)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
    loss = model(tokens, torch.arange(9), samples, targets)
    torch.testing.assert_close(model.states(tokens, torch.arange(9), samples), states)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(expected, [*model.parameters()])
    loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_pieces_with_a_state_are_the_whole() -> None:
    model, (tokens, _) = build(), batch()
    state, whole = LSTMState(), model(tokens)
    parts = [model(part, cache=state) for part in tokens.split((4, 1, 4), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    chosen = torch.tensor([2, 0, 2])
    further = batch(3, 9)[1][chosen]
    torch.testing.assert_close(
        model(further, cache=state.select(chosen)), model(torch.cat([tokens[chosen], further], dim=1))[:, 9:]
    )


def test_no_row_and_no_call_hears_of_another() -> None:
    model, (tokens, _) = build(), batch()
    first = model(tokens)
    torch.testing.assert_close(model(tokens[1:2]), first[1:2])
    assert torch.equal(model(tokens), first)


def test_forget_gates_begin_open() -> None:
    bias = build().blocks["1"].lstm.input.bias
    i, f, g, o = bias.chunk(4)
    assert f.eq(1).all() and not i.any() and not g.any() and not o.any()
    assert not any("bias" in name for name, _ in build(bias=False).named_parameters())


def test_dropout_needs_keys() -> None:
    model, (tokens, targets) = build(dropout=0.1), batch()
    with pytest.raises(InputError, match="keyed by positions"):
        model(tokens, samples=torch.arange(3), targets=targets)
    assert torch.isfinite(model.eval()(tokens)).all()


def test_generation_with_a_state_draws_the_same_tokens() -> None:
    model = build().eval()
    assert isinstance(cache_of(model, 16), LSTMState)
    options: dict[str, Any] = dict(max_new_tokens=8, end=39, sampling=SamplingConfig(temperature=1.0, seed=3))
    texts = [[*generate(model, [[1, 2, 3, 4], [5, 6]], use_cache=cached, **options)] for cached in (True, False)]
    assert texts[0] == texts[1] and len(texts[0]) > 4


@pytest.mark.parametrize("fields", [{}, {"bias": False, "tie_embeddings": False}], ids=str)
def test_the_formulas_count_its_parameters(fields: dict[str, Any]) -> None:
    model = build(**fields)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert parameters(model.config) == sum(sizes.values())
    assert block_parameters(model.config) == sum(n for name, n in sizes.items() if name.startswith("blocks."))
    work = flops_by_part(model.config, 16)
    assert work == {"embedding": 0, "lstm": 6 * block_parameters(model.config), "head_loss": 6 * 40 * 12}
    assert work.keys() == parameters_by_part(model.config).keys()


def test_flops_are_those_of_its_products() -> None:
    """Forward and backward, as PyTorch counts them; without biases, and the gradient by the first, constant h."""
    (B, T, C, L), (tokens, targets) = (3, 9, 12, 2), batch()
    model = build(bias=False)
    with FlopCounterMode(display=False) as counter:
        states = by_the_equations(model, tokens, torch.arange(B))
        F.cross_entropy(F.linear(states, model.head.weight).flatten(0, 1), targets.flatten()).backward()
    expected = B * (T * flops_per_token(model.config, T) - L * 2 * 4 * C * C)
    assert counter.get_total_flops() == expected


def test_a_profile_finds_its_parts() -> None:
    ranges, seen = Ranges(build(), [], nvtx=False), list[str]()
    ranges.begin = seen.append
    ranges.end = lambda: None
    with ranges:
        ranges.model(batch()[0])
    assert seen == ["model", "embedding", "embedding", *["block", "lstm"] * 2, "head_loss"]


# --- what is refused ---

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tensor-parallel": (dict(parallel=dict(tensor_parallel=2)), "parallel.tensor_parallel=1"),
    "zero-3": (dict(parallel=dict(zero_stage=3)), "parallel.zero_stage=2"),
    "documents": (dict(data=dict(document_masks=True)), "data.document_masks=false"),
    "recompute": (dict(train=dict(activation_checkpointing="full")), "train.activation_checkpointing=none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_it_does_not_have_is_refused(name: str) -> None:
    sections, advice = REFUSED[name]
    with pytest.raises(InputError, match=f"model.family lstm .*{advice}"):
        case(model=FAMILY, **sections)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("position", "rope"), ("n_head", 2), ("d_ff", 64), ("norm", "rmsnorm"), ("activation", "swiglu")],
        *[("attention_window", 4), ("attention_softcap", 2.0), ("n_kv_head", 2)],
    ],
)
def test_a_field_of_a_transformer_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"model.family lstm has none of what model.{field} {value} sets"):
        replace(CONFIG, **{field: value})


def test_documents_are_refused_by_the_model() -> None:
    with pytest.raises(InputError, match="state runs on"):
        build()(batch()[0], documents=(torch.zeros(1), torch.zeros(1)))


def test_it_has_no_form_of_hugging_face() -> None:
    with pytest.raises(InputError, match=r"model\.family lstm; export the weights as they are"):
        form_of(CONFIG)


def test_it_is_another_model_than_a_gpt() -> None:
    gpt = replace(CONFIG, family="gpt")
    assert isinstance(model_of(gpt), GPT)
    with pytest.raises(InputError, match=r"model\.family: the checkpoint has gpt, the config has lstm"):
        check_same_model(gpt, CONFIG)


def test_it_shrinks_to_one_of_its_family() -> None:
    found = [*smaller(replace(CONFIG, n_layer=4, d_model=64, vocab_size=4096), 1)]
    assert {model.family for model in found} == {"lstm"}
    assert found[-1] == replace(CONFIG, n_layer=2, d_model=8, vocab_size=1024)
