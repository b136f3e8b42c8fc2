"""How a Hugging Face folder says what ours say: the fields of its config.json, the names and the order of its weights.

There are three forms: GPT-2's (learned positions, layer norm, GELU), Llama's (rotary positions, RMS norm, SwiGLU), and
Mistral's, which is Llama's with a window. What changes the mathematics and is not in both is refused, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.config.matrices import fused
from llm.errors import InputError, require
from llm.typed import dotted_keys, read, shown


@dataclass(frozen=True)
class Form:
    """What the folders of one `model_type` have in common."""

    model_type: str
    architecture: str
    model: dict[str, Any]
    """Fields of ModelConfig, with the values that this form stands for."""
    fields: dict[str, tuple[Any, ...]]
    """Other fields of ModelConfig: what config.json calls them (several: alike), and the default if any."""
    fixed: dict[str, tuple[Any, ...]]
    """Further fields, with the values under which the mathematics is Ingot's; the first is written."""
    names: dict[str, str]
    """Modules by Ingot's names; several where one of Ingot's weights holds the rows of several."""
    blocks: str
    """Before a block's number."""
    transposed: bool = False
    """Whether a linear's weight is [in, out] (GPT-2's Conv1D)."""


GPT2 = Form(
    "gpt2",
    "GPT2LMHeadModel",
    model={"position": "learned", "norm": "layernorm", "activation": "gelu"},
    fields={
        "vocab_size": ("vocab_size",), "max_seq_len": ("n_positions",), "n_layer": ("n_layer",),
        "n_head": ("n_head",), "d_model": ("n_embd",), "d_ff": ("n_inner", None),
        "norm_eps": ("layer_norm_epsilon", 1e-5), "tie_embeddings": ("tie_word_embeddings", True),
        "init_std": ("initializer_range", 0.02), "dropout": ("resid_pdrop embd_pdrop attn_pdrop", 0.1),
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    names={
        "embedding": "transformer.wte", "position_table": "transformer.wpe", "norm": "transformer.ln_f",
        "head": "lm_head", "norm_1": "ln_1", "qkv": "attn.c_attn", "attention_output": "attn.c_proj",
        "norm_2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj",
    },
    blocks="transformer.h.",
    transposed=True,
)  # fmt: skip
MISTRAL = Form(
    "mistral",
    "MistralForCausalLM",
    model={"position": "rope", "norm": "rmsnorm", "activation": "swiglu"},
    fields={
        "vocab_size": ("vocab_size",), "max_seq_len": ("max_position_embeddings",), "n_layer": ("num_hidden_layers",),
        "n_head": ("num_attention_heads",), "n_kv_head": ("num_key_value_heads",), "d_model": ("hidden_size",),
        "d_ff": ("intermediate_size",), "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False), "init_std": ("initializer_range", 0.02),
        "bias": ("attention_bias mlp_bias", False),
    },
    fixed={"hidden_act": ("silu", "swish"), "attention_dropout": (0.0, None)},
    names={
        "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "norm_1": "input_layernorm",
        "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attention_output": "self_attn.o_proj",
        "norm_2": "post_attention_layernorm", "up": "mlp.gate_proj mlp.up_proj", "down": "mlp.down_proj",
    },
    blocks="model.layers.",
)  # fmt: skip
LLAMA = replace(
    MISTRAL,
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=MISTRAL.fields | {"n_kv_head": ("num_key_value_heads", None)},
    fixed=MISTRAL.fixed | {"sliding_window": (None,)},
)
FORMS = (GPT2, LLAMA, MISTRAL)
# Fields of any form that would change the mathematics; those that `transformers` does not read are of models made from
# one of the three. A field that is not named here says nothing about it.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,), "auto_map": (None,), "clip_qkv": (None,), "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,), "is_encoder_decoder": (False, None), "logit_scale": (None, 1),
    "no_rope_layers": (None, []), "num_experts": (None, 0, 1), "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1), "per_layer_config": (None, {}), "quantization_config": (None,),
    "residual_multiplier": (None, 1), "use_qk_norm": (None, False),
}  # fmt: skip
ROPE = {"rope_type": ("default", None), "type": ("default", None), "partial_rotary_factor": (None, 1)}


