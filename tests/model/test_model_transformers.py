"""The model against Hugging Face's GPT-2 and Llama with the same weights: logits, loss, every gradient; and their init.

What goes where is written down here once more, apart from the product's conversion, whose faults would otherwise hide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.gpt import GPT
from llm.model.init import init_weights
from llm.model.layers import IGNORED_TARGET, DenseLayers, Documents

L, C, V, T, B = 2, 32, 61, 24, 3
LOGITS, GRADIENT = 2e-6, 5e-6
# Of the documents in each row of T + 1 tokens.
LENGTHS = [[25], [1, 7, 17], [12, 1, 1, 11]]


@dataclass(frozen=True)
class Form:
    """A model of theirs: its options, and the same ones in our config's words."""

    kind: str
    theirs: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)


GPT2 = dict(n_layer=L, n_head=4, n_embd=C, vocab_size=V, n_positions=T + 1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
LLAMA = dict(
    num_hidden_layers=L, hidden_size=C, vocab_size=V, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=T + 1, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA_OURS = dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False, d_ff=96, tie_embeddings=False)


def llama(ours: dict[str, Any] | None = None, **theirs: Any) -> Form:
    return Form("llama", {**LLAMA, **theirs}, {**LLAMA_OURS, **(ours or {})})


def rope_theta(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


FORMS = {
    "gpt2": Form("gpt2", GPT2),
    "gpt2-untied": Form("gpt2", dict(GPT2, tie_word_embeddings=False), dict(tie_embeddings=False)),
    "gpt2-narrow": Form("gpt2", dict(GPT2, n_inner=40), dict(d_ff=40)),
    "llama": llama(),
    "llama-tied": llama(dict(tie_embeddings=True), tie_word_embeddings=True),
    "llama-grouped": llama(dict(n_kv_head=2), num_key_value_heads=2),
    "llama-one-kv-head": llama(dict(n_kv_head=1), num_key_value_heads=1),
    "llama-theta": llama(dict(rope_theta=50.0), rope_parameters=rope_theta(50.0)),
    "llama-bias": llama(dict(bias=True, n_kv_head=2), attention_bias=True, mlp_bias=True, num_key_value_heads=2),
}


def their_model(form: Form) -> nn.Module:
    torch.manual_seed(5)
    classes = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }
    config, model = classes[form.kind]
    return model(config(**form.theirs, attn_implementation="eager"))


def by_kv_head(q: Tensor, k: Tensor, v: Tensor, kv_heads: int) -> Tensor:
    """Rows of q, k and v, head by head, as ours: [q_1 ... q_R, k, v] for each key/value head."""
    rows = [x.unflatten(0, (kv_heads, -1)) for x in (q, k, v)]
    return torch.cat(rows, dim=1).flatten(0, 1)


def from_gpt2(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors under our names; their linears multiply from the right."""
    ours = {
        "embedding.weight": theirs["transformer.wte.weight"],
        "position_table.weight": theirs["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(L):
            get = lambda name, at=f"transformer.h.{i}", kind=kind: theirs[f"{at}.{name}.{kind}"].t()  # noqa: E731
            block = {
                "norm_1": get("ln_1"), "norm_2": get("ln_2"), "attention_output": get("attn.c_proj"),
                "qkv": by_kv_head(*get("attn.c_attn").chunk(3), config.n_head), "up": get("mlp.c_fc"),
                "down": get("mlp.c_proj"),
            }  # fmt: skip
            ours |= {f"blocks.{i}.{name}.{kind}": tensor for name, tensor in block.items()}
    return ours


def from_llama(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors under our names; the rows of gate and up alternate."""
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    for i in range(L):
        at = f"model.layers.{i}"
        ours[f"blocks.{i}.norm_1.weight"] = theirs[f"{at}.input_layernorm.weight"]
        ours[f"blocks.{i}.norm_2.weight"] = theirs[f"{at}.post_attention_layernorm.weight"]
        for kind in ("weight", "bias") if config.bias else ("weight",):
            get = lambda name, at=at, kind=kind: theirs[f"{at}.{name}.{kind}"]  # noqa: E731
            q, k, v = (get(f"self_attn.{x}_proj") for x in "qkv")
            block = {
                "qkv": by_kv_head(q, k, v, config.kv_heads), "attention_output": get("self_attn.o_proj"),
                "up": torch.stack([get("mlp.gate_proj"), get("mlp.up_proj")], dim=1).flatten(0, 1),
                "down": get("mlp.down_proj"),
            }  # fmt: skip
            ours |= {f"blocks.{i}.{name}.{kind}": tensor for name, tensor in block.items()}
    return ours


def in_our_names(form: Form, theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    ours = {"gpt2": from_gpt2, "llama": from_llama}[form.kind](theirs, config)
    return ours if config.tie_embeddings else ours | {"head.weight": theirs["lm_head.weight"]}


def our_config(form: Form) -> ModelConfig:
    return ModelConfig(n_layer=L, n_head=4, d_model=C, vocab_size=V, max_seq_len=T + 1, **form.ours)


@torch.no_grad()
def pair(form: Form) -> tuple[GPT, nn.Module, ModelConfig]:
    """Both models with the same random weights, norms and biases too; attention is far from uniform."""
    config, theirs = our_config(form), their_model(form)
    for name, parameter in theirs.named_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2 if "attn" in name else 0.02)
    ours = GPT(config, DenseLayers(seed=0))
    copied = in_our_names(form, dict(theirs.named_parameters()), config)
    parameters = dict(ours.named_parameters())
    assert copied.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == copied[name].shape, name
        parameter.copy_(copied[name])
    return ours, theirs, config


def their_mask(lengths: list[list[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """For rows of T + 1 tokens: position_ids and an additive mask by which documents do not see one another; and of
    which document each token is."""
    ids = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    seen = (ids[:, :, None] == ids[:, None, :]) & torch.ones(T + 1, T + 1).tril().bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"position_ids": positions, "attention_mask": mask[:, None]}, ids


def our_documents(ids: Tensor) -> Documents:
    """The same documents, cut to the T inputs of a row, by counting from a loop over the tokens."""
    positions, starts = torch.zeros(B, T, dtype=torch.int64), []
    for b in range(B):
        for t in range(T):
            begins = t == 0 or bool(ids[b, t] != ids[b, t - 1])
            positions[b, t] = 0 if begins else positions[b, t - 1] + 1
            starts += [b * T + t] if begins else []
    return Documents(positions, torch.tensor([*starts, B * T], dtype=torch.int32))


@pytest.mark.parametrize("masks", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("name", FORMS)
def test_logits_loss_and_gradients(name: str, masks: bool) -> None:
    form = FORMS[name]
    ours, theirs, config = pair(form)
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 5:9] = labels[2, 20:] = IGNORED_TARGET
    extra, documents = {}, None
    if masks:
        extra, ids = their_mask(LENGTHS)
        documents = our_documents(ids)
    expected = theirs(input_ids=tokens, labels=labels, **extra)
    expected.loss.backward()
    arguments = (tokens[:, :-1], torch.arange(T), torch.arange(B))
    with torch.no_grad():
        logits = ours(*arguments, documents=documents)
    assert float((logits - expected.logits[:, :-1].detach()).abs().max()) <= LOGITS
    targets = labels[:, 1:]
    loss = ours(*arguments, targets, documents) / (targets != IGNORED_TARGET).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-6)
    gradients = in_our_names(form, {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}, config)
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        error, size = (parameter.grad - gradients[key]).norm(), gradients[key].norm()
        assert size > 0 and float(error / size) <= GRADIENT, f"{key}: {float(error / size):.1e}"


def test_initial_weights_are_spread_as_theirs() -> None:
    form = Form("gpt2", dict(GPT2, initializer_range=0.03), dict(init_std=0.03))
    config = our_config(form)
    ours = GPT(config, DenseLayers(seed=0))
    init_weights(ours, config, 1)
    theirs = in_our_names(form, their_model(form).state_dict(), config)
    for key, parameter in ours.named_parameters():
        weight = parameter.detach()
        if weight.dim() == 1:
            assert torch.equal(weight, theirs[key]), key
        else:  # six standard errors of the ratio of two
            assert abs(float(weight.std() / theirs[key].std()) - 1) < 6 / math.sqrt(weight.numel()), key