def form_of(config: ModelConfig) -> Form:
    """The form that a model is exported in; raises InputError, with the reason, where there is none."""
    form = next((form for form in FORMS if all(getattr(config, n) == v for n, v in form.model.items())), None)
    layers = range(config.n_layer)
    windows = {config.layer_window(layer) for layer in layers}
    found = ", ".join(f"{name} {getattr(config, name)}" for name in GPT2.model)
    reasons = {
        "family lstm": config.family == "lstm",
        f"{found} (GPT-2's form has {', '.join(GPT2.model.values())}; Llama's {', '.join(LLAMA.model.values())})": (
            form is None
        ),
        "attention_sparse": any(config.layer_sparse(layer) for layer in layers),
        "attention_softcap": config.attention_softcap > 0,
        "an attention_window that differs between layers": len(windows) > 1,
        "n_kv_head below n_head, in GPT-2's": form is GPT2 and config.kv_heads < config.n_head,
        "attention_window, in GPT-2's": form is GPT2 and windows != {None},
        "bias, in Mistral's, which attention_window needs": form is LLAMA and windows != {None} and config.bias,
    }
    for reason, given in reasons.items():
        require(not given, f"no form of Hugging Face's has model.{reason}; export the weights as they are (--plain)")
    assert form is not None
    return MISTRAL if windows != {None} else form


def read_config(found: dict[str, Any]) -> tuple[Form, ModelConfig]:
    """The form and the model of a config.json; raises InputError where Ingot would compute something else."""
    kind = found.get("model_type")
    form = next((form for form in FORMS if form.model_type == kind), None)
    if form is None:
        raise InputError(f"model_type is {shown(kind)}; expected one of {', '.join(form.model_type for form in FORMS)}")
    for name, allowed in {**NEUTRAL, **form.fixed}.items():
        value = found.get(name, allowed[0])
        require(value in allowed, f"{name} is {shown(value)}; Ingot has no other than {shown(allowed[0])}")
    values, kinds = dict(form.model), dotted_keys(ModelConfig)
    given = {name: value for name, value in found.items() if value is not None}
    for ours, (theirs, *default) in form.fields.items():
        require(bool(default) or theirs in given, f"{theirs} is missing")
        stated = {name: read(kinds[ours], given.get(name, *default), name) for name in theirs.split()}
        require(len({*stated.values()}) == 1, f"{stated}: Ingot has one value, model.{ours}, for all of these")
        values[ours] = stated.popitem()[1]
    if form is GPT2:
        return form, ModelConfig(**values)
    if form is MISTRAL:
        values["attention_window"] = read(int | None, found.get("sliding_window", 4096), "sliding_window")
    types, kind = found.get("layer_types") or [], "sliding" if values.get("attention_window") else "full"
    same = isinstance(types, list) and {*map(str, types)} <= {f"{kind}_attention"}
    require(same, f"layer_types is {shown(types)}; Ingot has the window of sliding_window in every layer or in none")
    config = ModelConfig(**values, rope_theta=_rope_theta(found))
    width = found.get("head_dim")
    require(width in (None, config.head_dim), f"head_dim is {shown(width)}; Ingot's is hidden_size / heads")
    return form, config


def write_config(config: ModelConfig, *, end: int, dtype: str) -> dict[str, Any]:
    """The config.json that `transformers` 4 and 5 read as this model; end: the id that ends a document."""
    form = form_of(config)
    values = {"d_ff": config.ff_dim, "n_kv_head": config.kv_heads}
    found: dict[str, Any] = {"model_type": form.model_type, "architectures": [form.architecture]}
    for ours, (theirs, *_) in form.fields.items():
        found |= dict.fromkeys(theirs.split(), values.get(ours, getattr(config, ours)))
    found |= {name: allowed[0] for name, allowed in form.fixed.items() if allowed[0] is not None}
    if form is not GPT2:
        found |= {"head_dim": config.head_dim, "rope_theta": config.rope_theta}
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        found |= {"sliding_window": config.layer_window(0)} if form is MISTRAL else {}
    return found | {"bos_token_id": None, "eos_token_id": end, "torch_dtype": dtype}


def _rope_theta(found: dict[str, Any]) -> float:
    """The base of the rotary frequencies, wherever a version of `transformers` wrote it."""
    stated = [found.get("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        section = found.get(name) or {}
        require(isinstance(section, dict), f"{name} is {shown(section)}; expected an object")
        for key, value in section.items():
            plain = key == "rope_theta" or value in ROPE.get(key, ())
            require(plain, f"{name}.{key} is {shown(value)}; Ingot has rotary positions of type default alone")
        stated.append(section.get("rope_theta"))
    bases = {read(float, base, "rope_theta") for base in stated if base is not None}
    require(len(bases) <= 1, f"rope_theta is given as {', '.join(map(str, sorted(bases)))}")
    return bases.pop() if bases else 10000.0


@dataclass(frozen=True)
class Weight:
    """One of Ingot's weights: its rows come in equal groups, whose parts lie in tensors of the folder.

    A group of qkv is a key/value head with its queries, [q_1 ... q_R, k, v]; of `up` with SwiGLU a gate and an up row;
    of anything else one row.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    """Rows of each part of a group."""
    tensors: list[str]
    """One for each part of all groups; or one alone, in which these lie one after the other."""
    transposed: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors."""
        groups, step = self.shape[0] // sum(self.sizes), -1 if self.transposed else 1
        rows = [groups * size for size in self.sizes] if len(self.tensors) > 1 else self.shape[:1]
        return {name: (n, *self.shape[1:])[::step] for name, n in zip(self.tensors, rows, strict=True)}

    def runs(self) -> dict[str, list[Tensor]]:
        """The rows of this weight, by number, in the order in which each tensor has them: runs of rising numbers."""
        parts = torch.arange(self.shape[0]).view(-1, sum(self.sizes)).split(self.sizes, dim=1)
        runs = [part.flatten().contiguous() for part in parts]
        tensors = [[run] for run in runs] if len(self.tensors) > 1 else [runs]
        return dict(zip(self.tensors, tensors, strict=True))


def weights(form: Form, config: ModelConfig) -> dict[str, Weight]:
    """Where each of the model's parameters, by name, lies in a folder of the form."""
    C, D, K, F, V = config.d_model, config.head_dim, config.kv_heads, config.ff_dim, config.vocab_size
    R, sizes = config.n_head // K, fused(config)
    outer = {"embedding": (V, C), "norm": (C,), "position_table": (config.max_seq_len, C), "head": (V, C)}
    block = {
        "norm_1": (C,), "norm_2": (C,), "qkv": ((R + 2) * K * D, C), "attention_output": (C, R * K * D),
        "up": (len(sizes.get("up", (1,))) * F, C), "down": (C, F),
    }  # fmt: skip
    absent = {"position_table": config.position != "learned", "head": config.tie_embeddings}
    outer = {name: shape for name, shape in outer.items() if not absent.get(name)}
    blocks = [(f"blocks.{i}.", f"{form.blocks}{i}.", block) for i in range(config.n_layer)]
    found = {}
    for ours, theirs, modules in [("", "", outer), *blocks]:
        for name, shape in modules.items():
            linear = modules is block and len(shape) == 2
            biased = config.bias and (linear or (len(shape) == 1 and config.norm == "layernorm"))
            for kind, size in {"weight": shape, **({"bias": shape[:1]} if biased else {})}.items():
                tensors = [f"{theirs}{module}.{kind}" for module in form.names[name].split()]
                transposed = form.transposed and linear
                found[f"{ours}{name}.{kind}"] = Weight(size, sizes.get(name, (1,)), tensors, transposed)
    return found
